"""R3 with LoRA in two processes: as in one, and killed and resumed as if it had not been."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from srum.train.metrics import keep_rows
from tests.launch import launch
from tests.train.policy_ranks import run, work


def test_two_processes_draw_and_learn_as_one(tmp_path: Path) -> None:
    launch(work, tmp_path)
    run(tmp_path / "one")
    whole, resumed, one = (
        load_file(tmp_path / name / "model" / "ema.safetensors") for name in ("whole", "resumed", "one")
    )
    for name in one:
        assert torch.equal(whole[name], resumed[name]), name
        torch.testing.assert_close(whole[name], one[name], rtol=1e-4, atol=1e-5)
    rows = keep_rows(tmp_path / "whole" / "metrics.jsonl", 4)
    assert [row["text_log_ratio"] < 1e-4 for row in rows] == [True] * 4
    assert "stops" in rows[1] and "stops" in rows[3]
