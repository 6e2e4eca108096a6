"""Examples: what a method has the trainer learn, and the order in which they are visited.

An example holds neither noise nor timesteps; the trainer draws these from the example's own seed (run, epoch, id), so
that the batch size, the packs, the number of processes and an interruption change none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srum.models.base import Segment
from srum.seeding import seed_for


@dataclass(frozen=True)
class Sampled:
    """How the tokens of a segment came about, which a policy drew: under its weights, and less a constant, their
    log-probability is ``logprob`` (n,) = -``precision`` error. A text has the precision 1, an image's step its own;
    a token of precision 0 was not drawn."""

    logprob: Tensor
    precision: Tensor


@dataclass(frozen=True, kw_only=True)
class Example:
    """What is learned from one thing: ``segments``, any number of them with a loss.

    ``credit``: what the tokens of each segment with a loss are weighted with, in the order of the segments: a value per
    token (on a latent per cell of its grid, row-major), or one for all; none at all stand for ones. ``id`` is unique
    among the examples of a training and seeds what is drawn; ``group`` is what is held out together (a prompt).
    ``sampled``: how each segment with a loss was drawn, where a policy drew them.
    """

    id: str
    segments: Sequence[Segment]
    credit: Sequence[Tensor] = ()
    group: str = ""
    sampled: Sequence[Sampled] = ()


def in_all_words(example: Example) -> Iterator[Example]:
    """The example with each of its texts, where a segment has several to draw from."""
    for place in range(max((len(segment.texts) for segment in example.segments), default=0) or 1):
        segments = [replace(s, texts=s.texts[place : place + 1] or s.texts[:1]) for s in example.segments]
        yield replace(example, segments=segments)


def hold_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those of a ``share`` of the groups, drawn by ``seed``, to validate with.

    A share above 0 is at least one group.
    """
    groups = sorted({example.group for example in examples}, key=lambda name: seed_for(seed, "validation", name))
    chosen = set(groups[: max(1, round(share * len(groups))) if share else 0])
    kept, held = ([example for example in examples if (example.group in chosen) == out] for out in (False, True))
    return kept, held


def draw_order(count: int, start: int, stop: int, seed: int, name: str = "") -> list[tuple[int, int]]:
    """(epoch, index) of places start <= k < stop in the endless stream ``name`` of seeded permutations of ``count``."""
    if start == stop:
        return []
    epochs = range(start // count, (stop - 1) // count + 1)
    stream = [
        (epoch, int(index))
        for epoch in epochs
        for index in torch.randperm(count, generator=generator_for(seed, "order", epoch, *([name] if name else [])))
    ]
    return stream[start - epochs[0] * count : stop - epochs[0] * count]


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by ``parts``: the same numbers on every device."""
    return torch.Generator().manual_seed(seed_for(*parts))
