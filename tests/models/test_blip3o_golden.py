"""BLIP3-o against numbers recorded from the reference at toy size, as benchmarks/parity.py compares them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import parity, parity_blip3o
from srum.models.blip3o import Blip3o

GOLDEN = Path(__file__).parents[1] / "golden" / "blip3o"


@pytest.fixture(scope="module")
def model() -> Blip3o:
    return Blip3o.load(GOLDEN / "checkpoint")


@pytest.mark.parametrize("fixture", parity_blip3o.CHECKS)
def test_fixture(model: Blip3o, fixture: str) -> None:
    compared = parity.compare(GOLDEN, fixture, model)
    assert compared
    assert [deviation for deviation in compared if not deviation.passed] == []


def test_every_file_of_the_folder_is_compared() -> None:
    names = {path.stem for path in GOLDEN.iterdir() if path.name not in parity.UNCOMPARED}
    assert names == {"checkpoint", *parity_blip3o.CHECKS}
