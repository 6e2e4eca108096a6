"""The guided way from noise to a latent, whatever takes its steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from srum import flow
from srum.models.base import SampledPath, Sampling

Steps = list[tuple[Tensor, Tensor]]  # x_t and the guided velocity of each
Step = Callable[[Tensor, Tensor, float, float], Tensor]  # from x with its velocity, from t to the next


def sample(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    conditions: Tensor,
    without: Tensor | None,
    guidance: float,
    timesteps: Tensor,
    step: Step,
    steps_out: Steps | None = None,
) -> Tensor:
    """Latents (B, C, h, w) of ``noise`` and ``conditions`` (B, Q, D) over ``timesteps`` (S + 1,) in S steps.

    Guidance compares with conditions ``without`` what is asked for, (1, Q, D) or (B, Q, D); None: there is none.
    """
    x = noise.float()
    both = conditions if without is None else torch.cat([without.expand_as(conditions), conditions])
    for t, following in pairwise(timesteps.tolist()):
        times = torch.full((len(both),), t, device=x.device)
        v = velocity(x if without is None else x.repeat(2, 1, 1, 1), times, both).float()
        if without is not None:
            unasked, given = v.chunk(2)
            v = unasked + guidance * (given - unasked)
        if steps_out is not None:
            steps_out.append((x, v))
        x = step(x, v, t, following)
    return x


def euler(x: Tensor, v: Tensor, t: float, following: float) -> Tensor:
    """A step of Euler's."""
    return flow.euler_step(x, v, following - t)


def even_schedule(sampling: Sampling) -> Tensor:
    """Timesteps (timesteps,) from 1 to 0, computed in float64: 600 thousandths may not become 599."""
    even = torch.linspace(1.0, 0.0, sampling.timesteps, dtype=torch.float64)
    return flow.shift_timestep(even, sampling.timestep_shift)


def paths(steps: Steps, timesteps: Tensor) -> list[SampledPath]:
    """Per image what all steps over ``timesteps`` (S + 1,) have passed through."""
    states, velocities = (torch.stack(values, dim=1).cpu() for values in zip(*steps, strict=True))
    return [SampledPath(x, timesteps[:-1].float(), v) for x, v in zip(states, velocities, strict=True)]
