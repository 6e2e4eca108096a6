"""Masked autoregression: in each of some iterations a few more tokens of the images are drawn, at once and for good,
by the diffusion head (docs/specs/harmon.md, 9 and 10)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from srum.models.harmon.head import Step, respaced
from srum.seeding import seed_for

GuidanceSchedule = Literal["constant", "linear"]
Head = Callable[[Tensor, Tensor, Tensor], Tensor]
# Conditions of tokens: of images whose ``hidden`` (B, n) tokens are hidden in ``tokens`` (B, n, C), those at ``now``
# (B, k), (B k, E) of each branch of guidance, the conditional one first.
Conditions = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]


class Chance(Protocol):
    """Where the random numbers of an image come from."""

    def order(self, count: int) -> Tensor:
        """A permutation (count,): its last are drawn first."""
        ...

    def noise(self, iteration: int, count: int, channels: int, steps: int) -> Tensor:
        """(1 + steps, count, channels) standard normal: the first for the head to begin with, then one for each step,
        of which the last is not used."""
        ...


class Seeded:
    """From the image's seed, a stream for each purpose: what else is in the batch changes nothing."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def order(self, count: int) -> Tensor:
        """Drawn by the seed."""
        return torch.randperm(count, generator=self._generator("order"))

    def noise(self, iteration: int, count: int, channels: int, steps: int) -> Tensor:
        """Drawn by the seed and the iteration."""
        return torch.randn(1 + steps, count, channels, generator=self._generator("noise", iteration))

    def _generator(self, *purpose: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_for(self.seed, *purpose))


def left_after(count: int, iterations: int) -> list[int]:
    """Of ``count`` hidden tokens, how many are hidden after each iteration: a cosine, at least one fewer each time
    while there are more than one."""
    left, hidden = [], count
    for number in range(1, iterations):
        hidden = max(1, min(hidden - 1, math.floor(count * math.cos(math.pi / 2 * number / iterations))))
        left.append(hidden)
    return [*left, 0]


def guidance_at(schedule: GuidanceSchedule, guidance: float, left: int, count: int) -> float:
    """The scale of an iteration that leaves so many of ``count`` tokens hidden."""
    return guidance if schedule == "constant" else 1 + (guidance - 1) * (count - max(1, left)) / count


def sample(
    head: Head,
    conditions: Conditions,
    tokens: Tensor,
    hidden: Tensor,
    chances: Sequence[Chance],
    iterations: int,
    steps: int,
    guidance: float,
    temperature: float = 1.0,
    schedule: GuidanceSchedule = "constant",
) -> Tensor:
    """``tokens`` (B, n, C) with the ``hidden`` ones (B, n), of every image as many, drawn; the others are kept.

    Iterations in which nothing would be drawn are passed over.
    """
    tokens, count = tokens.clone(), int(hidden[0].sum())
    orders = torch.stack([row.nonzero()[:, 0].cpu()[c.order(count)] for row, c in zip(hidden, chances, strict=True)])
    orders, rows = orders.to(tokens.device), torch.arange(len(tokens), device=tokens.device)[:, None]
    masked = count
    for number, left in enumerate(left_after(count, iterations)):
        now = orders[:, left:masked].sort(dim=1).values
        if not now.numel():
            continue
        still = torch.zeros_like(hidden).scatter_(1, orders[:, :masked], True)
        noise = [chance.noise(number, now.shape[1], tokens.shape[2], steps) for chance in chances]
        branches = conditions(tokens, still, now)
        scale = guidance_at(schedule, guidance, left, count)
        drawn = denoised(head, branches, torch.cat(noise, dim=1).to(tokens.device), scale, temperature)
        tokens[rows, now] = drawn.view(*now.shape, -1)
        masked = left
    return tokens


def denoised(head: Head, branches: Sequence[Tensor], noise: Tensor, guidance: float, temperature: float) -> Tensor:
    """Tokens (N, C) of ``noise`` (1 + steps, N, C) after conditions (N, E) of each branch: reverse diffusion."""
    x, z = noise[0], torch.cat(list(branches))
    tables = respaced(len(noise) - 1)
    times = tables.times.to(x.device)
    for step in reversed(range(len(times))):
        output = head(x.repeat(len(branches), 1), times[step : step + 1], z).float()
        x, log_variance = reverse_step(x, *guided(output, len(branches), guidance), step, len(times))
        if step:
            x = x + temperature * torch.exp(log_variance / 2) * noise[len(times) - step]
    return x


def guided(output: Tensor, branches: int, guidance: float) -> tuple[Tensor, Tensor]:
    """Noise and v (N, C) of the head's output (branches N, 2 C): noise is extrapolated from the branch without the
    prompt, v is the conditional one's."""
    noise, v = output.chunk(2, dim=1)
    if branches == 1:
        return noise, v
    (given, without), v = noise.chunk(2), v.chunk(2)[0]
    return without + guidance * (given - without), v


def reverse_step(x: Tensor, noise: Tensor, v: Tensor, step: Step, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and log variance (N, C) of what precedes x at a step of so many."""
    tables = respaced(steps)
    return tables.mean(x, tables.clean(x, noise, step), step), tables.predicted_log_variance(v, step)
