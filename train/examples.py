"""Examples: what a method has the trainer learn, and which of them a step has.

An example holds neither noise nor timesteps; the trainer draws these from the example's own seed (run, epoch, id), so
that the batch size, the packs, the number of processes and an interruption change none of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srum.config import TrainConfig
from srum.errors import TrainingError
from srum.lazy import Lazy
from srum.models.base import Segment, UnifiedModel
from srum.processes import Processes
from srum.seeding import seed_for
from srum.tensors import tensor_shape

if TYPE_CHECKING:
    from train.feed import ExampleFeed


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


@dataclass(frozen=True)
class Part:
    """Examples of one kind, ``per_step`` of them in each step, from an endless stream of seeded permutations.

    ``name`` tells the streams of a mix apart.
    """

    name: str
    examples: Sequence[Example]
    per_step: int


@dataclass(frozen=True)
class Mix:
    """Examples of several kinds, exactly so many of each in every step."""

    parts: Sequence[Part]
    held_out: Sequence[Example] = ()

    def __post_init__(self) -> None:
        for part in self.parts:
            if part.per_step and not part.examples:
                rest = f" beside {len(self.held_out)} to validate with" if self.held_out else ""
                raise TrainingError(f"there is nothing to train on: no {part.name or 'examples'}{rest}")

    @classmethod
    def of_shares(cls, kinds: Mapping[str, Sequence[Example]], shares: Mapping[str, int], batch_size: int) -> Mix:
        """The kinds by their ``shares`` (2 : 1 : 1) of a batch. Raises TrainingError where that does not divide."""
        whole = sum(shares.values())
        if batch_size % whole:
            raise TrainingError(
                f"train.batch_size: {batch_size} is no multiple of {whole}, the sum of the shares {shares}"
            )
        return cls([Part(name, kinds[name], batch_size // whole * share) for name, share in shares.items()])

    def at(self, step: int, seed: int) -> list[tuple[int, Example]]:
        """(epoch, example) of a step: of each part in turn."""
        return [
            (epoch, part.examples[index])
            for part in self.parts
            for epoch, index in draw_order(
                len(part.examples), step * part.per_step, (step + 1) * part.per_step, seed, part.name
            )
        ]

    def feed(self, model: UnifiedModel, config: TrainConfig, seed: int, processes: Processes) -> ExampleFeed:
        """The steps, as this model and these processes take them."""
        from train.feed import ExampleFeed

        return ExampleFeed(model, self, config, seed, processes)

    def __str__(self) -> str:
        return f"{sum(len(part.examples) for part in self.parts)} examples"

    def digest(self) -> str:
        """A checksum of the examples in order: ids, texts, credits.

        It reads these and looks whether the files of latents are whole: what is damaged is found before the first step.
        """
        total = hashlib.sha256()
        for example in (*(e for part in self.parts for e in part.examples), *self.held_out):
            texts = [(s.kind, s.text or s.ids or s.texts or None, s.loss) for s in example.segments]
            total.update(repr((example.id, texts)).encode())
            for segment in example.segments:
                if segment.file:
                    tensor_shape(segment.file)
            for credit in example.credit:
                total.update(credit.numpy().tobytes())
        return total.hexdigest()


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
