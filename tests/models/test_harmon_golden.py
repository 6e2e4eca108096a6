"""Harmon against numbers recorded from the reference at toy size, as benchmarks/parity.py compares them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import parity, parity_harmon
from srum.models.harmon import Harmon

GOLDEN = Path(__file__).parents[1] / "golden" / "harmon"


@pytest.fixture(scope="module")
def model() -> Harmon:
    return Harmon.load(GOLDEN / "checkpoint")


@pytest.mark.parametrize(
    "fixture", [pytest.param(name, marks=[pytest.mark.slow] * (name == "sampler")) for name in parity_harmon.CHECKS]
)
def test_fixture(model: Harmon, fixture: str) -> None:
    compared = parity.compare(GOLDEN, fixture, model)
    assert compared
    assert [deviation for deviation in compared if not deviation.passed] == []


def test_drawing(model: Harmon) -> None:
    """Some of the runs of the fixture that is slow."""
    facts = json.loads((GOLDEN / "sampler.json").read_text())
    some = {name: facts[name] for name in ("two_images", "cool_native")}
    compared = list(parity_harmon.sampler(model, some, parity.Tensors(GOLDEN / "sampler.safetensors")))
    assert compared
    assert [deviation for deviation in compared if not deviation.passed] == []


def test_every_file_of_the_folder_is_compared() -> None:
    names = {path.stem for path in GOLDEN.iterdir() if path.name not in parity.UNCOMPARED}
    assert names | {"fixture_config"} == {"checkpoint", parity_harmon.TOGETHER, *parity_harmon.CHECKS}
