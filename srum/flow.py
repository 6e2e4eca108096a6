"""Rectified flow: the sign convention, stated once and used everywhere.

x_t = (1 - t) x + t eps        t in [0, 1]; t = 0 is the clean latent x, t = 1 is noise eps
v   = dx_t / dt = eps - x      what the model predicts
x_(t + dt) = x_t + v dt        sampling runs from t = 1 to t = 0, so dt < 0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlowNoise:
    """What corrupts a latent of N tokens: ``noise`` (N, D), standard normal, and the timestep ``t`` in (0, 1]."""

    noise: Tensor
    t: float


def interpolate(clean: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """The point of the path ``x_t = (1 - t) x + t eps``.

    ``clean`` and ``noise`` have one shape; ``t`` in [0, 1] is a number or broadcasts to it, e.g. (N, 1) for (N, D).
    """
    return (1 - t) * clean + t * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """The velocity of the path, ``eps - x``: the same at every t. Shapes as in :func:`interpolate`."""
    return noise - clean


def velocity_through(clean: Tensor, x_t: Tensor, t: float) -> Tensor:
    """The velocity ``(x_t - x) / t`` of the path from ``clean`` that is at ``x_t`` (same shape) at t in (0, 1]."""
    return (x_t - clean) / t


def shift_timestep(t: Tensor, shift: float) -> Tensor:
    """``t <- s t / (1 + (s - 1) t)``: s > 1 moves timesteps towards noise; 0 and 1 stay where they are."""
    return shift * t / (1 + (shift - 1) * t)


def sample_timesteps(n: int, shift: float, generator: torch.Generator) -> Tensor:
    """Training timesteps (n,) in (0, 1): ``shift(sigmoid(z))`` with z standard normal, drawn from ``generator``."""
    z = torch.randn(n, generator=generator, device=generator.device)
    return shift_timestep(torch.sigmoid(z), shift)


def schedule(timesteps: int, shift: float) -> Tensor:
    """The sampler's timesteps (timesteps,), from 1 down to 0: ``timesteps - 1`` Euler steps lie between them."""
    return shift_timestep(torch.linspace(1.0, 0.0, timesteps), shift)


def euler_step(x: Tensor, v: Tensor, dt: Tensor | float) -> Tensor:
    """One Euler step ``x + v dt``; towards the clean latent dt is negative (the next timestep minus this one)."""
    return x + v * dt
