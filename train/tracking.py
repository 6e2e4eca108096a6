"""Trackers: what the files of rows say, and what people look at, shown while it comes in by TensorBoard and the like.

Every training, and the evaluation in the end, is a run of the tracker's own; those of one run have one group, its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, filter_trackers
from PIL.Image import Image

from srum.errors import TrainingError

PROJECT = "srum"


@dataclass(frozen=True)
class Subject:
    """What a tracker's run is about: its ``name`` within the ``group``, its config; its files go into ``folder``."""

    group: str
    name: str
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tracker:
    """A run of a tracker that has begun."""

    kind: str
    run: GeneralTracker

    def tell(self, name: str, row: Mapping[str, Any]) -> None:
        """The numbers of a row, which has a ``step``; ``name`` is that of its file."""
        self.run.log(numbers(dict(row), name), row["step"])

    def show(self, name: str, images: Mapping[str, Image], step: int) -> None:
        """Images by what is written below each."""
        SHOWS[self.kind](self.run.tracker, name, images, step)


def _by_tensorboard(writer: Any, name: str, images: Mapping[str, Image], step: int) -> None:
    for caption, image in images.items():
        writer.add_image(f"{name}/{caption}", np.asarray(image.convert("RGB")), step, dataformats="HWC")
    writer.flush()


def _by_wandb(run: Any, name: str, images: Mapping[str, Image], step: int) -> None:
    from wandb import Image as Shown

    run.log({name: [Shown(image, caption=caption) for caption, image in images.items()]}, step=step)


def _by_trackio(run: Any, name: str, images: Mapping[str, Image], step: int) -> None:
    from trackio import Image as Shown

    run.log({f"{name}/{caption}": Shown(image, caption=caption) for caption, image in images.items()}, step=step)


SHOWS: dict[str, Callable[[Any, str, Mapping[str, Image], int], None]] = {
    "tensorboard": _by_tensorboard,
    "wandb": _by_wandb,
    "trackio": _by_trackio,
}


@contextmanager
def tracked(kind: str, subject: Subject) -> Iterator[Tracker]:
    """Within the block a tracker runs. Raises TrainingError where it is not installed."""
    require_tracker(kind)
    make = LOGGER_TYPE_TO_CLASS[kind]
    if make.requires_logging_directory:
        run = make(subject.name, subject.folder)
    else:
        run = make(PROJECT, name=f"{subject.group} {subject.name}", group=subject.group, config=dict(subject.config))
    run.start()
    if kind == "tensorboard":
        text = yaml.safe_dump(dict(subject.config), sort_keys=False)
        run.tracker.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))
    try:
        yield Tracker(kind, run)
    finally:
        run.finish()


def require_tracker(kind: str) -> None:
    """Raises TrainingError where the tracker is not installed."""
    PartialState()  # accelerate asks for it
    if not filter_trackers([kind], Path()):
        raise TrainingError(f"train.tracker: {kind} is not installed (pip install {kind})")


def numbers(value: Any, name: str) -> dict[str, float]:
    """The numbers of a row by where they stand in it: ``{"metrics/parts/push": 0.1}``."""
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: number for part, own in inside for key, number in numbers(own, f"{name}/{part}").items()}
    return {name: value} if isinstance(value, int | float) else {}
