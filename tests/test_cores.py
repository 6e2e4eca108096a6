"""Processes that a command starts beside itself: they share its stages, fail as one, and end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from srum import cores
from srum.records import Prompt
from srum.run_dir import run_stage

ITEMS = {f"p{number}": number for number in range(11)}
COMMAND = """
import os, signal, sys, time
from pathlib import Path
from srum.cli import app, main

@app.command()
def things(folder: Path, fate: str) -> None:
    from srum.processes import connected
    from srum.run_dir import RunError, run_stage
    from tests.test_cores import Prompt, ITEMS

    def work(batch):
        fated = processes.rank == 1 and "p6" in batch
        if fated and fate == "stumbles":
            raise RunError("nothing goes on from here")
        if fated and fate == "fails":
            raise ZeroDivisionError("a fault of ours")
        if fated and fate == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "waits" and "p4" in batch:
            (folder / "waiting").write_text(str(os.getppid()))
            time.sleep(60)
        return [Prompt(id=name, text=f"by {processes.rank}") for name in batch]

    with connected(2) as processes:
        (folder / f"{processes.rank}.pid").write_text(str(os.getpid()))
        run_stage(folder, "things", Prompt, ITEMS, 2, work)
        print(processes.rank, "of", processes.count)

main()
"""


def start(folder: Path, fate: str) -> subprocess.Popen[str]:
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "things", str(folder), fate],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def again(folder: Path) -> list[str]:
    """What the stage has after this process has gone on with it: who did which."""

    def work(batch: Mapping[str, int]) -> list[Prompt]:
        return [Prompt(id=name, text="again") for name in batch]

    return [record.text for record in run_stage(folder, "things", Prompt, ITEMS, 2, work)]


def test_they_share_the_work_and_one_speaks(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "none")
    assert process.communicate() == ("0 of 2\n", "") and process.returncode == 0
    assert again(tmp_path / "run") == [f"by {number // 2 % 2}" for number in range(11)]


@pytest.mark.parametrize(
    ("fate", "said"),
    [
        ("stumbles", "error: nothing goes on from here\n"),
        (
            "is killed",
            "error: process 1 of 2 was ended by signal 9, perhaps for want of memory: processes=1 takes the least; "
            f"{cores.KEPT}\n",
        ),
    ],
)
def test_the_failure_of_one_ends_all_in_one_line(tmp_path: Path, fate: str, said: str) -> None:
    """And what is finished is kept: batches 0 and 2 at least, and 1, which is the other's."""
    process = start(tmp_path / "run", fate)
    assert process.communicate() == ("", said) and process.returncode == 2
    done = again(tmp_path / "run")
    assert done[2:4] == ["by 1"] * 2 and done[6:8] == ["again"] * 2


@pytest.mark.slow
def test_a_fault_of_ours_is_a_traceback(tmp_path: Path) -> None:
    said = start(tmp_path / "run", "fails").communicate()[1]
    assert said.count("Traceback") == 1 and "ZeroDivisionError: a fault of ours" in said
    assert said.endswith("error: process 1 of 2 failed with exit code 1\n")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_the_others_end_with_the_command(tmp_path: Path, number: int) -> None:
    """Interrupted it says so; killed it can say nothing, and nobody works on."""
    process = start(tmp_path / "run", "waits")
    waiting = tmp_path / "run/waiting"
    while not waiting.exists():
        time.sleep(0.05)
    helper = int((tmp_path / "run/1.pid").read_text())
    process.send_signal(number)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert said.startswith("interrupted: ") == (number == signal.SIGINT)
    until = time.monotonic() + 20
    while Path(f"/proc/{helper}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(helper, 0)


def test_a_container_says_how_many_cores_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    assert cores.quota() == float("inf")
    for text, count in {"max 100000": float("inf"), "250000 100000": 2.5}.items():
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert cores.quota() == count
