"""Trackers: what the files of rows say, shown while it comes in by TensorBoard and the like (accelerate's trackers)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

from srum.errors import TrainingError


@contextmanager
def tracked(kind: str, folder: Path) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Within the block a tracker runs, and is told of a row by what is yielded: the name of its file, and the row.

    Its own files, where it has any, go into ``folder``. Raises TrainingError where it is not installed.
    """
    require_tracker(kind)
    make = LOGGER_TYPE_TO_CLASS[kind]
    tracker = make("srum", folder) if make.requires_logging_directory else make("srum")
    tracker.start()
    try:
        yield lambda name, row: tracker.log(numbers(row, name), row["step"])
    finally:
        tracker.finish()


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
