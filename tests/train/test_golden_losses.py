"""Ten losses of every method on a small BAGEL, as the trainer gave them when it knew one pack and one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srum.models.bagel import Bagel
from srum.train.metrics import keep_rows
from tests.train.ranks import CHECKPOINT, config_of, learn, records

RECORDED = {
    "sft": [2.678124, 2.412661, 2.343643, 2.311443, 2.209250, 2.225497, 2.177485, 2.178890, 2.137694, 2.107656],
    "srum": [1.643667, 0.992157, 1.218456, 1.221949, 1.218965, 1.148917, 1.075525, 1.163655, 1.284290, 1.008880],
    "region_nft": [8.927082, 8.172617, 8.201194, 8.460699, 7.895380, 8.406041, 8.487941, 8.470252, 8.224184, 8.057204],
}  # fmt: skip
VALIDATED = {  # by timestep, before the first step, on the candidates of two prompts that are held out
    "sft": [2.520956, 2.521697, 2.556831, 2.490493],
    "srum": [1.440670, 1.472482, 1.528992, 1.486552],
    "region_nft": [8.403185, 8.405656, 8.522770, 8.301642],
}


@pytest.mark.parametrize("method", RECORDED)
@pytest.mark.parametrize("pack_tokens", [None, 70])
def test_losses_are_those_recorded(tmp_path: Path, method: str, pack_tokens: int | None) -> None:
    model = Bagel.load(CHECKPOINT)
    values: dict[str, Any] = {"steps": 10, "batch_size": 4, "lr": 1e-3, "text_dropout": 0.3, "precision": "fp32"}
    values |= {"trainable": "all" if method == "srum" else "generation", "memory": {"pack_tokens": pack_tokens}}
    result = learn(model, records(model, 8), config_of(method=method, **values), tmp_path)
    assert result.losses == pytest.approx(RECORDED[method], rel=2e-4)


@pytest.mark.parametrize("method", VALIDATED)
def test_validation_draws_the_prompts_and_the_noise_that_it_drew(tmp_path: Path, method: str) -> None:
    model = Bagel.load(CHECKPOINT)
    values: dict[str, Any] = {"steps": 1, "batch_size": 4, "precision": "fp32", "validation": {"share": 0.4}}
    learn(model, records(model, 8), config_of(method=method, **values), tmp_path)
    first, _ = keep_rows(tmp_path / "validation.jsonl", 2)
    assert first["loss_by_timestep"] == pytest.approx(VALIDATED[method], rel=2e-4)
