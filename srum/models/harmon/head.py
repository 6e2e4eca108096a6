"""The diffusion head, a small network that draws a token after its condition, and its Gaussian diffusion
(docs/specs/harmon.md, 9 and 12).

Diffusion time runs over 1000 steps, 0 nearly clean, 999 noise: x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srum.models.harmon.config import MarSizes

STEPS = 1000  # of the diffusion
SINUSOIDS = 128  # frequencies of a diffusion time
EPS = 1e-6
BIN = 1 / 255  # half the width of a level, over which the likelihood of the last step is integrated
OPEN = 0.999  # values beyond it fall into levels that are open to one side
FLOOR = 1e-12  # of a probability

Step = Tensor | int  # of each token (N,), or the one of all


class TimeEmbedder(nn.Module):
    """Cosines and sines of a diffusion time through two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(N,) -> (N, W)."""
        frequencies = torch.exp(-math.log(10000) * torch.arange(SINUSOIDS, device=t.device) / SINUSOIDS)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class ResidualBlock(nn.Module):
    """x + gate * mlp(LN(x) (1 + scale) + shift), the three of them from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """A linear layer behind a norm that the condition scales and shifts."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift)


class HeadNetwork(nn.Module):
    """Predicts of noisy tokens their noise and how its variance lies between its bounds."""

    def __init__(self, sizes: MarSizes) -> None:
        super().__init__()
        width = sizes.head_width
        self.time_embed = TimeEmbedder(width)
        self.cond_embed = nn.Linear(sizes.decoder_width, width)
        self.input_proj = nn.Linear(sizes.channels, width)
        self.res_blocks = nn.ModuleList([ResidualBlock(width) for _ in range(sizes.head_depth)])
        self.final_layer = FinalLayer(width, 2 * sizes.channels)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x (N, C), t (N,) and conditions z (N, E) to (N, 2 C): the noise, then v."""
        y, x = self.time_embed(t) + self.cond_embed(z), self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class DiffusionLoss(nn.Module):
    """The name that the head has in the files."""

    def __init__(self, sizes: MarSizes) -> None:
        super().__init__()
        self.net = HeadNetwork(sizes)


# --- the diffusion


@dataclass(frozen=True)
class Diffusion:
    """Tables (K,) in float64 of K steps at ``times`` among the 1000; ``kept`` is the product of 1 - beta up to each."""

    times: Tensor
    kept: Tensor

    @cached_property
    def before(self) -> Tensor:
        """``kept`` of the step before."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.kept[:-1]])

    @cached_property
    def beta(self) -> Tensor:
        return 1 - self.kept / self.before

    @cached_property
    def variance(self) -> Tensor:
        """Of the step before, given this one and the clean token: the lower bound of the head's."""
        return self.beta * (1 - self.before) / (1 - self.kept)

    @cached_property
    def log_variance(self) -> Tensor:
        """Its logarithm, the first entry, of a variance of 0, replaced by the second."""
        return torch.log(torch.cat([self.variance[1:2], self.variance[1:]]))

    @cached_property
    def of_clean(self) -> Tensor:
        """What the clean token counts in the mean of the step before."""
        return self.beta * self.before.sqrt() / (1 - self.kept)

    @cached_property
    def of_noisy(self) -> Tensor:
        """What the noisy token counts there."""
        return (1 - self.before) * (1 - self.beta).sqrt() / (1 - self.kept)

    def at(self, table: Tensor, step: Step) -> Tensor | float:
        """Entries of a table for steps (N,), (N, 1) float32, or that of the one step of all tokens."""
        if isinstance(step, int):
            return table[step].item()
        return table.to(step.device, torch.float32)[step][:, None]

    def noised(self, clean: Tensor, noise: Tensor, step: Step) -> Tensor:
        """x_t (N, C) of clean tokens and noise (N, C)."""
        return self.at(self.kept.sqrt(), step) * clean + self.at((1 - self.kept).sqrt(), step) * noise

    def clean(self, x: Tensor, noise: Tensor, step: Step) -> Tensor:
        """The clean tokens (N, C) of which x_t is, with this noise."""
        return self.at((1 / self.kept).sqrt(), step) * x - self.at((1 / self.kept - 1).sqrt(), step) * noise

    def mean(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """Of the step before, given x_t and the clean tokens."""
        return self.at(self.of_clean, step) * clean + self.at(self.of_noisy, step) * x

    def predicted_log_variance(self, v: Tensor, step: Step) -> Tensor:
        """That of the step before, between its bounds by v (N, C), or beyond them: v is not cut."""
        share = (v + 1) / 2
        return share * self.at(self.beta.log(), step) + (1 - share) * self.at(self.log_variance, step)


@lru_cache
def diffusion() -> Diffusion:
    """All 1000 steps of the cosine schedule."""
    u = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    level = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    beta = torch.clamp(1 - level[1:] / level[:-1], max=0.999)
    return Diffusion(torch.arange(STEPS), (1 - beta).cumprod(0))


@lru_cache
def respaced(steps: int) -> Diffusion:
    """So many of them, evenly spaced, the first and the last among them; the head is told their number among all."""
    stride, place, times = (STEPS - 1) / (steps - 1) if steps > 1 else 1.0, 0.0, []
    for _ in range(steps):
        times.append(round(place))  # half to even
        place += stride
    chosen = torch.tensor(times)
    return Diffusion(chosen, diffusion().kept[chosen])


def variational_bound(clean: Tensor, x: Tensor, predicted: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The bound's term of each token (N,), in bits, mean over channels: how well v (N, C) tells the variance of what
    precedes x_t, with the mean of the ``predicted`` noise, which gets no gradient. At t = 0 the likelihood of the token
    among 256 levels."""
    tables = diffusion()
    mean = tables.mean(x, tables.clean(x, predicted.detach(), t), t)
    log_variance = tables.predicted_log_variance(v, t)
    true_mean, true = tables.mean(x, clean, t), tables.at(tables.log_variance, t)
    squared = (true_mean - mean).square() * torch.exp(-log_variance)
    divergence = 0.5 * (log_variance - true + torch.exp(true - log_variance) + squared - 1)
    first = (t == 0)[:, None]
    return torch.where(first, -log_likelihood(clean, mean, log_variance / 2), divergence).mean(1) / math.log(2)


def log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Of x under a normal distribution, integrated over its level; per element."""
    centred, scale = x - mean, torch.exp(-log_std)
    upper, lower = (_normal(scale * (centred + side)) for side in (BIN, -BIN))
    inside = torch.where(x > OPEN, 1 - lower, upper - lower)
    return torch.where(x < -OPEN, upper, inside).clamp(min=FLOOR).log()


def _normal(x: Tensor) -> Tensor:
    """The distribution function of the normal distribution, approximately."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
