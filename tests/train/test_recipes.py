"""RecA and RvR on a BAGEL folder of small random weights: by one process and by two, the same records."""

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
from srum.models.bagel import Bagel
from srum.records import Picture, Refinement
from srum.run_dir import read_records
from srum.train.reconstructing import Reconstruction
from tests.launch import launch
from tests.train.recipe_runs import GOLDEN, config_of, whole_runs

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
SRUM = [sys.executable, "-c", "from srum.cli import app; app()"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    whole_runs(folder / "one")
    launch(whole_runs, folder / "two")
    return folder


@pytest.mark.parametrize("name", ["reca/round-000/pictures", "rvr/round-000/pairs", "rvr/round-000/pair_counts"])
def test_two_processes_write_the_records_of_one(folder: Path, name: str) -> None:
    suffix = ".json" if name.endswith("counts") else ".jsonl"
    one, two = ((folder / run / f"{name}{suffix}").read_text() for run in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("method", ["reca", "rvr"])
def test_the_generation_expert_alone_has_moved(folder: Path, method: str) -> None:
    """Bit for bit: understanding stays what it was, by one process and by two, of which one packs no image to see."""
    model = Bagel.load(GOLDEN)
    before, own = dict(model.named_parameters()), {name for name, _ in model.generation_parameters()}
    for run in ("one", "two"):
        after = load_file(folder / run / method / "round-000/train" / method / "model/ema.safetensors")
        moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
        assert moved and moved <= own


@pytest.mark.parametrize("method", ["reca", "rvr"])
def test_two_processes_have_the_losses_of_one(folder: Path, method: str) -> None:
    """Of the first step; the weights after it differ, where a gradient that is nearly zero has another sign."""
    first = [
        json.loads((folder / run / method / "round-000/train" / method / "metrics.jsonl").read_text().splitlines()[0])
        for run in ("one", "two")
    ]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-4)


def test_a_round_is_refined(folder: Path) -> None:
    made = read_records(folder / "two/rvr/round-000/refined/refined.jsonl", Refinement)
    assert len(made) == 6 and all(len(one.turns) == 3 for one in made)
    assert [one.id for one in made] == [
        one.id for one in read_records(folder / "one/rvr/round-000/refined/refined.jsonl", Refinement)
    ]


@pytest.mark.slow
def test_torchrun_goes_the_whole_way(tmp_path: Path) -> None:
    """Two processes, by the commands of the documents: a run of either method, drawn again, reconstructed."""
    for method in ("reca", "rvr"):
        (tmp_path / f"{method}.yaml").write_text(dump(config_of(method)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def srum(*arguments: str) -> str:
        done = subprocess.run(
            [*TORCHRUN, *SRUM, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return " ".join(done.stdout.split())

    out = srum("run", "--config", "reca.yaml", "--out", "reca")
    assert out.count("6 pictures of rendered, 0 could not be read") == 1
    assert out.count("before the first step: loss") == 1
    assert len(read_records(tmp_path / "reca/round-000/pictures.jsonl", Picture)) == 6
    assert "6 images reconstructed, 0 could not be read" in srum("reconstruct", "reca", "--out", "looked-at")
    assert len(read_records(tmp_path / "looked-at/reconstructed.jsonl", Reconstruction)) == 6

    srum("run", "--config", "rvr.yaml", "--out", "rvr")
    srum("refine", "rvr", "--rounds", "2", "--set", "refine.stop=null")
    made = read_records(tmp_path / "rvr/round-000/refined/refined.jsonl", Refinement)
    assert len(made) == 6 and all(len(one.turns) == 3 for one in made)
    for method in ("reca", "rvr"):
        assert (tmp_path / f"{method}/round-000/train/{method}/model/ema.safetensors").exists()
