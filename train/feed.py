"""What feeds the trainer: the packs of each step, of which each process makes its own.

A ``Mix`` of examples has them drawn by ``ExampleFeed``; pretraining has a feed whose packs come from worker processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from srum.config import TrainConfig
from srum.errors import TrainingError
from srum.models.base import UnifiedModel
from srum.processes import Processes
from srum.tensors import tensor_shape
from srum.train.examples import Example, draw_order, generator_for, in_all_words
from srum.train.metrics import TIMESTEP_BINS
from srum.train.packs import Pack, Sample, at_timestep, cut, draw, make_pack, measured, opened, worded


@dataclass(frozen=True)
class Step:
    """The packs of this process in a step, each made when it is asked for, and whether it counts.

    ``image_tokens`` and ``text_tokens`` are what all processes predict in packs that count; ``ids`` all examples of the
    step; ``facts`` what the metrics say of it besides.
    """

    packs: Iterable[tuple[Pack, bool]]
    image_tokens: int
    text_tokens: int
    ids: Sequence[str]
    facts: Mapping[str, float] = field(default_factory=dict)


class Feed(Protocol):
    """Gives the trainer its steps.

    Where a feed ``draws``, a step is drawn by the network, with the weights that it has then, and is a function of
    these, too. All processes draw all of it.
    """

    draws: bool

    def step(self, number: int) -> Step:
        """Step ``number``, counted from 0: a function of it and of the seed alone."""
        ...

    def validation(self) -> Iterator[Step]:
        """What is held out, the same every time; nothing where nothing is."""
        ...

    def compared(self) -> Mapping[str, Iterator[Step]]:
        """What is measured before the first step and never learned (``Mix``)."""
        ...


class Source(Protocol):
    """What is learned: examples (a ``Mix``), or what else can be made a feed of."""

    def digest(self) -> str:
        """A checksum of what is learned, for resuming."""
        ...

    def feed(self, model: UnifiedModel, config: TrainConfig, seed: int, processes: Processes) -> Feed:
        """The steps, as this model and these processes take them."""
        ...


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
    """Examples of several kinds, exactly so many of each in every step.

    ``compared``: examples by what they are called, of which nothing is learned; before the first step their losses are
    told to the method (``Method.remark``).
    """

    parts: Sequence[Part]
    held_out: Sequence[Example] = ()
    compared: Mapping[str, Sequence[Example]] = field(default_factory=dict)

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


class ExampleFeed:
    """The steps of a mix of examples, drawn by ``seed``, in packs as ``train.memory`` allows."""

    draws = False

    def __init__(self, model: UnifiedModel, mix: Mix, config: TrainConfig, seed: int, processes: Processes) -> None:
        self.model, self.mix, self.config, self.seed, self.processes = model, mix, config, seed, processes
        if "prepare" in model.abilities:
            preparing: Any = model
            others = (*mix.held_out, *(example for kind in mix.compared.values() for example in kind))
            examples = (*(example for part in mix.parts for example in part.examples), *others)
            preparing.prepare(
                opened(model, worded(one)).segments for example in examples for one in in_all_words(example)
            )

    def step(self, number: int) -> Step:
        """The examples of the step with their dropout, timesteps and noise."""
        visits = [(epoch, worded(example, self.seed, epoch)) for epoch, example in self.mix.at(number, self.seed)]
        packs = self.own_packs([measured(self.model, example) for _, example in visits])
        samples = [([self.draw(*visits[place]) for place in members], counted) for members, counted in packs]
        return self._step(samples, [example for _, example in visits])

    def validation(self) -> Iterator[Step]:
        """Every example that is held out, at one timestep of every bin, by batches."""
        yield from self._whole(self.mix.held_out)

    def compared(self) -> Mapping[str, Iterator[Step]]:
        """The same of what is compared; examples of one id have the same noise."""
        return {name: self._whole(examples) for name, examples in self.mix.compared.items()}

    def _whole(self, examples: Sequence[Example]) -> Iterator[Step]:
        places = [(number, bin) for number in range(len(examples)) for bin in range(TIMESTEP_BINS)]
        for start in range(0, len(places), self.config.batch_size):
            batch = [(worded(examples[number]), bin) for number, bin in places[start : start + self.config.batch_size]]
            packs = self.own_packs([measured(self.model, example) for example, _ in batch])
            own = [([self.look(*batch[place]) for place in members], counted) for members, counted in packs]
            yield self._step(own, [example for example, _ in batch])

    def draw(self, epoch: int, example: Example) -> Sample:
        """The example as this epoch sees it, its files read."""
        generator = generator_for(self.seed, epoch, example.id)
        return draw(self.model, opened(self.model, example), self.config, generator)

    def look(self, example: Example, bin: int) -> Sample:
        """The example as every validation sees it at a timestep, its files read."""
        return at_timestep(self.model, opened(self.model, example), self.config, self.seed, bin)

    def own_packs(self, lengths: Sequence[int]) -> list[tuple[list[int], bool]]:
        """Those of this process."""
        return own_packs(lengths, self.config.memory.pack_tokens, self.processes)

    def _step(self, own: Sequence[tuple[list[Sample], bool]], examples: Sequence[Example]) -> Step:
        return packed_step(self.model, own, examples, self.processes)


def own_packs(lengths: Sequence[int], budget: int | None, processes: Processes) -> list[tuple[list[int], bool]]:
    """This process's packs of samples of ``lengths``, the places of each, and whether a pack counts.

    All processes have the same number, since they gather weights and sum gradients together; where there are fewer
    samples than processes, a pack of another stands in that does not count.
    """
    packs = cut(lengths, budget, processes.count)
    own = packs[processes.rank :: processes.count]
    return [(pack or packs[0], bool(pack)) for pack in own]


def packed_step(
    model: UnifiedModel,
    own: Sequence[tuple[list[Sample], bool]],
    examples: Sequence[Example],
    processes: Processes,
    facts: Mapping[str, float] | None = None,
) -> Step:
    """The step of this process's ``own`` packs of the ``examples`` of all processes."""
    counts = [model.targets(s.segments, s.corruptions) for samples, counted in own if counted for s in samples]
    image_tokens, text_tokens = processes.total(torch.tensor(counts or [(0, 0)]).sum(dim=0)).tolist()
    sees = processes.count > 1 and any(s.kind == "seen" for example in examples for s in example.segments)
    packs = ((make_pack(model, samples, sees), counted) for samples, counted in own)
    return Step(packs, image_tokens, text_tokens, [example.id for example in examples], facts or {})
