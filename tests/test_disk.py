"""A full disk: one line with the path, and no half of a file."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from srum import disk, models
from srum.config import load_config
from srum.disk import DiskFullError, require_room, writing
from srum.loop import perform
from srum.run import Run
from srum.run_dir import StageTimer, atomic, write_text
from tests.fakes import FakeModel


class Usage(NamedTuple):
    free: int


FULL = OSError(errno.ENOSPC, "No space left on device")
ERRORS = [
    FULL,
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    CheckpointException("save", {0: (FULL, None)}),  # type: ignore[dict-item]
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whoever_says_it_the_path_is_named(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(DiskFullError, match=f"disk for {tmp_path}.*the same command goes on"), writing(tmp_path):
        raise error


def test_other_errors_stay(tmp_path: Path) -> None:
    for error in (OSError(errno.EACCES, "no"), RuntimeError("failed writing file"), KeyError("x")):
        with pytest.raises(type(error)), writing(tmp_path):
            raise error


def test_torch_is_believed_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(free=0))
    with pytest.raises(DiskFullError), writing(tmp_path / "not" / "there"):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


def test_half_a_file_goes_and_the_file_before_it_stays(tmp_path: Path) -> None:
    write_text(tmp_path / "x.txt", "before")
    with pytest.raises(DiskFullError, match=r"x\.txt"), atomic(tmp_path / "x.txt") as partial:
        partial.write_text("half")
        raise FULL
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    assert (tmp_path / "x.txt").read_text() == "before"


def test_the_times_of_a_stage_do_not_hide_it(tmp_path: Path) -> None:
    timed = StageTimer(tmp_path / "timings.json").stage("rollout")
    with pytest.raises(DiskFullError, match="images"), timed, writing(tmp_path / "images"):
        raise FULL
    assert not (tmp_path / "timings.json").exists()


def test_what_will_not_fit_is_refused_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six candidates of 64x64 pixels, two bytes a pixel."""
    monkeypatch.setattr(models, "load", FakeModel.load)
    run = Run(tmp_path, load_config(None, ["prompt_count=3", "candidates_per_prompt=2"]))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(free=6 * 64 * 64 * 2 - 1))
    with pytest.raises(DiskFullError, match=r"6 candidates of 64x64 pixels take 4.92e-05 GB"):
        perform(run, "rollout", 0)
    assert not [*tmp_path.rglob("*.png")]
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(free=6 * 64 * 64 * 2))
    perform(run, "rollout", 0)
    require_room(tmp_path, 0, "nothing")
