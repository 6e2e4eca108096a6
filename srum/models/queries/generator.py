"""What is trained, and its timesteps: whole thousandths, in training and as the transformer is told them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

TICKS = 1000  # the transformer counts time in whole ones of these, noise at the last


class Generator(nn.Module, ABC):
    """All that may be trained: the queries, what stands between them and the transformer, and that."""

    @property
    @abstractmethod
    def queries(self) -> nn.Parameter:
        """Q vectors (..., Q, H)."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        """The velocity (B, C, h, w) at latents x_t (B, C, h, w), t (B,) in (0, 1], after conditions (B, Q, D)."""


def ticks(t: Tensor) -> Tensor:
    """t in (0, 1] as the transformer is told it: rounded down to thousandths, but for what float32 loses."""
    return torch.floor(t * TICKS + 1e-4)


def timestep(u: Tensor) -> float:
    """The timestep in (0, 1] of a uniform draw () from [0, 1): a whole thousandth, as in the authors' training."""
    return (TICKS - int(u * TICKS)) / TICKS
