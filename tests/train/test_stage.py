"""The stage that trains: what is refused before any arm trains, what stays of an arm that is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from srum import models
from srum.config import load_config
from srum.errors import TrainingError
from srum.loop import perform
from srum.records import RewardMap
from srum.run import Run
from srum.run_dir import read_records, write_records
from tests.fakes import FakeModel

SMALL = ["prompt_count=4", "candidates_per_prompt=2", "reward.on_failure=keep", "train.steps=2", "train.batch_size=4"]


def judged(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Run:
    """A round on the fake model, up to its reward maps."""
    monkeypatch.setattr(models, "load", FakeModel.load)
    run = Run(folder, load_config(None, [*SMALL, *overrides]))
    for name in ("rollout", "ground", "judge", "rasterize"):
        perform(run, name, 0)
    return run


def test_scores_without_a_difference_are_refused_before_any_arm_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = judged(tmp_path, monkeypatch)
    path = run.round(0) / "rewards.jsonl"
    write_records(path, [r.model_copy(update={"sample_score": 1.0}) for r in read_records(path, RewardMap)])
    with pytest.raises(TrainingError, match=r"nothing to prefer: the candidates of each of 4 prompts .*: 2 of 1"):
        perform(run, "train", 0)
    assert not (run.round(0) / "train").exists()


@pytest.mark.parametrize("kept", [False, True])
def test_checkpoints_of_a_trained_arm_go_unless_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    run = judged(tmp_path, monkeypatch, f"train.keep_checkpoints={kept}")
    perform(run, "train", 0)
    for arm in run.arms:
        folder = run.train_dir(arm, 0)
        assert (folder / "model").is_dir() and (folder / "checkpoints").exists() == kept
    perform(run, "train", 0)  # nothing is trained again
    assert all(len((run.train_dir(arm, 0) / "metrics.jsonl").read_text().splitlines()) == 2 for arm in run.arms)
