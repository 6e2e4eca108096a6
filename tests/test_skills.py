"""The table of skills at its smallest size, on the shipped weights, and what counts as an edit carried out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import skills
from srum.shapes.edits import Edit
from srum.shapes.scenes import Thing

RED = Thing("circle", "red", "small", 0, 0)


def test_every_skill_has_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    skills.main(["--count", "4", "--device", "cpu", "--out", str(tmp_path / "skills.json")])
    out = capsys.readouterr().out
    measured = json.loads((tmp_path / "skills.json").read_text())
    assert len(measured) == 20 and all(skill["name"] in out for skill in measured)
    for skill in measured:
        if skill["interval"]:
            low, high = skill["interval"]
            assert 0 <= low <= skill["value"] <= high <= 100


def test_an_edit_is_carried_out_where_what_was_is_gone_and_what_shall_be_is_there() -> None:
    blue = replace(RED, colour="blue")
    turned = Edit(RED, blue)
    assert skills.carried_out(turned, {"small blue circle r1 c1"})
    assert not skills.carried_out(turned, {"small blue circle r1 c1", "small red circle r1 c1"})
    assert not skills.carried_out(turned, set())
    assert skills.carried_out(Edit(RED, None), set()) and not skills.carried_out(Edit(None, RED), set())
    assert skills.carried_out(Edit(RED, RED), {"small red circle r1 c1"})
