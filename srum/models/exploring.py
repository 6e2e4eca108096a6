"""Random steps of a sampler (ability ``explore``), whatever the shape of what it moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from srum import flow
from srum.flow import Transition
from srum.models.base import Exploration, RandomStep
from srum.seeding import seed_for


class Explorer:
    """Takes the random steps of ``explore`` for images of so many ``rows`` each of x (rows of all images, ...).

    ``taken``: of each such step the images, t, the transition, x_t, the velocity and what was reached, of all images.
    """

    def __init__(self, explore: Exploration, rows: Sequence[int]) -> None:
        self.explore, self.rows, self.steps = explore, rows, 0
        self.taken: list[tuple[list[int], float, Transition, Tensor, Tensor, Tensor]] = []

    def step(self, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
        """The next step, of which this is the number ``steps``: random for the images whose it is."""
        number, self.steps = self.steps, self.steps + 1
        chosen = [i for i, steps in enumerate(self.explore.steps) if number in steps]
        reached = flow.euler_step(x, v, s - t)
        if chosen:
            made = flow.transition(t, s, self.explore.rule, self.explore.level)
            random = torch.cat([torch.full((n,), i in chosen) for i, n in enumerate(self.rows)]).to(x.device)
            seeds = [seed_for(seed, number) for seed in self.explore.seeds]
            noise = torch.cat(initial_noise(seeds, self.rows, x.shape[1:])).to(x.device)
            random = random.view(-1, *[1] * (x.dim() - 1))
            reached = torch.where(random, made.mean(x, v) + made.std * noise, reached)
            self.taken.append((chosen, t, made, x, v, reached))
        return reached

    def told(self, latents: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> list[tuple[RandomStep, ...]]:
        """Per image its random steps; ``latents`` makes (C, h, w) of the rows of each image."""
        steps: list[list[RandomStep]] = [[] for _ in self.rows]
        for chosen, t, made, *values in self.taken:
            x, v, reached = (latents(value.split(list(self.rows))) for value in values)
            for i in chosen:
                steps[i].append(RandomStep(x[i], t, v[i], reached[i], made))
        return [tuple(own) for own in steps]


def initial_noise(seeds: Sequence[int], rows: Sequence[int], shape: Sequence[int]) -> list[Tensor]:
    """Standard normal noise, (rows_i, *shape) from seed i alone."""
    return [
        torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
        for seed, n in zip(seeds, rows, strict=True)
    ]
