"""Show-o against numbers recorded from the reference at toy size, as benchmarks/parity.py compares them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import parity, parity_showo

GOLDEN = Path(__file__).parents[1] / "golden" / "showo"


@pytest.fixture(scope="module")
def model() -> parity_showo.Showos:
    return parity_showo.load(GOLDEN / "checkpoint", "cpu", "fp32")


@pytest.mark.parametrize("fixture", parity_showo.CHECKS)
def test_fixture(model: parity_showo.Showos, fixture: str) -> None:
    compared = parity.compare(GOLDEN, fixture, model)
    assert compared
    assert [deviation for deviation in compared if not deviation.passed] == []


def test_every_file_of_the_folder_is_compared() -> None:
    names = {path.stem for path in GOLDEN.iterdir() if path.name not in parity.UNCOMPARED}
    assert names == {"checkpoint", *parity_showo.CHECKS}
