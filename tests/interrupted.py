"""What a run is held against: itself killed and resumed, and by two processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srum.train.trainer import Trainer
from tests.test_loop import files_of


@contextmanager
def killed_in_training(monkeypatch: pytest.MonkeyPatch, last: int = 2) -> Iterator[None]:
    """Within, every training is killed before its step ``last``."""
    step = Trainer.step

    def killed(self: Trainer, number: int) -> dict[str, object]:
        if number == last:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            yield


def assert_two_did_what_one_did(one: Path, two: Path, arms: Sequence[str], weights: str = "model.safetensors") -> None:
    """The same files, byte for byte before training; weights up to the order in which gradients are added."""
    ours, theirs = files_of(one), files_of(two)
    kept = [name for name in ours if "checkpoints" not in name and name != "command.txt"]
    assert set(kept) <= theirs.keys()
    before = [name for name in kept if "train/" not in name and name.startswith("round-000")]
    assert before and [name for name in before if ours[name] != theirs[name]] == []
    for arm in arms:
        a, b = (load_file(run / "round-000" / "train" / arm / "model" / weights) for run in (one, two))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-6)
