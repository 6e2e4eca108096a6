"""Two processes make and score what one does, also of what an interruption left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from srum import models
from srum.evaluation import bench
from tests.bench_ranks import judged, run_benchmarks, shapes
from tests.checkouts import checkout
from tests.fakes import FakeModel
from tests.launch import launch
from tests.servers import chat_server


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
    data = checkout("genevalpp", tmp_path / "checkout")
    with chat_server(lambda body: '{"correct": %d}' % ("cups 0" in json.dumps(body))) as url:  # noqa: UP031
        bench.run(judged(tmp_path / "one", data, url))
        launch(run_benchmarks, tmp_path / "two", tmp_path / "half", data, url)
    assert (tmp_path / "two/said.txt").read_text() == (tmp_path / "half/said.txt").read_text() == text
    one = contents(tmp_path / "one")
    assert len(one) > 28 and one == contents(tmp_path / "two")
    assert contents(tmp_path / "half") == {name: held for name, held in one.items() if "genevalpp" not in name}
