"""The whole loop on a tiny Harmon: what it leaves, and that neither a kill nor a second process changes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srum.config import dump, load_config
from srum.loop import run_loop
from srum.models.harmon import Harmon
from srum.models.harmon.checkpoint import GENERATION
from tests.harmon_tiny import CHECKPOINT, small, whole_run
from tests.interrupted import killed_in_training
from tests.launch import launch
from tests.test_loop import files_of

SRUM = [sys.executable, "-c", "from srum.cli import app; app()"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", *SRUM]
METHODS = {
    "region_nft": {"method": "region_nft", "compare": "[sft, srum]"},
    "all": {"method": "region_nft", "train.trainable": "all"},
    "reca": {"method": "reca", "mix": "[1, 1, 0]", "train.trainable": "all"},
    "lora": {"method": "sft", "train.lora.rank": 2},
}


def weights(folder: Path, method: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "round-000" / "train" / method / "model" / "harmon.safetensors")


def changed(folder: Path, method: str) -> set[str]:
    before, after = load_file(CHECKPOINT / "harmon.safetensors"), weights(folder, method)
    assert after.keys() == before.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_a_run_trains_what_draws_alone(tmp_path: Path) -> None:
    run_loop(small(compare="[sft]"), tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()
    for arm in ("sft", "region_nft"):
        differ = changed(tmp_path / "run", arm)
        assert differ and all(name.startswith(GENERATION) for name in differ)
        folder = tmp_path / "run" / "round-000" / "train" / arm / "model"
        assert (folder / "kl16.safetensors").read_bytes() == (CHECKPOINT / "kl16.safetensors").read_bytes()
        assert Harmon.load(folder).network is not None
    assert load_config(tmp_path / "run" / "config.yaml").judge.model == "self"


def test_where_all_is_trained_the_weights_that_entered_judge(tmp_path: Path) -> None:
    run_loop(small(method="reca", **{"train.trainable": "all"}), tmp_path / "run")
    differ = changed(tmp_path / "run", "reca")
    assert {"llm.model.embed_tokens.weight", "llm.lm_head.weight", "mar.z_proj.weight", "mar.mask_token"} <= differ
    after = weights(tmp_path / "run", "reca")
    assert torch.equal(after["llm.lm_head.weight"], after["llm.model.embed_tokens.weight"])
    assert load_config(tmp_path / "run" / "config.yaml").judge.model == "start"


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_neither_a_kill_nor_a_second_process_changes_a_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, the same files; by two processes the same before training, and weights up to the order of sums."""
    more = METHODS[name]
    run_loop(small(**more), tmp_path / "one")
    with killed_in_training(monkeypatch):
        run_loop(small(**more), tmp_path / "killed")
    run_loop(small(**more), tmp_path / "killed", resume=True)
    one, resumed = files_of(tmp_path / "one"), files_of(tmp_path / "killed")
    assert [file for file in one if one[file] != resumed.get(file) and "checkpoints" not in file] == []
    launch(whole_run, tmp_path / "two", more)
    assert_two_did_what_one_did(tmp_path / "one", tmp_path / "two")


def assert_two_did_what_one_did(one: Path, two: Path) -> None:
    ours, theirs = files_of(one), files_of(two)
    before = [file for file in ours if "train/" not in file and file.startswith("round-000")]
    assert before and [file for file in before if ours[file] != theirs[file]] == []
    for folder in (one / "round-000" / "train").iterdir():
        a, b = (weights(run, folder.name) for run in (one, two))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_torchrun_goes_from_prompts_to_report(tmp_path: Path) -> None:
    """``srum run`` by two processes, and again: nothing is left to do."""
    config = small(**METHODS["region_nft"])
    run_loop(config, tmp_path / "one")
    (tmp_path / "small.yaml").write_text(dump(config))
    command = [*TORCHRUN, "run", "--config", "small.yaml", "--out", "two"]
    for more in ([], ["--resume"]):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert_two_did_what_one_did(tmp_path / "one", tmp_path / "two")
