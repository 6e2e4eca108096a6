"""Finding grounders, checking what they return, and filtering regions."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grounding.base import GrounderError, ground, load_grounder
from grounding.classical import ClassicalGrounder
from grounding.filtering import by_area, largest, without_overlaps
from grounding.grid import GridGrounder
from grounding.native import NativeGrounder
from srum.geometry import rle_encode
from srum.records import Box, Region

MODEL = object()


def region(box: Box, area: float | None = None, index: int = 1) -> Region:
    return Region(id=index, box=box, area=area or (box[2] - box[0]) * (box[3] - box[1]), source="test")


class Scripted:
    """Proposes what is written for the image's width; raises where an exception is written. Counts its calls."""

    def __init__(self, script: Mapping[int, object]) -> None:
        self.script = script
        self.calls: list[int] = []

    def propose(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[list[Region]]:
        self.calls.append(len(images))
        replies = [self.script[image.width] for image in images]
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies  # type: ignore[return-value]


def images(*widths: int) -> list[Image.Image]:
    return [Image.new("RGB", (width, 10)) for width in widths]


def test_regions_are_cut_sorted_numbered_and_followed_by_the_background() -> None:
    script = {20: [region((0, 0, 2, 2)), region((10, 0, 50, 10)), region((30, 0, 40, 5)), region((0, 0, 3, 2))]}
    ((regions, error),) = ground(Scripted(script), images(20), ["p"], max_regions=2)
    assert error is None
    assert [(r.id, r.box, r.area) for r in regions] == [
        (1, (10, 0, 20, 10), 100),
        (2, (0, 0, 3, 2), 6),
        (0, (0, 0, 20, 10), 94),
    ]


def test_the_background_is_what_the_union_leaves() -> None:
    mask = np.zeros((10, 20), bool)
    mask[:, :5] = True
    masked = Region(id=1, box=(0, 0, 5, 10), mask=rle_encode(mask), area=50, source="test")
    ((regions, _),) = ground(Scripted({20: [masked, region((0, 0, 10, 5))]}), images(20), ["p"], max_regions=8)
    assert regions[-1].area == 200 - 75
    ((everything, _),) = ground(GridGrounder(2), images(20), ["p"], max_regions=8)
    assert [r.id for r in everything] == [1, 2, 3, 4]
    assert [r.box for r in everything][3] == (10, 5, 20, 10)
    ((nothing, _),) = ground(Scripted({20: []}), images(20), ["p"], max_regions=8)
    assert [(r.id, r.area) for r in nothing] == [(0, 200)]


@pytest.mark.parametrize(
    "bad",
    [
        RuntimeError("out of memory"),
        None,
        [(0, 0, 1, 1)],
        [Region(id=1, box=(0, 0, 1, 1), area=1, source="t", mask=rle_encode(np.ones((3, 3))))],
    ],
)
def test_one_bad_image_stops_nothing(bad: object) -> None:
    script = Scripted({20: [region((0, 0, 2, 2))], 30: bad, 40: []})
    outcomes = ground(script, images(20, 30, 40), ["p"] * 3, max_regions=8)
    assert [len(regions) for regions, _ in outcomes] == [2, 0, 1]
    assert [error is None for _, error in outcomes] == [True, False, True]
    assert script.calls == [3, 1, 1, 1]


def test_a_grounder_that_forgets_an_image() -> None:
    class Forgetful(Scripted):
        def propose(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[list[Region]]:
            return super().propose(images, prompts)[:1]

    outcomes = ground(Forgetful({20: [], 30: []}), images(20, 30), ["p", "p"], max_regions=8)
    assert [error for _, error in outcomes] == [None, None]


def test_the_error_says_what_happened() -> None:
    ((regions, error),) = ground(Scripted({20: RuntimeError("out of memory")}), images(20), ["p"], max_regions=8)
    assert (regions, error) == ([], "RuntimeError: out of memory")
    assert ground(Scripted({}), [], [], max_regions=8) == []


def test_shipped_grounders_by_name() -> None:
    assert isinstance(load_grounder("classical", MODEL), ClassicalGrounder)  # type: ignore[arg-type]
    assert isinstance(load_grounder("grid", MODEL), GridGrounder)  # type: ignore[arg-type]
    native = load_grounder("native", MODEL)  # type: ignore[arg-type]
    assert isinstance(native, NativeGrounder) and native.model is MODEL


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_users_own_grounder(here: Path) -> None:
    (here / "my_own_grounder.py").write_text(
        "class Mine:\n    def propose(self, images, prompts):\n        return [[] for _ in images]\n"
    )
    mine = load_grounder("my_own_grounder:Mine", MODEL)  # type: ignore[arg-type]
    assert mine.propose(images(5), ["p"]) == [[]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sift", "no grounder 'sift': give one of classical, native, grid or module:Class"),
        (":Mine", "no grounder"),
        ("no_such_module_here:Mine", "no module 'no_such_module_here'"),
        ("no_such_package.part:Mine", "no module 'no_such_package'"),
        ("a_module_of_mine:Nothing", "has no class 'Nothing'"),
        ("a_module_of_mine:value", "has no class 'value'"),
        ("a_module_of_mine:Empty", "Empty has no method propose"),
    ],
)
def test_grounders_that_cannot_be_found(here: Path, name: str, message: str) -> None:
    (here / "a_module_of_mine.py").write_text("value = 3\nclass Empty: ...\n")
    with pytest.raises(GrounderError, match=message):
        load_grounder(name, MODEL)  # type: ignore[arg-type]


def test_an_error_inside_the_users_module_is_shown_as_it_is(here: Path) -> None:
    (here / "needs_something.py").write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_grounder("needs_something:Mine", MODEL)  # type: ignore[arg-type]


def test_filters() -> None:
    big, half, small = region((0, 0, 10, 10)), region((0, 0, 10, 5)), region((8, 8, 10, 10))
    all_three = [small, half, big]
    assert by_area(all_three, (10, 10), low=0.05, high=0.9) == [half]
    assert largest(all_three, 2) == [half, big]
    assert without_overlaps(all_three, 0.4) == [small, half]
    assert without_overlaps(all_three, 0.5) == all_three
    assert without_overlaps([], 0.5) == largest([], 3) == []
