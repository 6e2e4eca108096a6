"""Several processes on one run: the files of one process, interruptions, failures. Trained together: test_sharding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import ProcessRaisedException

from srum import models
from srum.config import load_config
from srum.loop import run_loop
from srum.run_dir import claim_run
from tests.fakes import FakeModel
from tests.launch import launch
from tests.shared_runs import interrupted, small, stages_before_training, whole_runs
from tests.test_loop import files_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
SRUM = "from srum import models; from tests.fakes import FakeModel; models.load = FakeModel.load; "
SRUM += "from srum.cli import app; app()"


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one``: a run of one process; ``two`` and ``from one``: those of two (``whole_runs``)."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(ValueError, match="process 0 stumbles"):
        interrupted(folder / "from one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", FakeModel.load)
        run_loop(small(), folder / "one")
    launch(whole_runs, folder)
    return folder


def before_training(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder / "round-000").items() if "train/" not in name}


def test_two_processes_leave_the_files_of_one(folder: Path) -> None:
    """Byte for byte, but for what is trained: there gradients are added in another order."""
    one, two = (
        {name: data for name, data in files_of(folder / run).items() if "checkpoints" not in name}
        for run in ("one", "two")
    )
    assert one.keys() == two.keys()
    trained = ("round-000/train/", "eval/region_nft/", "summary.json")
    assert [name for name in one if one[name] != two[name] and not name.startswith(trained)] == []
    a, b = (load_file(folder / name / "round-000/train/region_nft/model/ema.safetensors") for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_they_share_the_work(folder: Path) -> None:
    """14 candidates in batches of 4, 4, 4, 2, and twice 7 images in batches of 3, 3, 1."""
    drawn = [int((folder / f"drawn-{rank}.txt").read_text()) for rank in range(2)]
    assert drawn == [8 + 4 + 4, 6 + 3 + 3]


def test_one_process_speaks(folder: Path) -> None:
    first, second = ((folder / f"printed-{rank}.txt").read_text() for rank in range(2))
    assert "training on" in first and "against base, points" in first
    assert second == ""


def test_two_go_on_where_one_was_interrupted(folder: Path) -> None:
    assert before_training(folder / "from one") == before_training(folder / "one")


def test_one_goes_on_where_two_were_interrupted(folder: Path) -> None:
    """The failure of process 1 ends the launch with its message; the batches of process 0 are kept."""
    with pytest.raises(ProcessRaisedException, match="process 1 stumbles"):
        launch(interrupted, folder / "to one")
    assert not (folder / "to one/round-000/judgements.jsonl").exists()
    stages_before_training(folder / "to one")
    assert before_training(folder / "to one") == before_training(folder / "one")


def test_nobody_waits_for_a_process_that_is_gone(folder: Path) -> None:
    assert (folder / "left/lost.txt").read_text().startswith("process 0 of 2 lost another one: ")
    assert len(list((folder / "left/things.parts").iterdir())) == 3  # batches 0, 2, 4 of 0 to 5


def test_a_launch_ends_with_the_message_of_what_failed(tmp_path: Path) -> None:
    claim_run(tmp_path / "run", load_config())
    command = [*TORCHRUN, sys.executable, "-c", SRUM, "run", "--out", "run"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("error: run already holds this run; pass --resume to go on with it\n") == 1
