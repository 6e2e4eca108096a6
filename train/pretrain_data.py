"""The data of pretraining: steps of samples, laid out by worker processes and completed on the device.

What takes Python happens in the workers: drawing samples, rendering, tokenising, laying out rows. A step leaves them as
bytes through a pipe, since each of its tensors would take a file descriptor and shared memory. Images travel as uint8;
the autoencoder and all noise are the device's part. Step k of a phase depends on the seed, the phase and k alone.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from srum import flow
from srum.config import TrainConfig
from srum.errors import TrainingError
from srum.models.bagel.autoencoder import decode_latents, encode_mean
from srum.models.bagel.config import BagelConfig
from srum.models.bagel.model import Bagel
from srum.models.bagel.sequence import Batch, ImageMarkers, Split, lay_out
from srum.models.base import UnifiedModel
from srum.processes import Processes
from srum.train.feed import Step as TrainerStep
from srum.train.packs import Credits
from srum.train.packs import Pack as TrainerPack
from srum.train.phases import IMAGE_DROPOUT, LATENT_NOISE, RECONSTRUCTED, TEXT_DROPOUT, Phase
from srum.train.tasks import TASKS, Drawing, Part, Sample

BOS, EOS, IMAGE_START, IMAGE_END = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"
_EMPTY = torch.zeros(1, 0)  # in place of an image's numbers
PREFETCHED = 3  # steps per worker
COLUMNS, IMAGES = 64, 128  # multiples of rows and of what the autoencoder takes: few shapes, each met again soon


@dataclass(frozen=True)
class Pack:
    """Rows laid out, whose ``batch`` has no patches, latents and targets yet.

    ``seen`` (N,) and ``latents`` (K,): the image of the step that each seen and each latent segment holds; ``t`` (K,):
    the timestep of a target, -1 for a latent that is given.
    """

    batch: Batch
    seen: Tensor
    latents: Tensor
    t: Tensor


@dataclass(frozen=True)
class Step:
    """The samples of one optimiser step, laid out.

    ``images`` (M, 64, 64, 3) uint8; ``level`` (M,): standard deviation of the noise on the latent of an image where it
    is given and seen through the autoencoder, -1 where it is given as it is; ``seed`` of all noise.
    """

    images: Tensor
    level: Tensor
    seed: int
    packs: tuple[Pack, ...]


# --- in the workers


@dataclass(frozen=True, eq=False)
class Steps(Dataset[bytes]):
    """The steps of phase ``number``, pickled. ``folder`` holds the tokenizer; rows are of ``multiple`` columns."""

    folder: Path
    config: BagelConfig
    phase: Phase
    number: int
    drawings: Sequence[Drawing] = ()
    seed: int = 0
    multiple: int = 1

    def __len__(self) -> int:
        return self.phase.steps

    def __getitem__(self, index: int) -> bytes:
        return pickled(self.step(index))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def token(self, name: str) -> int:
        number = self.tokenizer.token_to_id(name)
        assert number is not None, name
        return int(number)

    def step(self, index: int) -> Step:
        """Step ``index`` of the phase."""
        rng = np.random.default_rng((self.seed, self.number + 1, index))
        samples = [with_dropout(sample, rng) for sample in draw_samples(rng, self.phase, self.drawings)]
        images = {id(part.image): part.image for sample in samples for part in sample if part.image is not None}
        places = {key: place for place, key in enumerate(images)}
        again = rng.random(len(images)) < RECONSTRUCTED
        level = np.where(again, LATENT_NOISE * rng.random(len(images)), -1.0)
        seed = int(rng.integers(1 << 62))
        packs = self._packs(samples, places, torch.Generator().manual_seed(seed))
        return Step(torch.from_numpy(np.stack(list(images.values()))), torch.from_numpy(level).float(), seed, packs)

    def _packs(self, samples: list[Sample], places: dict[int, int], generator: torch.Generator) -> tuple[Pack, ...]:
        texts = [part.text for sample in samples for part in sample if part.text]
        ids = iter(encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False))
        rows = [[(part, self._split(part, ids, generator)) for part in sample] for sample in samples]
        rows.sort(key=lambda row: sum(split.length for _, split in row))
        size = -(-len(rows) // self.phase.packs)
        return tuple(self._pack(rows[first : first + size], places) for first in range(0, len(rows), size))

    def _split(self, part: Part, ids: Iterator[list[int]], generator: torch.Generator) -> Split:
        if part.text:
            text = (self.token(BOS), *next(ids), self.token(EOS))
            return Split(kind="text", ids=text, loss=part.loss, branch=part.branch)
        if part.seen is not None:
            side = self.config.vit_max_num_patch_per_side
            return Split(kind="seen", patches=_EMPTY, grid=(side, side), dropped=part.dropped)
        side = self.config.max_latent_size
        if part.clean is not None:
            return Split(kind="clean", tokens=_EMPTY, grid=(side, side), dropped=part.dropped)
        t = flow.sample_timesteps(1, self.phase.timestep_shift, generator).item()
        return Split(kind="noisy", tokens=_EMPTY, grid=(side, side), t=t, loss=part.loss)

    def _pack(self, rows: list[list[tuple[Part, Split]]], places: dict[int, int]) -> Pack:
        batch = lay_out(
            [[split for _, split in row] for row in rows],
            ImageMarkers(self.token(IMAGE_START), self.token(IMAGE_END)),
            patch_side=self.config.vit_max_num_patch_per_side,
            latent_side=self.config.max_latent_size,
            dims=(0, 0),
            multiple=self.multiple,
        )
        shown = [(part, split) for row in rows for part, split in row if part.image is not None and not part.dropped]
        seen = [places[id(part.image)] for part, split in shown if split.kind == "seen"]
        latents = [places[id(part.image)] for part, split in shown if split.kind != "seen"]
        t = [split.t if split.kind == "noisy" else -1.0 for _, split in shown if split.kind != "seen"]
        return Pack(batch, torch.tensor(seen).long(), torch.tensor(latents).long(), torch.tensor(t))


def draw_samples(rng: np.random.Generator, phase: Phase, drawings: Sequence[Drawing] = ()) -> Iterator[Sample]:
    """``phase.batch`` samples of its tasks; those about the model's own drawings are about one of ``drawings``."""
    weights = np.array([task.weight if phase.weights is None else phase.weights.get(task.name, 0.0) for task in TASKS])
    for choice in rng.choice(len(TASKS), size=phase.batch, p=weights / weights.sum()):
        task = TASKS[choice]
        if task.draw is not None:
            yield task.draw(rng)
        elif task.own is not None:
            yield task.own(rng, drawings[int(rng.integers(len(drawings)))])


def with_dropout(sample: Sample, rng: np.random.Generator) -> Sample:
    """The sample, at times without its droppable texts, or with its droppable images marked as dropped."""
    no_text, no_image = rng.random() < TEXT_DROPOUT, rng.random() < IMAGE_DROPOUT
    kept = [part for part in sample if not (no_text and part.droppable and part.text)]
    return [replace(p, dropped=True) if no_image and p.droppable and p.image is not None else p for p in kept]


class _Pickler(pickle.Pickler):
    """Tensors by way of numpy, whose arrays pickle as plain bytes."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def pickled(value: Any) -> bytes:
    """The bytes that ``pickle.loads`` makes the value of."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def loaded(steps: Dataset[bytes], first: int, workers: int) -> Iterator[Any]:
    """The steps from ``first`` on, in order; the number of worker processes changes none of them."""
    if workers:
        options: dict[str, Any] = {"multiprocessing_context": "fork", "prefetch_factor": PREFETCHED}
        options["pin_memory"] = torch.cuda.is_available()  # for its thread, which reads the pipes
    else:
        options = {}
    indices = range(first, len(steps))  # type: ignore[arg-type]
    batches = DataLoader(
        steps, None, sampler=indices, num_workers=workers, collate_fn=bytes, worker_init_fn=_alone, **options
    )
    for data in batches:
        yield pickle.loads(data)


def _alone(worker: int) -> None:
    """No threads within a worker: there are as many workers as cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


# --- on the device


@dataclass(frozen=True)
class Pretraining:
    """The ``steps`` of a phase, made by so many ``workers``; the source of its feed (``train.feed``)."""

    steps: Steps
    workers: int = 0

    def digest(self) -> str:
        """Of the phase and the drawings."""
        total = hashlib.sha256(repr((self.steps.phase, self.steps.number)).encode())
        for drawing in self.steps.drawings:
            total.update(drawing.image.tobytes())
        return total.hexdigest()

    def feed(self, model: UnifiedModel, config: TrainConfig, seed: int, processes: Processes) -> PretrainingFeed:
        """The steps; raises TrainingError for several processes, of which each would have to make them all."""
        assert isinstance(model, Bagel)
        if processes.count > 1:
            raise TrainingError("srum pretrain works in one process; --workers are what make its samples")
        multiple = 1 if model.device.type == "cpu" else COLUMNS
        return PretrainingFeed(replace(self.steps, seed=seed, multiple=multiple), model, self.workers)


class PretrainingFeed:
    """The steps of a phase, in order, completed on the device of the model."""

    draws = False

    def __init__(self, steps: Steps, model: Bagel, workers: int) -> None:
        self.steps, self.model, self.workers = steps, model, workers
        self._at, self._loaded = -1, iter(())

    def step(self, number: int) -> TrainerStep:
        """Step ``number`` of the phase."""
        if number != self._at:
            self._loaded = loaded(self.steps, number, self.workers)
        self._at = number + 1
        step: Step = next(self._loaded)
        name = f"{self.steps.phase.name}/{number}"
        packs = [TrainerPack([name], batch, *ones) for batch, *ones in completed(step, self.model)]
        images, texts = (sum(len(x) for x in own) for own in zip(*map(_predicted, step.packs), strict=True))
        return TrainerStep([(pack, True) for pack in packs], images, texts, ids=[name])

    def compared(self) -> Mapping[str, Iterator[TrainerStep]]:
        """Nothing."""
        return {}

    def validation(self) -> Iterator[TrainerStep]:
        """None."""
        return iter(())


def completed(step: Step, model: Bagel) -> list[tuple[Batch, Credits, Credits]]:
    """The packs of a step with patches, latents and the velocities to learn, and credits of one for all of them."""
    generator = torch.Generator(model.device).manual_seed(step.seed)
    again = torch.nonzero(step.level >= 0)[:, 0].to(model.device)  # found by the host, which need not wait
    step = to_device(step, model.device)
    pixels = step.images.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        latents = padded(pixels, lambda x: encode_mean(model.autoencoder, x)).float()
        given = latents + step.level.clamp(min=0)[:, None, None, None] * _normal(latents.shape, generator)
        if len(again):
            pixels[again] = padded(given[again], lambda x: decode_latents(model.autoencoder, x)).float().clamp(-1, 1)
    patches = patched(pixels, model.config.vit.patch_size)
    clean, given = (patched(x, model.config.latent_patch_size) for x in (latents, given))
    return [_completed(pack, patches, clean, given, generator) for pack in step.packs]


def _completed(
    pack: Pack, patches: Tensor, clean: Tensor, given: Tensor, generator: torch.Generator
) -> tuple[Batch, Credits, Credits]:
    t = pack.t[:, None, None]
    origin = torch.where(t < 0, given[pack.latents], clean[pack.latents])
    noise = _normal(origin.shape, generator)
    tokens = flow.interpolate(origin, noise, t.clamp(min=0)).flatten(0, 1)
    targets = flow.velocity_target(origin, noise).flatten(0, 1)[pack.batch.loss_tokens]
    batch = replace(pack.batch, patches=patches[pack.seen], latents=tokens, targets=targets)
    images, texts = (Credits.ones(len(x), x.device) for x in _predicted(pack))
    return batch, images, texts


def _predicted(pack: Pack) -> tuple[Tensor, Tensor]:
    """Something of every image token and every text token that is predicted."""
    return pack.batch.cell, pack.batch.labels


def padded(x: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``work`` makes of (N, ...), which it is given filled up with zeros where a device minds new shapes."""
    if x.device.type == "cpu":
        return work(x)
    return work(torch.cat([x, x.new_zeros(-len(x) % IMAGES, *x.shape[1:])]))[: len(x)]


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def patched(x: Tensor, side: int) -> Tensor:
    """(N, C, h side, w side) to (N, h w, side side C): patches row-major, channel fastest."""
    n, channels, height, width = x.shape
    x = x.reshape(n, channels, height // side, side, width // side, side)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, side * side * channels)


def to_device(value: Any, device: torch.device) -> Any:
    """A value with all tensors of its dataclasses and tuples on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if is_dataclass(value):
        changed = {field.name: to_device(getattr(value, field.name), device) for field in fields(value)}
        return type(value)(**changed)  # type: ignore[misc]
    if isinstance(value, tuple):
        parts = [to_device(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
