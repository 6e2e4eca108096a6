"""What two processes of a benchmark do, for ``test_bench_ranks``."""

from __future__ import annotations

from pathlib import Path

import pytest

from srum import models
from srum.config import ServerConfig
from srum.evaluation import bench
from srum.processes import Processes
from tests.fakes import FakeModel


def run_shapes(out: Path, interrupted: Path) -> None:
    """The embedded world's first two prompts of every category by two processes; and what one of them left undone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", lambda *_: FakeModel())
        for folder in (out, interrupted):
            text = bench.run(shapes(folder))
            if Processes.here().rank == 0:
                (folder / "said.txt").write_text(text)


def shapes(out: Path) -> bench.Request:
    server = ServerConfig()
    return bench.Request("shapes", "srum-tiny", None, out, None, "", "", (), False, 2, 2, 0, "", server, (), 3, "cpu")
