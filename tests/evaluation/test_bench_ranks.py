"""Two processes make and score what one does, also of what an interruption left."""

from __future__ import annotations

from pathlib import Path

import pytest

from srum import models
from srum.evaluation import bench
from tests.bench_ranks import run_shapes, shapes
from tests.fakes import FakeModel
from tests.launch import launch


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (folder / "bench").rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stumbling(FakeModel):
        drawn = 0

        def draw(self, contexts: list, *rest: object, **named: object) -> list:  # type: ignore[type-arg, override]
            Stumbling.drawn += 1
            if Stumbling.drawn > 2:
                raise KeyboardInterrupt
            return super().draw(contexts, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(models, "load", lambda *_: Stumbling())
    with pytest.raises(KeyboardInterrupt):
        bench.run(shapes(tmp_path / "half"))
    monkeypatch.setattr(models, "load", lambda *_: FakeModel())
    text = bench.run(shapes(tmp_path / "one"))
    launch(run_shapes, tmp_path / "two", tmp_path / "half")
    assert (tmp_path / "two/said.txt").read_text() == (tmp_path / "half/said.txt").read_text() == text
    one = contents(tmp_path / "one")
    assert len(one) > 28 and one == contents(tmp_path / "two") == contents(tmp_path / "half")
