"""Examples: what a method has the trainer learn, and the order in which they are visited.

An example holds neither noise nor timesteps; the trainer draws these from the example's own seed (run, epoch, id), so
that the batch size, the packs, the number of processes and an interruption change none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from srum.lazy import Lazy
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
    token (on a latent per cell of its grid, row-major), or one for all; none at all stand for ones. They may be
    ``Lazy``, and are then made at every visit. ``id`` is unique among the examples of a training and seeds what is
    drawn; ``group`` is what is held out together (a prompt).
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


def hold_out(examples: Sequence[Example], share: float, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """The examples to train on, and those of a ``share`` of the groups, drawn by ``seed``, to validate with.

    A share above 0 is at least one group.
    """
    if not share:
        return examples, ()
    of = [example.group for example in examples]
    groups = sorted(set(of), key=lambda name: seed_for(seed, "validation", name))
    chosen = set(groups[: max(1, round(share * len(groups)))])
    kept, held = ([place for place, group in enumerate(of) if (group in chosen) == out] for out in (False, True))
    return Lazy(kept, examples.__getitem__), Lazy(held, examples.__getitem__)


def draw_order(count: int, start: int, stop: int, seed: int, name: str = "") -> list[tuple[int, int]]:
    """(epoch, index) of places start <= k < stop in the endless stream ``name`` of seeded permutations of ``count``."""
    if start == stop:
        return []
    named = [name] if name else []
    return [
        (epoch, index)
        for epoch in range(start // count, (stop - 1) // count + 1)
        for index in _permutation(count, seed, "order", epoch, *named)[
            max(0, start - epoch * count) : stop - epoch * count
        ].tolist()
    ]


@lru_cache(maxsize=8)
def _permutation(count: int, *parts: int | str) -> Tensor:
    """The numbers below ``count`` in the order that ``parts`` seed: kept, since every step of an epoch takes a few."""
    return torch.randperm(count, generator=generator_for(*parts))


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by ``parts``: the same numbers on every device."""
    return torch.Generator().manual_seed(seed_for(*parts))
