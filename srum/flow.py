"""Rectified flow: the sign convention, stated once and used everywhere.

x_t = (1 - t) x + t eps        t in [0, 1]; t = 0 is the clean latent x, t = 1 is noise eps
v   = dx_t / dt = eps - x      what the model predicts
x_(t + dt) = x_t + v dt        sampling runs from t = 1 to t = 0, so dt < 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["flow", "r3", "constant", "cps"]  # how much noise a stochastic step adds (docs/r3.md)
R3_LATEST = 0.95  # the timestep from which on the noise of rule ``r3`` grows no more


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


@dataclass(frozen=True)
class Transition:
    """The Gaussian step x_s ~ N(of_x x + of_v v, std^2) from a timestep to a later one, in place of an Euler step.

    Since its mean is linear in v, every x_s has a velocity that leads just there (:meth:`velocity_to`), and the
    log-density of x_s is, but for a constant, -``precision`` |v - that velocity|^2.
    """

    of_x: float
    of_v: float
    std: float

    def mean(self, x: Tensor, v: Tensor) -> Tensor:
        """Where the step leads without its noise; shapes as ``x``."""
        return self.of_x * x + self.of_v * v

    def velocity_to(self, x: Tensor, x_s: Tensor) -> Tensor:
        """The velocity whose mean is ``x_s``."""
        return (x_s - self.of_x * x) / self.of_v

    @property
    def precision(self) -> float:
        """What a squared difference of velocities counts: of_v^2 / (2 std^2)."""
        return self.of_v**2 / (2 * self.std**2)

    def kl(self, v: Tensor, v_ref: Tensor) -> Tensor:
        """The exact divergence of the step of ``v`` from that of ``v_ref``, per element."""
        return self.precision * (v - v_ref).square()


def transition(t: float, s: float, rule: Rule, level: float) -> Transition:
    """The stochastic step from ``t`` to ``s`` < t whose marginals are, to first order in t - s, those of the flow.

        dx = [v + g^2/(2t) (x + (1 - t) v)] dt + g dw            g sqrt(t - s) is the std of the step

    ``level`` a: rule ``flow`` (Flow-GRPO) g = a sqrt(t / (1 - t)), with 1 - s for 1 - t at t = 1, where s is the
    schedule's second point; ``r3`` the same with t at most 0.95 under the fraction; ``constant`` (DanceGRPO) g = a;
    ``cps`` (coefficient-preserving) std = s sin(a pi/2). Level 0 is the Euler step. Raises ValueError where the step
    would turn x around.
    """
    if rule == "cps":
        std = s * math.sin(level * math.pi / 2)
        kept = math.sqrt(max(0.0, s**2 - std**2))
        return Transition(1 - s + kept, kept * (1 - t) - (1 - s) * t, std)
    squared = level**2 * _noise(t, s, rule)
    pull = squared * (t - s) / (2 * t)
    if pull >= 1:
        raise ValueError(f"noise level {level} is too high for rule {rule} at the step from {t:.4g} to {s:.4g}")
    return Transition(1 - pull, (s - t) * (1 + squared * (1 - t) / (2 * t)), math.sqrt(squared * (t - s)))


def _noise(t: float, s: float, rule: Rule) -> float:
    """g^2 at level 1."""
    if rule == "constant":
        return 1.0
    if rule == "r3":
        return t / (1 - min(t, R3_LATEST))
    return t / (1 - (s if t == 1 else t))


def log_density(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """Per element the log-density of ``x`` under N(mean, std^2). Libraries take its mean over an image."""
    return -((x - mean).square()) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
