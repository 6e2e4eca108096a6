"""Packs: what is drawn for an example, how the examples of a step are cut into packs, and what a pack holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from srum.config import TrainConfig
from srum.errors import TrainingError
from srum.images import image_size, open_image
from srum.models.base import Corruption, Segment, TrainingForward, UnifiedModel
from srum.tensors import read_tensor, tensor_shape
from srum.train.examples import Example, Sampled, generator_for
from srum.train.metrics import TIMESTEP_BINS
from srum.train.objective import Draws

ONES = torch.ones(1)
UNSAMPLED = Sampled(torch.zeros(1), torch.zeros(1))


@dataclass(frozen=True)
class Sample:
    """An example with what was drawn for it: which segments are dropped, and a corruption for each noisy latent."""

    example: Example
    segments: Sequence[Segment]
    corruptions: Sequence[Corruption]


def worded(example: Example, *visit: int) -> Example:
    """The example with one of the texts of each segment that has several, drawn by (seed, epoch), the ``visit``;
    without it the first."""
    if not any(segment.texts for segment in example.segments):
        return example
    generator = generator_for(*visit, example.id, "text") if visit else None
    return replace(example, segments=[_worded(segment, generator) for segment in example.segments])


def _worded(segment: Segment, generator: torch.Generator | None) -> Segment:
    if not segment.texts:
        return segment
    place = 0 if generator is None else int(torch.randint(len(segment.texts), (), generator=generator))
    return replace(segment, text=segment.texts[place], texts=())


def measured(model: UnifiedModel, example: Example) -> int:
    """Tokens that the example takes in a pack; of its files the beginnings are read, which say how large they are."""
    return model.length([_blank(model, segment) for segment in example.segments])


def _blank(model: UnifiedModel, segment: Segment) -> Segment:
    if segment.file:
        return replace(segment, latent=torch.empty(tensor_shape(segment.file), device="meta"), file=None)
    if isinstance(segment.image, Path):
        image = Image.new("RGB", image_size(segment.image))
        return replace(segment, image=image if segment.side else model.resized(image))
    return segment


def opened(model: UnifiedModel, example: Example) -> Example:
    """The example with the images, latents and credits of its files. Raises ImageError and TensorError."""
    segments = [_opened(model, segment) for segment in example.segments]
    return replace(example, segments=segments, credit=tuple(example.credit))


def _opened(model: UnifiedModel, segment: Segment) -> Segment:
    if segment.file:
        return replace(segment, latent=read_tensor(segment.file), file=None)
    if isinstance(segment.image, Path):
        image = open_image(segment.image)
        return replace(segment, image=image if segment.side else model.resized(image))
    return segment


def draw(model: UnifiedModel, example: Example, config: TrainConfig, generator: torch.Generator) -> Sample:
    """The example with its dropout, timesteps and noise.

    Its droppable texts drop together, and so do its droppable images, which keep their position.
    """
    check_credit(model, example)
    drop_text = torch.rand((), generator=generator).item() < config.text_dropout
    images = any(segment.droppable and segment.kind != "text" for segment in example.segments)
    drop_images = images and torch.rand((), generator=generator).item() < config.image_dropout
    segments = [
        replace(segment, dropped=segment.droppable and (drop_text if segment.kind == "text" else drop_images))
        for segment in example.segments
    ]
    return Sample(example, segments, _corruptions(model, segments, config.timestep_shift, generator))


def at_timestep(model: UnifiedModel, example: Example, config: TrainConfig, seed: int, number: int) -> Sample:
    """The example whole, at the middle timestep of bin ``number``, its noise drawn by ``seed`` and its id alone."""
    check_credit(model, example)
    generator, t = generator_for(seed, "validation", example.id, number), (number + 0.5) / TIMESTEP_BINS
    corruptions = _corruptions(model, example.segments, config.timestep_shift, generator, t)
    return Sample(example, example.segments, corruptions)


def _corruptions(
    model: UnifiedModel, segments: Sequence[Segment], shift: float, generator: torch.Generator, t: float | None = None
) -> list[Corruption]:
    return [
        model.corrupt(segment.latent, generator, shift, t)
        for segment in segments
        if segment.kind == "noisy" and segment.state is None and segment.latent is not None
    ]


def check_credit(model: UnifiedModel, example: Example) -> None:
    """Raises TrainingError for credits that are not one per segment with a loss, or not one per token of theirs."""
    learned = [segment for segment in example.segments if segment.loss]
    if example.credit and len(example.credit) != len(learned):
        raise TrainingError(f"{example.id}: {len(example.credit)} credits for {len(learned)} segments with a loss")
    for segment, credit in zip(learned, example.credit, strict=False):
        if credit.numel() != 1 and credit.numel() != (tokens := _tokens(model, segment)):
            raise TrainingError(f"{example.id}: a credit of {tuple(credit.shape)} on {tokens} {segment.kind} tokens")


def _tokens(model: UnifiedModel, segment: Segment) -> int:
    """How many tokens of a segment with a loss have a credit."""
    if segment.kind == "text":
        return model.targets([segment], [])[1]
    return math.prod(segment.grid or ()) if segment.latent is None else len(model.tokens(segment.latent))


def cut(lengths: Sequence[int], budget: int | None, processes: int = 1) -> list[list[int]]:
    """The samples of a step, by ``lengths`` in tokens, in packs of at most ``budget``; the k-th is process k mod P's.

    As few packs as the longest-first rule finds, the same number for every process, nearly equal in tokens; samples
    keep their order within a pack. Packs are empty only where there are fewer samples than processes. Raises
    TrainingError for a sample longer than the budget.
    """
    budget = sum(lengths) if budget is None else budget
    if max(lengths) > budget:
        raise TrainingError(f"train.memory.pack_tokens: {budget} is less than the {max(lengths)} tokens of a sample")
    count = processes * math.ceil(sum(lengths) / (budget * processes))
    while True:
        packs: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            lightest = loads.index(min(loads))
            packs[lightest].append(index)
            loads[lightest] += lengths[index]
        if max(loads) <= budget:
            return [sorted(pack) for pack in packs]
        count += processes


@dataclass(frozen=True)
class Credits:
    """The credits of the segments with a loss of a pack, of one kind, end to end.

    Of segment s they begin at ``start[s]`` and stand ``stride[s]`` apart: 1, or 0 where one is for all of its tokens.
    ``sample[s]`` is the sample of the pack that it belongs to.
    """

    values: Tensor
    start: Tensor
    stride: Tensor
    sample: Tensor

    @classmethod
    def of(cls, credits: Sequence[Tensor], sample: Sequence[int], device: torch.device) -> Credits:
        sizes = torch.tensor([credit.numel() for credit in credits], dtype=torch.long)
        return cls(
            torch.cat([credit.flatten().float() for credit in credits] or [ONES]).to(device),
            (sizes.cumsum(0) - sizes).to(device),
            (sizes > 1).long().to(device),
            torch.tensor(sample, dtype=torch.long).to(device),
        )

    @classmethod
    def ones(cls, segments: int, device: torch.device) -> Credits:
        """One for all tokens of at most so many segments, of a pack that is one sample."""
        zeros = torch.zeros(segments, dtype=torch.long, device=device)
        return cls(ONES.to(device), zeros, zeros, zeros)

    def at(self, segment: Tensor, place: Tensor) -> Tensor:
        """The credits of tokens (N,) by their segment and their place in it."""
        return self.values[self.start[segment] + self.stride[segment] * place]


@dataclass(frozen=True)
class Pack:
    """Samples that run together, as the model ``packed`` them, and the credits of their tokens; how they were drawn,
    where a policy drew them (log-probability, precision)."""

    ids: list[str]
    packed: Any
    image: Credits
    text: Credits
    image_drawn: tuple[Credits, Credits] | None = None
    text_drawn: tuple[Credits, Credits] | None = None

    def image_credit(self, forward: TrainingForward) -> Tensor:
        """(N,) in the order of the image tokens that the model predicted."""
        return self.image.at(forward.image_segment, forward.cell)

    def text_credit(self, forward: TrainingForward) -> Tensor:
        """(M,) in the order of the text tokens that the model predicted."""
        return self.text.at(forward.text_segment, _places(forward))

    def image_draws(self, forward: TrainingForward) -> Draws | None:
        """The same of how the tokens were drawn."""
        if self.image_drawn is None:
            return None
        logprob, precision = (values.at(forward.image_segment, forward.cell) for values in self.image_drawn)
        return Draws(logprob, precision, forward.image_segment)

    def text_draws(self, forward: TrainingForward) -> Draws | None:
        """The same of text tokens."""
        if self.text_drawn is None:
            return None
        logprob, precision = (values.at(forward.text_segment, _places(forward)) for values in self.text_drawn)
        return Draws(logprob, precision, forward.text_segment)


def _places(forward: TrainingForward) -> Tensor:
    """Which token of its text each is, (M,)."""
    owner = forward.text_segment
    return torch.arange(len(owner), device=owner.device) - torch.searchsorted(owner, owner)


def make_pack(model: UnifiedModel, samples: Sequence[Sample], sees: bool = False) -> Pack:
    """Samples packed by the model, with their credits. ``sees``: as ``UnifiedModel.pack`` has it."""
    learned: dict[bool, list[tuple[int, Tensor, Sampled]]] = {True: [], False: []}  # by whether of a text
    for number, sample in enumerate(samples):
        segments = [segment for segment in sample.segments if segment.loss]
        credits = sample.example.credit or [ONES] * len(segments)
        drawn = sample.example.sampled or [UNSAMPLED] * len(segments)
        for segment, credit, how in zip(segments, credits, drawn, strict=True):
            if not segment.dropped:
                learned[segment.kind == "text"].append((number, credit, how))
    corruptions = [c for sample in samples for c in sample.corruptions]
    packed = model.pack([sample.segments for sample in samples], corruptions, **({"sees": True} if sees else {}))

    def laid_out(text: bool, values: Sequence[Tensor]) -> Credits:
        return Credits.of(values, [number for number, _, _ in learned[text]], model.device)

    def drawn_of(text: bool) -> tuple[Credits, Credits] | None:
        if not any(sample.example.sampled for sample in samples):
            return None
        hows = [how for _, _, how in learned[text]]
        return laid_out(text, [how.logprob for how in hows]), laid_out(text, [how.precision for how in hows])

    image, text = (laid_out(kind, [credit for _, credit, _ in learned[kind]]) for kind in (False, True))
    return Pack([sample.example.id for sample in samples], packed, image, text, drawn_of(False), drawn_of(True))
