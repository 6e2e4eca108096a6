"""The image sampler: Euler steps of the guided velocity over cached contexts (docs/specs/bagel.md, section 10)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from srum import flow
from srum.models.base import Sampling, branch_counts, guided_branches
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
    x, past, differences = noise.float(), _Past(), noise.new_zeros(1)
    timesteps = flow.schedule(sampling.timesteps, sampling.timestep_shift).tolist()
    counts = zip(guided_branches(sampling), branch_counts(sampling), strict=True)
    for (t, following), (made_of, run) in zip(pairwise(timesteps), counts, strict=True):
        if run:
            branches = velocity(x, t, run).float().unflatten(0, (run, -1))
            if run == made_of > 1:
                differences = branches - branches[:1]
            elif made_of > 1:
                branches = branches + differences
            v = guide(branches, owner, sampling)
            past.points.append((t, v))
        else:
            v = past.extrapolated(t)
        if steps_out is not None:
            steps_out.append((x, v))
        x = flow.euler_step(x, v, following - t) if explorer is None else explorer.step(x, v, t, following)
    return x


class _Past:
    """The last two velocities that the network was run for, and where."""

    def __init__(self) -> None:
        self.points: deque[tuple[float, Tensor]] = deque(maxlen=2)

    def extrapolated(self, t: float) -> Tensor:
        """The velocity at ``t`` on the line through the two."""
        (t_0, v_0), (t_1, v_1) = self.points
        return torch.lerp(v_0, v_1, (t - t_0) / (t_1 - t_0))


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
