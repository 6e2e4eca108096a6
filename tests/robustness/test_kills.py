"""Whole process groups killed at random moments of a run, and resumed until it is done: no file differs.

Children are forked from this process, which has imported everything, so that a kill costs a second and not ten. How
many kills: ``KILLS`` in the environment; other moments: ``SEED``.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from srum import loop, models
from srum.config import load_config
from srum.loop import run_loop
from srum.processes import connected
from tests.fakes import FakeModel
from tests.test_loop import SMALL, files_of

KILLS = int(os.environ.get("KILLS", "100"))  # by one process, and as many by two
SEED = int(os.environ.get("SEED", "0"))
GROWTH = 1.1  # of what the next attempt is given: coming back to where it was takes time, too
RUN = [*SMALL, "compare=[]"]
pytestmark = pytest.mark.slow


def fork_run(folder: Path, processes: int) -> list[int]:
    """The run in forked processes, which are a group of their own; their ids, the first that of the group."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children: list[int] = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.setpgid(0, children[0] if children else 0)
            _run(folder, rank, processes, port)
        os.setpgid(child, children[0] if children else child)
        children.append(child)
    return children


def _run(folder: Path, rank: int, processes: int, port: int) -> None:
    """What a child does; it ends with 0 where the run is done."""
    code = 1
    try:
        quiet = os.open(folder.parent / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        warnings.simplefilter("ignore")
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        models.load = FakeModel.load  # type: ignore[assignment]
        loop.write_report = lambda folder: folder  # the longest of all, and compared nowhere here
        with connected():
            run_loop(load_config(None, RUN), folder, resume=True)
        code = 0
    finally:
        os._exit(code)


def wait(children: list[int], seconds: float) -> bool:
    """Whether all ended by themselves, well, within so many seconds; what has not is killed, the whole group."""
    end, left = time.monotonic() + seconds, list(children)
    codes: list[int] = []
    while left and time.monotonic() < end:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.002)
    if left:
        os.killpg(children[0], signal.SIGKILL)
        for child in left:
            os.waitpid(child, 0)
        return False
    assert codes == [0] * len(children), "an attempt ended with an error"
    return True


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def processes(request: pytest.FixtureRequest) -> Iterator[int]:
    yield request.param


def test_kills_at_random_moments_change_no_file(processes: int, tmp_path: Path) -> None:
    start = time.monotonic()
    assert wait(fork_run(tmp_path / "whole", processes), 600)
    lasts = time.monotonic() - start
    expected, rng, kills, runs = files_of(tmp_path / "whole"), random.Random(10 * SEED + processes), 0, 0
    while kills < KILLS:
        folder = tmp_path / f"run-{runs}"
        attempt = 0
        while not wait(fork_run(folder, processes), rng.uniform(0.02, 0.3) * lasts * GROWTH**attempt):
            attempt += 1
        kills += attempt
        files = files_of(folder)
        assert files.keys() == expected.keys()
        assert [name for name in expected if files[name] != expected[name]] == []
        shutil.rmtree(folder)
        runs += 1
        print(
            f"{processes} processes: {kills} kills in {runs} runs; an uninterrupted one takes {lasts:.1f} s", flush=True
        )
