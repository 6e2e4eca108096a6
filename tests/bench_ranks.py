"""What two processes of a benchmark do, for ``test_bench_ranks``."""

from __future__ import annotations

from pathlib import Path

import pytest

from srum import models
from srum.config import ServerConfig
from srum.evaluation import bench
from srum.processes import Processes
from tests.fakes import FakeModel


def run_benchmarks(out: Path, interrupted: Path, data: Path, url: str) -> None:
    """Benchmarks by two processes: the embedded world, and what one of them left undone of it; one that is judged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", lambda *_: FakeModel())
        patch.setenv("no_proxy", "*")
        bench.run(judged(out, data, url))
        for folder in (out, interrupted):
            text = bench.run(shapes(folder))
            if Processes.here().rank == 0:
                (folder / "said.txt").write_text(text)


def shapes(out: Path) -> bench.Request:
    server = ServerConfig()
    return bench.Request("shapes", "srum-tiny", None, out, None, "", "", (), False, 2, 2, 0, "", server, (), 3, "cpu")


def judged(out: Path, data: Path, url: str) -> bench.Request:
    server = ServerConfig(url=url, model="m", concurrency=1)
    small, chosen = ("size=[64,64]",), ("genevalpp", "srum-tiny", None, out, data, "", "")
    return bench.Request(*chosen, small, False, None, 2, 0, "", server, (), 3, "cpu")
