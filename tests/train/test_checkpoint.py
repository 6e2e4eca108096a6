"""Checkpoints that something damaged: training goes on from the one before, or says what to delete."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter
from torch.optim import AdamW

from srum.processes import Processes
from srum.train.checkpoint import CheckpointMismatch, Checkpoints, list_checkpoints

Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES: dict[str, Damage] = {
    "no state": lambda folder: (folder / "state.json").unlink(),
    "empty state": lambda folder: (folder / "state.json").write_text(""),
    "cut state": lambda folder: cut(folder / "state.json"),
    "state without its facts": lambda folder: (folder / "state.json").write_text("{}"),
    "no metadata": lambda folder: (folder / ".metadata").unlink(),
    "empty metadata": lambda folder: (folder / ".metadata").write_bytes(b""),
    "cut metadata": lambda folder: cut(folder / ".metadata"),
    "no tensors": lambda folder: (folder / "__0_0.distcp").unlink(),
    "empty tensors": lambda folder: (folder / "__0_0.distcp").write_bytes(b""),
    "cut tensors": lambda folder: cut(folder / "__0_0.distcp"),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


def parameters(value: float) -> dict[str, Parameter]:
    return {"w": Parameter(torch.full((5, 3), value))}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """Of the steps 1 and 2, whose weights are 1 and 2."""
    checkpoints = Checkpoints(tmp_path, {"config": "x"}, Processes())
    for step in (1, 2):
        checkpoints.save(step, {"weights": dict(parameters(float(step))), "optimizer": {}}, finished=False)
    return checkpoints


def resumed(checkpoints: Checkpoints) -> tuple[int, float]:
    own = parameters(0.0)
    step = checkpoints.resume({"weights": {n: p.detach() for n, p in own.items()}}, own, AdamW(own.values()))
    return step, own["w"].detach().mean().item()


def test_the_newest_whole_one_is_taken(checkpoints: Checkpoints) -> None:
    assert resumed(checkpoints) == (2, 2.0)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_one_goes_with_a_warning(checkpoints: Checkpoints, damage: Damage) -> None:
    older, newest = list_checkpoints(checkpoints.folder)
    damage(newest)
    with pytest.warns(UserWarning, match=rf"{newest.name} is damaged \(.+\) and removed; .* from {older.name}"):
        assert resumed(checkpoints) == (1, 1.0)
    assert list_checkpoints(checkpoints.folder) == [older]
    checkpoints.save(2, {"weights": dict(parameters(2.0)), "optimizer": {}}, finished=False)
    assert resumed(checkpoints) == (2, 2.0)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_where_all_are_damaged_it_says_what_to_delete(checkpoints: Checkpoints, damage: Damage) -> None:
    for path in list_checkpoints(checkpoints.folder):
        damage(path)
    with pytest.raises(CheckpointMismatch, match=f"and so is every other; delete {checkpoints.folder} to train anew"):
        resumed(checkpoints)
    assert len(list_checkpoints(checkpoints.folder)) == 2
