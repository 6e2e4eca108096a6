"""The walks of docs/howto/walks.md, typed as they stand there: files first, then the commands; on the fake model."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from srum import models
from srum.cli import app
from srum.judging.instructions import layout_reply, region_reply
from tests.fakes import FakeModel
from tests.servers import chat_server

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/howto/walks.md").read_text(encoding="utf-8")
SMALL = ["prompt_count=4", "candidates_per_prompt=2", "train.steps=2", "train.batch_size=2", "eval.count=6"]
SMALL += ["reward.on_failure=keep"]
SETS = [part for override in SMALL for part in ("--set", override)]
OURS = ("my_regions", "my_method")


def walk(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def files(text: str) -> Iterator[tuple[str, str]]:
    """Names and contents: of a block of text or code that its sentence puts into a file."""
    yield from re.findall(r"into `([\w.]+)`:\n\n```\w+\n(.*?)```", text, re.S)


def typed(text: str, changes: dict[str, str] | None = None) -> None:
    """Write the files, then run every command, those that make runs with few prompts and steps."""
    for name, content in files(text):
        Path(name).write_text(content)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert commands
    for line in commands:
        for before, after in (changes or {}).items():
            line = line.replace(before, after)
        words = shlex.split(line)
        assert words[0] == "srum"
        result = CliRunner().invoke(app, [*words[1:], *(SETS if words[1] in ("run", "sweep") else [])])
        assert result.exit_code == 0, f"{line}\n{result.output}{result.stderr}"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_see_the_loop() -> None:
    typed(walk("See the loop"))
    assert Path("candidate.png").stat().st_size > 10_000 and Path("runs/first/report.html").is_file()


def test_own_prompts_grounder_and_judge() -> None:
    scores = itertools.cycle(range(-10, 11, 3))

    def reply(request: dict[str, Any]) -> str:
        region = re.search(r"Region ID: (\d+)", json.dumps(request))
        score = next(scores) / 10
        return region_reply(int(region[1]), "thing", score, "so") if region else layout_reply(score, "so")

    with chat_server(reply) as address:
        typed(walk("Your own prompts, grounder and judge"), {"http://localhost:8000/v1": address})
    assert "a LoRA adapter in PEFT's format" in Path("published/README.md").read_text()
    assert any(Path("runs/own").rglob("events.out.tfevents*"))
    assert "quarters" in Path("runs/own/round-000/regions.jsonl").read_text()
    assert "# mine" not in Path("runs/own/round-000/prompts.jsonl").read_text()


def test_an_objective_at_equal_compute() -> None:
    typed(walk("An objective of your own, at equal compute"))
    assert Path("runs/objectives/sweep.json").is_file()
