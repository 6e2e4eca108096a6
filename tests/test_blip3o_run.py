"""The whole loop on a tiny BLIP3-o that grounds natively: what it leaves, and that neither a kill nor a second process
changes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srum.config import dump
from srum.loop import run_loop
from srum.models.blip3o import Blip3o
from tests.blip3o_tiny import BOXES, CHECKPOINT, small, teach_boxes, whole_run
from tests.interrupted import assert_two_did_what_one_did, killed_in_training
from tests.launch import launch
from tests.test_loop import files_of

SRUM = [sys.executable, "-c", "from srum.cli import app; app()"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", *SRUM]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teach_boxes(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_loop(small(model), folder)
    return folder


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_from_prompts_to_report(whole: Path) -> None:
    """The boxes of the reply, of 128 px seen at 140, are in the regions, cut to the image."""
    assert (whole / "report.html").is_file()
    for grounding in lines(whole / "round-000" / "regions.jsonl"):
        boxes = sorted(region["box"] for region in grounding["regions"] if region["id"])  # type: ignore[attr-defined]
        expected = sorted([min(value * 128 / 140, 128) for value in box] for _, box in BOXES)
        assert [value for box in boxes for value in box] == pytest.approx([value for box in expected for value in box])
    rewards = lines(whole / "round-000" / "rewards.jsonl")
    assert [reward["grid"] for reward in rewards] == [[8, 8]] * 4


def test_what_is_trained_is_the_transformer_alone(whole: Path, model: Path) -> None:
    before = load_file(model / "model.safetensors")
    for arm in ("srum", "region_nft"):
        folder = whole / "round-000" / "train" / arm / "model"
        after = load_file(folder / "model.safetensors")
        assert after.keys() == before.keys()
        differ = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert differ and all(name.startswith("model.dit.") for name in differ)
        assert (folder / "diffusion-decoder" / "scheduler" / "scheduler_config.json").is_file()
        assert Blip3o.load(folder).network is not None


def test_a_kill_while_judging_and_while_training_changes_nothing(
    whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Blip3o, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_loop(small(model), folder)
    with killed_in_training(monkeypatch):
        run_loop(small(model), folder, resume=True)
    run_loop(small(model), folder, resume=True)
    ours, theirs = files_of(folder), files_of(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and "checkpoints" not in name] == []


def test_two_processes_do_what_one_does(whole: Path, model: Path, tmp_path: Path) -> None:
    launch(whole_run, tmp_path / "two", model)
    assert_two_did_what_one_did(whole, tmp_path / "two", ("srum", "region_nft"))


@pytest.mark.slow
def test_torchrun_goes_from_prompts_to_report(whole: Path, model: Path, tmp_path: Path) -> None:
    """``srum run --grounder native`` by two processes, and again: nothing is left to do."""
    (tmp_path / "small.yaml").write_text(dump(small(model)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "run", "--config", "small.yaml", "--grounder", "native", "--out", "two"]
    for more in ([], ["--resume"]):
        done = subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "two" / "report.html").is_file()
        assert_two_did_what_one_did(whole, tmp_path / "two", ("srum", "region_nft"))


@pytest.mark.parametrize("train", [["train.lora.rank=4"], ["train.trainable=all"]])
def test_other_things_to_train(model: Path, whole: Path, tmp_path: Path, train: list[str]) -> None:
    """LoRA on the transformer, merged; and the transformer with its queries."""
    options = dict(item.split("=") for item in train)
    run_loop(small(model, **options, compare="[]"), tmp_path / "run")
    folder = tmp_path / "run" / "round-000" / "train" / "region_nft"
    before, after = (load_file(path / "model.safetensors") for path in (model, folder / "model"))
    differ = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert differ and all(name.startswith(("model.dit.", "model.latent_queries")) for name in differ)
    assert ("model.latent_queries" in differ) == (train == ["train.trainable=all"])
    assert (folder / "adapter").is_dir() == (train == ["train.lora.rank=4"])


def test_the_doctor_knows_it() -> None:
    done = subprocess.run([*SRUM, "doctor", str(CHECKPOINT), "--size", "64"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "diffusion transformer" in done.stdout and "8x8 of 32 numbers" in done.stdout
