"""Trackers beside TensorBoard (tests/train/test_scale.py), offline, where they are installed; and a run's own runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from srum.train.tracking import Subject, tracked
from tests.fakes import run_on_fakes


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_other_trackers_are_told_and_shown_offline(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainings: each has its pictures and its name, and the group is that of the run."""
    pytest.importorskip(kind)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for arm in ("sft", "srum"):
        subject = Subject("mine", f"round-000-{arm}", tmp_path / "tracker", {"train": {"lr": 0.5}})
        with tracked(kind, subject) as tracker:
            tracker.show("samples", {"train-0000-1": Image.new("RGB", (8, 8), "red")}, 0)
            tracker.tell("metrics", {"step": 1, "loss": 0.5})
    pictures = list(tmp_path.rglob("*.png"))
    assert len(pictures) == 2
    assert {Image.open(picture).convert("RGB").getpixel((3, 3)) for picture in pictures} == {(255, 0, 0)}
    stored = b"".join(path.read_bytes() for suffix in ("*.wandb", "*.db*") for path in tmp_path.rglob(suffix))
    assert all(word in stored for word in (b"mine", b"round-000-sft", b"round-000-srum"))


def test_every_training_of_a_run_and_its_evaluation_have_a_run_of_the_tracker(tmp_path: Path) -> None:
    """Reward maps with each training, samples, accuracies and pairs in the end; all below one folder."""
    sets = ["rounds=1", "train.tracker=tensorboard", "train.samples.count=1", "compare=[sft]"]
    folder = run_on_fakes(tmp_path / "mine", *sets) / "tracker"
    names = ["evaluation", "round-000-region_nft", "round-000-sft"]
    assert sorted(path.name for path in folder.iterdir()) == names
    events = {name: EventAccumulator(str(folder / name), size_guidance={"images": 0}) for name in names}
    for one in events.values():
        one.Reload()
    for name in names[1:]:
        tags = events[name].Tags()
        kinds = {tag.partition("/")[0] for tag in tags["images"]}
        assert kinds == {"reward maps", "samples"} and "metrics/loss" in tags["scalars"]
    tags = events["evaluation"].Tags()
    told = {"step", "base", "sft", "region_nft"}
    assert len(tags["images"]) == 12 and set(tags["scalars"]) == {f"accuracy/{name}" for name in told}
