"""Pretraining at a few steps: the command, what it leaves, and that several sittings are one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from srum import models
from srum.cli import app
from srum.models.base import Sampling
from train import pretrain, pretrain_autoencoder
from train.tasks import TASKS, WRONG_CAPTIONS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    pretrain.train_tokenizer(folder, samples=300)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_autoencoder, "BATCH", 2)


def start(tokenizer: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_the_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(pretrain, "pretrain", lambda folder, **options: calls.append((folder, options)))
    for options in ([], ["--seed", "4", "--minutes", "5", "--compile"]):
        result = CliRunner().invoke(app, ["pretrain", "--out", "w", *options])
        assert result.exit_code == 0, result.output
    assert calls == [
        (Path("w"), {"seed": 0, "minutes": math.inf, "compile_layers": False}),
        (Path("w"), {"seed": 4, "minutes": 5.0, "compile_layers": True}),
    ]


def test_sittings_end_where_one_run_ends(tokenizer: Path, tmp_path: Path, small: None) -> None:
    whole, parts = start(tokenizer, tmp_path / "whole"), start(tokenizer, tmp_path / "parts")
    phases = [replace(phase, steps=2 - number, batch=6) for number, phase in enumerate(pretrain.PHASES[:2])]
    pretrain.pretrain(whole, autoencoder_steps=1, phases=phases)
    for phase, step in ((0, 1), (0, 2), (1, 1)):
        pretrain.pretrain(parts, autoencoder_steps=1, phases=phases, minutes=0)
        state = torch.load(parts / "network_state.pt", weights_only=True)
        assert (state["phase"], state["step"]) == (phase, step)
    for name in ("ema.safetensors", "ae.safetensors"):
        expected, found = (load_file(folder / "model" / name) for folder in (whole, parts))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    model = models.load(parts / "model", "cpu")
    (generated,) = model.generate(["a red circle"], Sampling(size=(64, 64), timesteps=2), [0])
    assert generated.image.size == (64, 64) and model.latent_grid((64, 64)) == (8, 8)


def test_a_kill_while_the_autoencoders_state_is_written_leaves_the_state_before(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    pretrain_autoencoder.pretrain_autoencoder(tmp_path, pretrain.AUTOENCODER, steps=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", torn)
        pretrain_autoencoder.pretrain_autoencoder(tmp_path, pretrain.AUTOENCODER, steps=2)
    assert torch.load(tmp_path / "autoencoder_state.pt", weights_only=True)["step"] == 1


def test_the_tokenizer_reads_back_what_it_wrote(tokenizer: Path) -> None:
    from srum.models.bagel.checkpoint import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    assert len(loaded) <= pretrain.VOCABULARY
    rng = np.random.default_rng(1)
    texts = [part.text for task in TASKS for part in task.draw(rng) if part.text]
    assert all(loaded.decode(loaded.encode(text, add_special_tokens=False)) == text for text in texts)
    assert json.loads((tokenizer / "tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"


def test_the_learning_rate_rises_stays_and_falls() -> None:
    phase = pretrain.Phase("all of it", 1000, warmup=100, decay=400, peak_lr=2.0)
    rates = [pretrain.learning_rate(step, phase) for step in (0, 99, 500, 800, 999)]
    assert rates == pytest.approx([0.02, 2.0, 2.0, 1.0, 0.005])


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_has_a_target(task: Any) -> None:
    for seed in range(20):
        sample = task.draw(np.random.default_rng(seed))
        assert any(part.loss for part in sample)
        assert all((part.seen is not None) + (part.drawn is not None) + bool(part.text) == 1 for part in sample)


def test_the_model_card_states_the_recipe() -> None:
    card = (Path(__file__).parents[2] / "docs" / "model-card.md").read_text(encoding="utf-8")
    for phase in pretrain.PHASES:
        assert f"| {phase.name} | {phase.steps} of {phase.batch} |" in card
    assert f"{pretrain.AUTOENCODER_STEPS} steps of {pretrain_autoencoder.BATCH} images" in card
    assert f"{WRONG_CAPTIONS:.0%} of the captions" in card
