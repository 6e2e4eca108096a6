"""Pretraining at a few steps: the command, what it leaves, and that several sittings are one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from srum import models
from srum.cli import app
from srum.drawing import draw_prompts
from srum.flow import FlowNoise
from srum.models.bagel.autoencoder import build_autoencoder, encode_mean, official_state
from srum.models.bagel.model import Bagel
from srum.models.base import Sampling, Segment
from srum.run_dir import RunError
from srum.train import phases as schedule
from srum.train import pretrain, pretrain_autoencoder
from srum.train.muon import StackedMuon
from srum.train.phases import PHASES, scaled
from srum.train.pretrain_data import Steps, completed, loaded, pickled, with_dropout
from srum.train.tasks import TASKS, WRONG_CAPTIONS, WRONG_REPLIES, Part, Sample
from srum.train.trainer import Trainer

TINY = [replace(phase, steps=2, warmup=1, batch=8, own=2 if phase.own else 0) for phase in PHASES]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    pretrain.train_tokenizer(folder, samples=1000)
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
    given = ["--seed", "4", "--compile", "--device", "cuda", "--workers", "3", "--scale", "0.5"]
    for options in ([], given):
        result = CliRunner().invoke(app, ["pretrain", "--out", "w", *options])
        assert result.exit_code == 0, result.output
    plain = {"seed": 0, "compile_layers": False, "device": "cpu", "workers": None, "scale": 1.0}
    other = {"seed": 4, "compile_layers": True, "device": "cuda", "workers": 3, "scale": 0.5}
    assert calls == [(Path("w"), plain), (Path("w"), other)]


def test_sittings_end_where_one_run_ends(
    tokenizer: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in every phase, each time two steps further; the steps since the last checkpoint are taken again."""
    monkeypatch.setattr(schedule, "CHECKPOINT_EVERY", 1)
    whole, parts = start(tokenizer, tmp_path / "whole"), start(tokenizer, tmp_path / "parts")
    pretrain.pretrain(whole, autoencoder_steps=1, phases=TINY)
    step = Trainer.step

    def killed(trainer: Trainer, number: int) -> dict[str, Any]:
        if number == 1 and trainer.feed.steps.phase.name not in kills:  # type: ignore[attr-defined]
            kills.append(trainer.feed.steps.phase.name)  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return step(trainer, number)

    kills: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        for _ in TINY:
            with pytest.raises(KeyboardInterrupt):
                pretrain.pretrain(parts, autoencoder_steps=1, phases=TINY)
        pretrain.pretrain(parts, autoencoder_steps=1, phases=TINY)
    for other in ({"seed": 1}, {"scale": 0.5}):
        with pytest.raises(RunError, match="holds work of other settings"):
            pretrain.pretrain(parts, autoencoder_steps=1, phases=TINY, **other)  # type: ignore[arg-type]
    assert kills == [phase.name for phase in TINY]
    for name in ("ema.safetensors", "ae.safetensors"):
        expected, found = (load_file(folder / "model" / name) for folder in (whole, parts))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    model = models.load(parts / "model", "cpu")
    (generated,) = draw_prompts(model, ["a red circle"], Sampling(size=(64, 64), timesteps=2), [0])
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
    from srum.models.checkpoints import load_tokenizer

    read = load_tokenizer(tokenizer)
    assert len(read) <= pretrain.VOCABULARY
    texts = pickle.loads(pretrain.Texts(1, 1)[0])
    assert all(read.decode(read.encode(text, add_special_tokens=False)) == text for text in texts)
    assert json.loads((tokenizer / "tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"


def test_a_scale_cuts_all_phases_alike() -> None:
    half = scaled(PHASES, 0.5)
    assert [phase.steps for phase in half] == [round(phase.steps / 2) for phase in PHASES]
    assert all(phase.steps == 1 and not phase.warmup for phase in scaled(PHASES, 1e-9))
    assert scaled(PHASES, 1.0) == PHASES
    with pytest.raises(ValueError, match="scale is 0"):
        scaled(PHASES, 0)


def test_every_weight_of_a_phase_is_that_of_a_task_and_none_is_left_out_of_the_last() -> None:
    names = {task.name for task in TASKS}
    assert all(set(phase.weights or {}) <= names for phase in PHASES)
    assert set(PHASES[-1].weights or {}) == names and PHASES[-1].own
    assert not any(task.own and (phase.weights or {}).get(task.name) for task in TASKS for phase in PHASES[:-1])


@pytest.fixture(scope="module")
def model(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Bagel:
    folder = start(tokenizer, tmp_path_factory.mktemp("model") / "parts")
    autoencoder = build_autoencoder(pretrain.AUTOENCODER)
    save_file(official_state(autoencoder, pretrain.AUTOENCODER), folder / "ae.safetensors")
    (folder / "ae_config.json").write_text(pretrain.AUTOENCODER.model_dump_json())
    return pretrain.fresh_model(folder, seed=3)


def test_worker_processes_change_no_step(model: Bagel) -> None:
    steps = Steps(model.folder, model.config, replace(TINY[0], steps=5), 0)
    apart, here = (list(loaded(steps, 1, workers)) for workers in (2, 0))
    assert len(apart) == len(here) == 4
    assert [pickled(one) for one in apart] == [pickled(one) for one in here]


def test_a_step_is_what_the_model_packs_of_the_same_samples(model: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    samples: list[Sample] = []

    def kept(sample: Sample, rng: np.random.Generator) -> Sample:
        samples.append(with_dropout(sample, rng))
        return samples[-1]

    monkeypatch.setattr("srum.train.pretrain_data.with_dropout", kept)
    monkeypatch.setattr("srum.train.pretrain_data.RECONSTRUCTED", 0.0)
    monkeypatch.setattr("srum.train.pretrain_data.IMAGE_DROPOUT", 0.4)
    step = Steps(model.folder, model.config, replace(TINY[0], batch=24, packs=1), 0).step(0)
    ((batch, *_),) = completed(step, model)
    assert any(part.dropped for sample in samples for part in sample)
    rows = sorted(samples, key=lambda sample: length(model, sample))
    latents = encoded(model, samples)
    noisy = [part for sample in rows for part in sample if part.drawn is not None]
    first = batch.loss_tokens.view(-1, 64)[:, 0]
    origins = [model.tokens(latents[id(part.image)]) for part in noisy]
    noises = [target + origin for target, origin in zip(batch.targets.split(64), origins, strict=True)]
    corruptions = [FlowNoise(n, t) for n, t in zip(noises, batch.timesteps[first].tolist(), strict=True)]
    packed = model.pack([[segment(part, latents) for part in sample] for sample in rows], corruptions)
    for name in ("text_ids", "patch_ids", "latent_ids", "loss_tokens", "ce_tokens", "labels", "row", "column"):
        assert torch.equal(getattr(batch, name), getattr(packed, name)), name
    for name in ("patches", "latents", "targets", "timesteps"):
        torch.testing.assert_close(getattr(batch, name), getattr(packed, name), atol=1e-5, rtol=1e-5)
    assert torch.equal(batch.layout.positions, packed.layout.positions)
    assert torch.equal(batch.layout.visible, packed.layout.visible)


def segment(part: Part, latents: dict[int, Tensor]) -> Segment:
    if part.text:
        return Segment("text", text=part.text, loss=part.loss, branch=part.branch)
    if part.seen is not None:
        pixels = torch.from_numpy(part.seen).permute(2, 0, 1).float() / 127.5 - 1
        return Segment("seen", image=pixels, dropped=part.dropped)
    kind = "clean" if part.clean is not None else "noisy"
    return Segment(kind, latent=latents[id(part.image)], loss=part.loss, dropped=part.dropped)  # type: ignore[arg-type]


def encoded(model: Bagel, samples: Sequence[Sample]) -> dict[int, Tensor]:
    """The latents of all images by their id, encoded together: bfloat16 rounds as the batch falls."""
    images = {id(part.image): part.image for sample in samples for part in sample if part.image is not None}
    pixels = torch.from_numpy(np.stack(list(images.values()))).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return dict(zip(images, encode_mean(model.autoencoder, pixels).float(), strict=True))


def length(model: Bagel, sample: Sample) -> int:
    texts = [model.tokenizer.encode(part.text, add_special_tokens=False) for part in sample if part.text]
    return sum(len(ids) + 2 for ids in texts) + 66 * sum(part.image is not None for part in sample)


def test_images_given_are_left_out_at_their_rate_together_and_never_the_target() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    sample = [Part(clean=image, droppable=True), Part(seen=image, droppable=True), Part(text="x", droppable=True)]
    rng = np.random.default_rng(0)
    drawn = [with_dropout([*sample, Part(drawn=image, loss=True)], rng) for _ in range(4000)]
    images = [[part.dropped for part in one if part.image is not None] for one in drawn]
    assert all(flags[0] == flags[1] and not flags[2] for flags in images)
    assert np.mean([flags[0] for flags in images]) == pytest.approx(schedule.IMAGE_DROPOUT, abs=0.02)
    assert np.mean([len(one) == 3 for one in drawn]) == pytest.approx(schedule.TEXT_DROPOUT, abs=0.02)


def test_stacked_muon_moves_as_torchs_does() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (4, 6), (6, 4), (5, 5))
    here, there = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    stacked = StackedMuon(here, lr=0.1, momentum=0.95, weight_decay=0.02)
    single = torch.optim.Muon(there, lr=0.1, momentum=0.95, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for one, other in zip(here, there, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        stacked.step()
        single.step()
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)


def test_the_model_card_states_the_recipe() -> None:
    card = (Path(__file__).parents[2] / "docs" / "model-card.md").read_text(encoding="utf-8")
    for phase in pretrain.PHASES:
        assert f"| {phase.name} | {phase.steps} of {phase.batch} |" in card
    assert f"{pretrain.AUTOENCODER_STEPS} steps of {pretrain_autoencoder.BATCH} images" in card
    assert f"{WRONG_CAPTIONS:.0%} of the captions" in card and f"{WRONG_REPLIES:.0%} of the replies" in card
