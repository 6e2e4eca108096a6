"""A full disk: one line with the path, and no half of a file."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from srum import disk, models
from srum.config import EvalConfig, TrainConfig, load_config
from srum.disk import DiskFullError, require_room, writing
from srum.evaluation.accuracy import evaluate
from srum.exchange import chat
from srum.exchange.chat import Reply
from srum.loop import perform
from srum.run import Run, StageTimer
from srum.run_dir import atomic, write_text
from srum.stages.rollout import choose_prompts
from srum.train.checkpoint import room
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


def test_the_replies_that_a_client_keeps_are_written_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise FULL

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DiskFullError, match=r"ab/abc\.json"):
        chat._keep(tmp_path / "ab" / "abc.json", Reply("fine"))


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
    with pytest.raises(DiskFullError, match=r"6 images of 64x64 pixels take 4.92e-05 GB"):
        perform(run, "rollout", 0)
    assert not [*tmp_path.rglob("*.png")]
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(free=6 * 64 * 64 * 2))
    perform(run, "rollout", 0)
    require_room(tmp_path, 0, "nothing")


@pytest.mark.parametrize(
    ("steps", "every", "start", "expected"),
    [
        (1, 1, 0, 40 + 400),  # the last checkpoint, weights alone, and model/
        (4, 4, 0, 40 + 400),  # a step that is both a multiple and the last is the last
        (5, 4, 0, 120 + 40 + 400),
        (5, 2, 0, 120 + 40 + 400),  # of steps 2, 4, 5 the first has gone when model/ is written
        (100, 1, 0, 120 + 40 + 400),
        (100, 1, 50, 40 - 120 + 400),  # two are there, of which the one goes and the other is reckoned with
        (6, 2, 2, 120 + 40 - 120 + 400),  # step 2 is there; 4 and 6 come, 2 goes
    ],
)
def test_the_room_for_a_training_by_hand(steps: int, every: int, start: int, expected: int) -> None:
    """Ten numbers of float32 with AdamW's two averages, published among a hundred."""
    config = TrainConfig(steps=steps, checkpoint_every=every)
    assert room(40, 80, 400, config, start) == expected


@pytest.mark.parametrize(
    ("steps", "start", "expected"),
    [(2, 0, 160), (3, 0, 280), (4, 0, 360), (9, 2, 120), (4, 3, 40)],
)
def test_where_nothing_is_published_the_fullest_moment_is_a_checkpoint(steps: int, start: int, expected: int) -> None:
    """One per step; two stay and one is being written, 120 bytes each and 40 the last, beside those that are there."""
    assert room(40, 80, 0, TrainConfig(steps=steps, checkpoint_every=1), start) == expected


def test_a_training_that_will_not_fit_is_refused_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four bytes for each number that is trained, and for each that is published; in one step nothing more is kept."""
    run = prepared(tmp_path, monkeypatch, "train.steps=1")
    model = FakeModel()
    needed = 4 * sum(p.numel() for _, p in model.generation_parameters())
    needed += 4 * sum(p.numel() for p in model.network.parameters())
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(free=needed - 1))
    with pytest.raises(DiskFullError, match="the weights and checkpoints of this training take"):
        perform(run, "train", 0)
    assert not [*tmp_path.rglob("metrics.jsonl")] and not [*tmp_path.rglob("step-*")]
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(free=needed))
    perform(run, "train", 0)


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Run:
    """A round of SFT on the fake model, up to its training."""
    monkeypatch.setattr(models, "load", FakeModel.load)
    small = ["method=sft", "compare=[]", "prompt_count=2", "candidates_per_prompt=2", "train.batch_size=2"]
    run = Run(folder, load_config(None, [*small, *overrides]))
    for name in ("rollout", "ground", "judge", "rasterize"):
        perform(run, name, 0)
    return run


def test_an_evaluation_that_will_not_fit_is_refused_before_its_first_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three images of 64x64 pixels, a byte each; two of them are there."""
    prompts = choose_prompts("development", 3, 0)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(free=3 * 64 * 64 - 1))
    with pytest.raises(DiskFullError, match=r"3 images of 64x64 pixels take 1\.23e-05 GB"):
        evaluate(FakeModel(), prompts, EvalConfig(), tmp_path, seed=0)
    (tmp_path / "images").mkdir()
    for prompt in prompts[:2]:
        (tmp_path / "images" / f"{prompt.id}.png").touch()
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(free=64 * 64))
    assert evaluate(FakeModel(), prompts, EvalConfig(), tmp_path, seed=0).overall.n == 3
