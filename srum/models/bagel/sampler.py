"""The image sampler: Euler steps of the guided velocity over cached contexts (docs/specs/bagel.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from srum import flow
from srum.flow import Transition
from srum.models.base import Exploration, Sampling
from srum.seeding import seed_for

# velocity(x (n, D), t, branches) -> (branches * n, D): branch 0 is the full context, 1 no text, 2 no image
BranchVelocity = Callable[[Tensor, float, int], Tensor]


class Explorer:
    """Takes the random steps of ``explore`` for images of so many ``tokens`` each.

    ``taken``: of each such step the images, t, the transition, x_t, the velocity and what was reached, (n, D) of all.
    """

    def __init__(self, explore: Exploration, tokens: Sequence[int]) -> None:
        self.explore, self.tokens, self.steps = explore, tokens, 0
        self.taken: list[tuple[list[int], float, Transition, Tensor, Tensor, Tensor]] = []

    def step(self, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
        """The next step, of which this is the number ``steps``: random for the images whose it is."""
        number, self.steps = self.steps, self.steps + 1
        chosen = [i for i, steps in enumerate(self.explore.steps) if number in steps]
        reached = flow.euler_step(x, v, s - t)
        if chosen:
            made = flow.transition(t, s, self.explore.rule, self.explore.level)
            mask = torch.cat([torch.full((n, 1), i in chosen) for i, n in enumerate(self.tokens)]).to(x.device)
            seeds = [seed_for(seed, number) for seed in self.explore.seeds]
            noise = torch.cat(initial_noise(seeds, self.tokens, x.shape[1])).to(x.device)
            reached = torch.where(mask, made.mean(x, v) + made.std * noise, reached)
            self.taken.append((chosen, t, made, x, v, reached))
        return reached


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


def initial_noise(seeds: Sequence[int], tokens: Sequence[int], dim: int) -> list[Tensor]:
    """Standard normal noise in token space, (tokens_i, dim) from seed i alone."""
    return [
        torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
        for seed, n in zip(seeds, tokens, strict=True)
    ]
