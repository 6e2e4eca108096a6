"""MaskGIT: all ids are drawn at once, those of least confidence are masked again, step by step
(docs/specs/showo.md, 9 and 11)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]  # the share that is masked, of how far the drawing is, both in [0, 1]
LEAST = 1e-20  # under a logarithm
SURE = math.log(torch.finfo(torch.float32).max)  # confidence of what is known


def cosine(r: Tensor) -> Tensor:
    """The released one."""
    return torch.cos(r * math.pi * 0.5)


@dataclass(frozen=True)
class Masks:
    """What is masked of N ids at ``t`` in [0, 1], at 1 all: those that come first in an order that the numbers
    ``order`` (N,) make. The share is sin(pi t / 2)."""

    order: Tensor
    t: float

    @property
    def count(self) -> int:
        """How many are masked, at least one."""
        share = cosine(torch.tensor(1 - self.t, dtype=torch.float32))
        return max(1, int((len(self.order) * share).round()))

    @property
    def hidden(self) -> Tensor:
        """Which are masked, (N,)."""
        return self.order.argsort() < self.count


class Noise:
    """The random numbers of images, each from its own seed, step after step."""

    def __init__(self, seeds: Sequence[int], codes: int) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.codes = codes

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Exponential (B, N, codes), drawn where ``hidden`` (B, N) alone, and uniform (B, N)."""
        exponential, uniform = torch.ones(*hidden.shape, self.codes), torch.empty(hidden.shape)
        for number, (generator, own) in enumerate(zip(self.generators, hidden.cpu(), strict=True)):
            drawn = torch.empty(int(own.sum()), self.codes).exponential_(generator=generator)
            exponential[number, own] = drawn
            uniform[number] = torch.rand(len(own), generator=generator)
        return exponential, uniform


def still_masked(step: int, steps: int, cells: int, schedule: Schedule = cosine) -> int:
    """How many of the cells the schedule leaves masked after a step, counted from 0; in float32, since rounding
    decides at some steps."""
    r = torch.tensor((step + 1) / steps, dtype=torch.float32)
    return int((cells * schedule(r)).floor())


@torch.no_grad()
def fill(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    codes: Tensor,
    hidden: Tensor,
    steps: int,
    temperature: float,
    noise: Callable[[Tensor], tuple[Tensor, Tensor]],
    schedule: Schedule = cosine,
) -> Tensor:
    """Image ids (B, N) in which those that are ``hidden`` (B, N) are drawn, in ``steps`` steps.

    ``logits_of`` (codes, hidden) gives logits (B, N, codes). c ~ softmax is argmax p / e with e ~ Exp(1), as
    torch.multinomial has it. ``temperature`` of the noise in the order, which fades as a product over the steps.
    """
    tau = temperature
    for step in range(steps):
        p = logits_of(codes, hidden).softmax(-1)
        exponential, uniform = (x.to(p.device) for x in noise(hidden))
        codes = torch.where(hidden, (p / exponential).argmax(-1), codes)
        tau *= 1 - (step + 1) / steps
        gumbel = -(-uniform.clamp(min=LEAST).log()).clamp(min=LEAST).log()
        chosen = p.gather(-1, codes[..., None])[..., 0].clamp(min=LEAST).log()
        confidence = torch.where(hidden, chosen, SURE) + tau * gumbel
        left = (hidden.sum(1) - 1).clamp(max=still_masked(step, steps, codes.shape[1], schedule)).clamp(min=1)
        cut = confidence.sort(dim=1).values.gather(1, left[:, None].clamp(max=codes.shape[1] - 1))
        hidden = (confidence < cut) & hidden.any(dim=1, keepdim=True)  # where nothing was asked for nothing is drawn
    return codes
