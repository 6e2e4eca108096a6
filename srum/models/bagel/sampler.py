"""The image sampler: Euler steps of the guided velocity over cached contexts (docs/specs/bagel.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from srum import flow
from srum.models.base import Sampling
from srum.models.exploring import Explorer

# velocity(x (n, D), t, branches) -> (branches * n, D): branch 0 is the full context, 1 no text, 2 no image
BranchVelocity = Callable[[Tensor, float, int], Tensor]


def sample(
    velocity: BranchVelocity,
    noise: Tensor,
    owner: Tensor,
    sampling: Sampling,
    steps_out: list[tuple[Tensor, Tensor]] | None = None,
    explorer: Explorer | None = None,
) -> Tensor:
    """Integrate ``noise`` (n, D) of all images (t = 1) to clean latent tokens (t = 0); ``owner`` (n,): its image.

    ``steps_out`` receives x_t and the guided velocity of every step; with an ``explorer`` some steps are random.
    """
    x = noise.float()
    timesteps = flow.schedule(sampling.timesteps, sampling.timestep_shift).tolist()
    for (t, following), branches in zip(pairwise(timesteps), branch_counts(sampling), strict=True):
        v = guide(velocity(x, t, branches).float().unflatten(0, (branches, -1)), owner, sampling)
        if steps_out is not None:
            steps_out.append((x, v))
        x = flow.euler_step(x, v, following - t) if explorer is None else explorer.step(x, v, t, following)
    return x


def branch_counts(sampling: Sampling) -> list[int]:
    """How many branches each Euler step needs: 1 without guidance, 2 with text guidance, 3 with both."""
    timesteps = flow.schedule(sampling.timesteps, sampling.timestep_shift)[:-1]
    low, high = torch.tensor(sampling.guidance_interval)  # float32 as the timesteps: a tie falls as in the reference
    guided = (low < timesteps) & (timesteps <= high) & (sampling.guidance > 1)
    return [(2 + (sampling.image_guidance > 1)) if here else 1 for here in guided.tolist()]


def guide(branches: Tensor, owner: Tensor, sampling: Sampling) -> Tensor:
    """Combine (branches, n, D) velocities: text guidance, renormalisation, image guidance."""
    if len(branches) == 1:
        return branches[0]
    v, u = branches[0], branches[1]
    g = u + sampling.guidance * (v - u)
    if sampling.renorm == "text_channel":
        g = _renormalise(g, v, owner, sampling)
    if len(branches) == 3:
        w = branches[2]
        g = w + sampling.image_guidance * (g - w)
    return g if sampling.renorm == "text_channel" else _renormalise(g, v, owner, sampling)


def _renormalise(g: Tensor, v: Tensor, owner: Tensor, sampling: Sampling) -> Tensor:
    """g shrunk to at most the norm of v: per token, per image, or over the whole call."""
    squares = torch.stack([v, g]).square().sum(2)  # (2, n)
    if sampling.renorm == "global":
        squares = torch.zeros_like(squares).index_add_(1, owner, squares)[:, owner]  # no more images than tokens
    elif sampling.renorm == "global_batch":
        squares = squares.sum(1, keepdim=True)
    norm_v, norm_g = squares.sqrt()
    scale = (norm_v / (norm_g + 1e-8)).clamp(min=sampling.renorm_min, max=1.0)
    return g * scale[:, None]
