"""Two processes that share a network do what one does: steps, interruptions, and going on with another number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from srum.images import open_image
from srum.train.metrics import keep_rows
from tests.launch import launch
from tests.train.ranks import BFLOAT16, CHECKPOINT, CONFIGS, interrupted, run, work


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes trained, gloo between them."""
    folder = tmp_path_factory.mktemp("ranks")
    with interrupted(at=3):
        run(folder / "from one", "generation")
    launch(work, folder)
    return folder


def same_training(ours: Path, one: Path) -> None:
    """Equal up to the order in which gradients were added."""
    a, b = (load_file(path / "model" / "ema.safetensors") for path in (ours, one))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-6)
    for x, y in zip(keep_rows(ours / "metrics.jsonl", 4), keep_rows(one / "metrics.jsonl", 4), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["parts"] == pytest.approx(y["parts"], rel=1e-4, abs=1e-6)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)
        assert none_is_nan(x["loss_by_timestep"]) == pytest.approx(
            none_is_nan(y["loss_by_timestep"]), rel=1e-4, nan_ok=True
        )


def none_is_nan(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_train_as_one(folder: Path, tmp_path: Path, name: str) -> None:
    """Each with a share of the network, or with the whole of it."""
    run(tmp_path, name, memory={})
    same_training(folder / name, tmp_path)
    same_training(folder / f"whole {name}", tmp_path)


def test_no_process_reads_or_holds_the_whole_network(folder: Path) -> None:
    """Every byte is read by one of them, of no tensor more than a half, and stays with it."""
    weights = load_file(CHECKPOINT / "ema.safetensors")
    every, largest = sum(x.nbytes for x in weights.values()), max(x.nbytes for x in weights.values())
    parts = [json.loads((folder / f"parts-{rank}.json").read_text()) for rank in range(2)]
    assert sum(sum(part["read"]) for part in parts) == every
    for part in parts:
        assert max(part["read"]) <= largest / 2
        assert every * 0.49 < sum(part["held"]) < every * 0.51


def test_two_processes_sample_what_one_does(folder: Path, tmp_path: Path) -> None:
    run(tmp_path, "lora", memory={})
    files = sorted(file.relative_to(tmp_path) for file in tmp_path.glob("samples/*/*.png"))
    assert [str(file) for file in files] == [
        f"samples/step-0000000{step}/{name}.png" for step in (0, 2, 4) for name in ("c0", "c2")
    ]
    for file in files:
        ours, one = (np.asarray(open_image(path / file), dtype=int) for path in (folder / "lora", tmp_path))
        assert np.abs(ours - one).max() <= 1


def test_two_processes_share_a_bfloat16_base(folder: Path, tmp_path: Path) -> None:
    """Which is read as such beside LoRA's float32 updates; equal up to a rounding of bfloat16."""
    run(tmp_path, "bfloat16", **BFLOAT16)
    a, b = (load_file(path / "model" / "ema.safetensors") for path in (folder / "bfloat16", tmp_path))
    assert {tensor.dtype for tensor in a.values()} == {torch.bfloat16}
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2**-7, atol=1e-4)
    ours, one = (keep_rows(path / "metrics.jsonl", 2) for path in (folder / "bfloat16", tmp_path))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in one], rel=1e-2)


def test_two_processes_resume_bit_for_bit(folder: Path) -> None:
    for file in ("model/ema.safetensors", "metrics.jsonl"):
        assert (folder / "again" / file).read_bytes() == (folder / "generation" / file).read_bytes()


def test_from_two_processes_to_one_and_from_one_to_two(folder: Path) -> None:
    for name in ("to one", "whole to one"):
        assert run(folder / name, "generation").start == 2
    for name in ("to one", "whole to one", "from one"):
        same_training(folder / name, folder / "generation")


def test_what_one_process_finished_two_do_not_repeat_and_back(folder: Path) -> None:
    result = run(folder / "generation", "generation")
    assert (result.start, len(result.losses)) == (4, 4)
