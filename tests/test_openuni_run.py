"""The whole loop on a tiny OpenUni with RecA, SFT and region-NFT: what it leaves, and that neither a kill nor a second
process changes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srum.config import dump
from srum.loop import run_loop
from srum.models.openuni import OpenUni
from srum.models.openuni.checkpoint import WEIGHTS
from srum.train.trainer import Trainer
from tests.launch import launch
from tests.openuni_tiny import small, tiny, whole_run
from tests.test_loop import files_of

SRUM = [sys.executable, "-c", "from srum.cli import app; app()"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", *SRUM]
ARMS = ("sft", "reca", "region_nft")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_loop(small(model), folder)
    return folder


def test_what_is_trained_is_the_transformer_alone(whole: Path, model: Path) -> None:
    assert (whole / "report.html").is_file()
    before = load_file(model / WEIGHTS)
    for arm in ARMS:
        folder = whole / "round-000" / "train" / arm / "model"
        after = load_file(folder / WEIGHTS)
        assert after.keys() == before.keys()
        differ = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert differ and all(name.startswith("transformer.") for name in differ)
        assert OpenUni.load(folder).network is not None


@pytest.mark.slow
def test_a_kill_while_judging_and_while_training_changes_nothing(
    whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, step = tmp_path / "run", Trainer.step

    def killed(self: Trainer, number: int) -> dict[str, object]:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(OpenUni, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_loop(small(model), folder)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            run_loop(small(model), folder, resume=True)
    run_loop(small(model), folder, resume=True)
    ours, theirs = files_of(folder), files_of(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and "checkpoints" not in name] == []


def assert_two_did_what_one_did(one: Path, two: Path) -> None:
    """The same files, byte for byte before training; weights up to the order in which gradients are added."""
    ours, theirs = files_of(one), files_of(two)
    kept = [name for name in ours if "checkpoints" not in name and name != "command.txt"]
    assert set(kept) <= theirs.keys()
    before = [name for name in kept if "train/" not in name and name.startswith("round-000")]
    assert before and [name for name in before if ours[name] != theirs[name]] == []
    for arm in ARMS:
        a, b = (load_file(run / "round-000" / "train" / arm / "model" / WEIGHTS) for run in (one, two))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_two_processes_do_what_one_does(whole: Path, model: Path, tmp_path: Path) -> None:
    launch(whole_run, tmp_path / "two", model)
    assert_two_did_what_one_did(whole, tmp_path / "two")


@pytest.mark.slow
def test_two_processes_train_the_queries_as_one_does(model: Path, tmp_path: Path) -> None:
    """RecA on all that its paper trains, the language model beside it in each process; the weights are those of one."""
    config = small(model, **{"train.trainable": "all", "method": "reca", "compare": "[]", "train.samples.count": 0})
    (tmp_path / "small.yaml").write_text(dump(config))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    for name, command in (("one", SRUM), ("two", TORCHRUN)):
        command = [*command, "run", "--config", "small.yaml", "--out", name]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    before = load_file(model / WEIGHTS)
    one, two = (load_file(tmp_path / n / "round-000" / "train" / "reca" / "model" / WEIGHTS) for n in ("one", "two"))
    assert {name for name in before if torch.equal(before[name], one[name])} == set()
    for name in one:
        if not name.endswith(("k_proj.bias", "to_k.bias")):  # whose true gradient is zero
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_updates_of_low_rank_are_merged(model: Path, tmp_path: Path) -> None:
    run_loop(small(model, **{"train.lora.rank": 4, "compare": "[]"}), tmp_path / "run")
    folder = tmp_path / "run" / "round-000" / "train" / "region_nft"
    before, after = (load_file(path / WEIGHTS) for path in (model, folder / "model"))
    differ = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert differ and all(name.startswith("transformer.transformer_blocks.") for name in differ)
    assert (folder / "adapter").is_dir()
