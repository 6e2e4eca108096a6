"""DPM-Solver++ of second order (2M, midpoint) as Sana draws with it (docs/specs/openuni.md, 8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srum import flow
from srum.models.base import Sampling
from srum.models.queries.generator import TICKS


def schedule(sampling: Sampling) -> Tensor:
    """Timesteps (timesteps,) down to 0, float64: the first is one tick from noise, then shifted."""
    even = torch.linspace(1.0, 1 / TICKS, sampling.timesteps, dtype=torch.float64)
    return torch.cat([flow.shift_timestep((1 - even).flip(0)[:-1], sampling.timestep_shift), torch.zeros(1)])


class Multistep:
    """Takes the steps of one call of the sampler in order: each but the first and the last looks back at where the one
    before it headed for."""

    def __init__(self) -> None:
        self.before: tuple[Tensor, float] | None = None  # the clean latent headed for, and the step's length

    def step(self, x: Tensor, v: Tensor, t: float, following: float) -> Tensor:
        """From x at t in (0, 1) to the next timestep; the length of a step is that in log((1 - t) / t)."""
        clean = x - t * v
        if following == 0:
            return clean
        length = _log_ratio(following) - _log_ratio(t)
        ahead = clean
        if self.before is not None:
            last, last_length = self.before
            ahead = clean + length / (2 * last_length) * (clean - last)
        self.before = clean, length
        return following / t * x - (1 - following) * math.expm1(-length) * ahead


def _log_ratio(t: float) -> float:
    return math.log((1 - t) / t)
