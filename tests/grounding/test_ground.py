"""Finding grounders, checking what they return, and filtering regions."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from srum.geometry import iou, rle_encode
from srum.grounding.base import SHIPPED, Grounder, GrounderError, ground, load_grounder
from srum.grounding.classical import ClassicalGrounder
from srum.grounding.filtering import by_area, without_overlaps
from srum.grounding.grid import GridGrounder
from srum.grounding.native import NativeGrounder
from srum.grounding.relevance import RelevanceFilter
from srum.models.base import Segment
from srum.records import Box, Region

MODEL = SimpleNamespace(device=torch.device("cpu"))


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


def test_an_exception_costs_its_image_alone() -> None:
    script = Scripted({20: [region((0, 0, 2, 2))], 30: RuntimeError("out of memory"), 40: []})
    outcomes = ground(script, images(20, 30, 40), ["p"] * 3, max_regions=8)
    assert [len(regions) for regions, _ in outcomes] == [2, 0, 1]
    assert [error for _, error in outcomes] == [None, "RuntimeError: out of memory", None]
    assert script.calls == [3, 1, 1, 1]


GROUNDER = """
import numpy
from collections.abc import Sequence
from srum.grounding.classical import ClassicalGrounder
from srum.geometry import rle_decode
from srum.records import MaskRLE, Region

class Mine(ClassicalGrounder):
    def propose(self, images, prompts):
        if any(image.width == 30 for image in images):
            {}
        return [[] for _ in images]
"""


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("raise OSError('a file is gone')", "OSError: a file is gone"),
        ("None.width", "AttributeError: 'NoneType' object has no attribute 'width'"),
        ("numpy.zeros(2) @ numpy.zeros(3)", "ValueError: matmul: "),
        ("Region(id=1, box=(3, 3, 1, 1), area=1, source='me')", "ValidationError: 1 validation error for Region"),
        ("return None", "ProposalError: expected a list of regions per image, got NoneType"),
        ("return [[]] * 9", "ProposalError: 9 lists of regions for 1 images"),
    ],
)
def test_an_error_of_a_users_grounder_is_an_outcome_of_its_image(here: Path, statement: str, message: str) -> None:
    outcomes = ground(written(here, statement), images(20, 30, 40), ["p"] * 3, max_regions=8)
    assert [error is None for _, error in outcomes] == [True, False, True]
    assert outcomes[1][1] is not None and outcomes[1][1].startswith(message)


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("raise MemoryError('out of memory')", MemoryError),
        ("import torch; raise torch.OutOfMemoryError('out of memory')", torch.OutOfMemoryError),
        ("rle_decode(MaskRLE(size=(2, 2), counts=[1]))", ValueError),  # inside a module of ours
        ("super().propose([None], prompts)", AttributeError),
    ],
)
def test_memory_that_runs_out_and_faults_of_ours_end_the_stage(
    here: Path, statement: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        ground(written(here, statement), images(20, 30, 40), ["p"] * 3, max_regions=8)


def test_a_fault_in_a_shipped_grounder_a_library_below_it_or_a_filter_ends_the_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fault(*arguments: object, **named: object) -> None:
        raise ValueError("a fault of ours")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="a fault of ours"):
        patch.setattr("cv2.cvtColor", fault)
        ground(load_grounder("classical", None), images(20), ["p"], max_regions=8)
    with pytest.raises(ValueError, match="a fault of ours"):
        ground(GridGrounder(2), images(20), ["p"], max_regions=8, relevant=fault)  # type: ignore[arg-type]


def written(folder: Path, statement: str) -> Grounder:
    (folder / "grounds_so.py").write_text(GROUNDER.format(statement))
    sys.modules.pop("grounds_so", None)
    return load_grounder("grounds_so:Mine", None)


def test_limits_on_area_and_overlap_come_before_the_number() -> None:
    big, near, small = region((0, 0, 10, 10)), region((0, 0, 10, 9)), region((15, 5, 20, 10))
    grounder = Scripted({20: [big, near, small, region((0, 0, 1, 1))]})

    def kept(**limits: float) -> list[Box]:
        ((regions, _),) = ground(grounder, images(20), ["p"], max_regions=2, **limits)
        return [found.box for found in regions if found.id != 0]

    assert kept() == [big.box, near.box]
    assert kept(max_overlap=0.5) == [big.box, small.box]
    assert kept(max_area=0.46) == [near.box, small.box]
    assert kept(min_area=0.2) == [big.box, near.box]
    assert kept(min_area=0.6) == []


def test_boxes_that_share_a_pixel_leave_nothing_between_them() -> None:
    ((regions, _),) = ground(GridGrounder(3), images(20), ["p"], max_regions=9)
    assert [r.id for r in regions] == list(range(1, 10))


def test_a_grounder_that_forgets_an_image() -> None:
    class Forgetful(Scripted):
        def propose(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[list[Region]]:
            return super().propose(images, prompts)[:1]

    outcomes = ground(Forgetful({20: [], 30: []}), images(20, 30), ["p", "p"], max_regions=8)
    assert [error for _, error in outcomes] == [None, None]
    assert ground(Scripted({}), [], [], max_regions=8) == []


class Believer:
    """Says yes with the probability 0.9 where the box begins at the left border, else with 0.2."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def score(self, contexts: Sequence[Sequence[Segment]], continuations: Sequence[str]) -> list[torch.Tensor]:
        assert list(continuations) == ["Yes", "No"]
        self.asked.append(len(contexts))
        assert len({id(context[0]) for context in contexts}) == 1  # one image, looked at once
        questions = [context[1].text or "" for context in contexts]
        assert all("a cat" in question for question in questions)
        yes = [0.9 if "[0, " in question else 0.2 for question in questions]
        return [torch.tensor([p, 1 - p]).log() - 3 for p in yes]


def test_regions_that_do_not_bear_on_the_prompt_become_background() -> None:
    model = Believer()
    grounder = Scripted({20: [region((0, 0, 2, 2)), region((5, 5, 20, 10))] * 40, 30: []})
    relevant = RelevanceFilter(model, 0.5)  # type: ignore[arg-type]
    (some, _), (none, _) = ground(grounder, images(20, 30), ["a cat"] * 2, max_regions=50, relevant=relevant)
    assert {found.box for found in some if found.id != 0} == {(0, 0, 2, 2)} and len(some) == 41
    assert some[-1].area == 196 and [found.id for found in none] == [0]
    assert model.asked == [64, 16]
    never = RelevanceFilter(model, 0.95)  # type: ignore[arg-type]
    assert [found.id for found in ground(grounder, images(20), ["a cat"], 8, relevant=never)[0][0]] == [0]


def test_shipped_grounders_by_name() -> None:
    assert isinstance(load_grounder("classical", MODEL), ClassicalGrounder)  # type: ignore[arg-type]
    assert isinstance(load_grounder("grid", MODEL), GridGrounder)  # type: ignore[arg-type]
    native = load_grounder("native", MODEL)  # type: ignore[arg-type]
    assert isinstance(native, NativeGrounder) and native.model is MODEL


def test_options_are_arguments_of_the_constructor() -> None:
    grid = load_grounder("grid", MODEL, side=5)  # type: ignore[arg-type]
    assert isinstance(grid, GridGrounder) and grid.side == 5
    native = load_grounder("native", MODEL, frame="thousand", max_tokens=9)  # type: ignore[arg-type]
    assert isinstance(native, NativeGrounder) and (native.frame, native.decoding.max_tokens) == ("thousand", 9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grid", {"sides": 5}, "grounder 'grid': got an unexpected keyword argument 'sides'; its options are: side"),
        ("grid", {"model": MODEL}, "unexpected keyword argument 'model'"),
        ("grid", {"side": 0}, "grounder 'grid': side: Input should be greater than or equal to 1, got 0"),
        ("classical", {"min_area": "much"}, "grounder 'classical': min_area: Input should be a valid number"),
        ("native", {"frame": "percent"}, "grounder 'native': frame: Input should be 'model', 'pixels' or 'thousand'"),
        ("sam", {"min_iou": 2.0}, "grounder 'sam': min_iou: Input should be less than or equal to 1, got 2.0"),
        ("segment_anything", {}, "missing a required argument: 'checkpoint'; its options are: checkpoint, points_per"),
    ],
)
def test_options_that_a_grounder_does_not_take(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(GrounderError) as error:
        load_grounder(name, MODEL, **options)  # type: ignore[arg-type]
    assert message in str(error.value) and "\n" not in str(error.value)


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


def test_a_users_grounder_has_options_and_may_ask_for_the_model(here: Path) -> None:
    (here / "my_other_grounder.py").write_text(
        "class Mine:\n"
        "    def __init__(self, model, size=3):\n        self.all = (model, size)\n"
        "    def propose(self, images, prompts):\n        return [[] for _ in images]\n"
    )
    assert load_grounder("my_other_grounder:Mine", MODEL, size=4).all == (MODEL, 4)  # type: ignore[arg-type, attr-defined]
    with pytest.raises(GrounderError, match="its options are: size"):
        load_grounder("my_other_grounder:Mine", MODEL, sise=4)  # type: ignore[arg-type]


def test_a_grounder_that_asks_for_a_device_is_given_the_models(here: Path) -> None:
    (here / "my_large_grounder.py").write_text(
        "class Mine:\n"
        "    def __init__(self, device):\n        self.device = device\n"
        "    def propose(self, images, prompts):\n        return [[] for _ in images]\n"
    )
    model = SimpleNamespace(device=torch.device("cuda", 1))
    assert load_grounder("my_large_grounder:Mine", model).device == "cuda:1"  # type: ignore[arg-type, attr-defined]
    own = load_grounder("my_large_grounder:Mine", model, device="cpu")  # type: ignore[arg-type]
    assert own.device == "cpu"  # type: ignore[attr-defined]


def test_the_grounder_of_an_installed_package(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = here / "their_package-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[srum.grounders]\ntheirs = their_package:Theirs\ngrid = their_package:Theirs\ngone = no_such_package:Gone\n"
    )
    (here / "their_package.py").write_text(
        "class Theirs:\n    def propose(self, images, prompts):\n        return [[] for _ in images]\n"
    )
    monkeypatch.syspath_prepend(here)
    assert type(load_grounder("theirs", MODEL)).__name__ == "Theirs"  # type: ignore[arg-type]
    assert isinstance(load_grounder("grid", MODEL), GridGrounder)  # type: ignore[arg-type]  # shipped names stay
    with pytest.raises(GrounderError, match="grounder 'gone': no module 'no_such_package'"):
        load_grounder("gone", MODEL)  # type: ignore[arg-type]
    with pytest.raises(GrounderError, match="grid, theirs, gone or module:Name"):
        load_grounder("other", MODEL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sift", f"no grounder 'sift': give one of {', '.join(SHIPPED)} or module:Name"),
        ("sift:", "no grounder"),
        (":Mine", "no grounder"),
        ("no_such_module_here:Mine", "no module 'no_such_module_here'"),
        ("no_such_package.part:Mine", "no module 'no_such_package'"),
        ("a_module_of_mine:Nothing", "has no 'Nothing'"),
        ("a_module_of_mine:value", "it is no class"),
        ("a_module_of_mine:Empty", "Empty has no method propose"),
    ],
)
def test_grounders_that_cannot_be_found(here: Path, name: str, message: str) -> None:
    (here / "a_module_of_mine.py").write_text("value = 3\nclass Empty: ...\n")
    with pytest.raises(GrounderError, match=message):
        load_grounder(name, MODEL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("FileNotFoundError(3)", "grounder 'raises_so:Mine': FileNotFoundError: 3"),
        ("ValueError('two\\nlines')", "grounder 'raises_so:Mine': ValueError: two lines"),
        ("GrounderError('no weights')", "no weights"),
    ],
)
def test_errors_of_a_constructor_name_the_grounder(here: Path, raised: str, message: str) -> None:
    code = f"class Mine:\n    def __init__(self): raise {raised}\n    def propose(self, images, prompts): ...\n"
    (here / "raises_so.py").write_text(f"from srum.grounding.base import GrounderError\n{code}")
    sys.modules.pop("raises_so", None)
    with pytest.raises(GrounderError) as error:
        load_grounder("raises_so:Mine", MODEL)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_an_error_inside_the_users_module_is_shown_as_it_is(here: Path) -> None:
    (here / "needs_something.py").write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_grounder("needs_something:Mine", MODEL)  # type: ignore[arg-type]


def test_filters() -> None:
    big, half, small = region((0, 0, 10, 10)), region((0, 0, 10, 5)), region((8, 8, 10, 10))
    all_three = [small, half, big]
    assert by_area(all_three, (10, 10), low=0.05, high=0.9) == [half]
    assert without_overlaps(all_three, 0.4) == [small, half]
    assert without_overlaps(all_three, 0.5) == all_three
    assert without_overlaps([], 0.5) == []


BOXES = st.tuples(*[st.integers(0, 12)] * 4).map(lambda b: (b[0], b[1], b[0] + 1 + b[2], b[1] + 1 + b[3]))
REGIONS = st.lists(BOXES.map(region), max_size=12)


@settings(max_examples=50)
@given(REGIONS, st.sampled_from([0.0, 0.21, 0.37, 0.51, 0.73, 1.0]))
def test_overlaps_go_as_by_the_definition(regions: list[Region], threshold: float) -> None:
    overlaps = [[iou(found.box, other.box) for other in regions] for found in regions]
    assume(threshold in (0.0, 1.0) or all(abs(value - threshold) >= 1e-5 for row in overlaps for value in row))
    kept: list[int] = []
    for index in range(len(regions)):
        if all(overlaps[index][earlier] <= threshold for earlier in kept):
            kept.append(index)
    assert without_overlaps(regions, threshold) == [regions[index] for index in kept]


@settings(max_examples=50)
@given(REGIONS, st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_filters_keep_the_order_and_what_they_say(regions: list[Region], fractions: tuple[float, float]) -> None:
    low, high = sorted(fractions)
    for kept in (by_area(regions, (10, 10), low, high), without_overlaps(regions, 0.5)):
        rest = iter(regions)
        assert all(any(found is other for other in rest) for found in kept)
    assert by_area(regions, (10, 10), low, high) == [r for r in regions if 100 * low <= r.area <= 100 * high]


@settings(max_examples=50)
@given(st.lists(BOXES, max_size=12), st.integers(1, 12))
def test_any_boxes_end_in_numbered_regions_inside_the_image(boxes: list[Box], max_regions: int) -> None:
    ((regions, error),) = ground(Scripted({8: [region(box) for box in boxes]}), images(8), ["p"], max_regions)
    if error is not None:
        assert error.startswith("ProposalError") and all(box[0] >= 8 or box[1] >= 10 for box in boxes) and boxes
        return
    things = [found for found in regions if found.id != 0]
    assert [found.id for found in things] == list(range(1, len(things) + 1)) and len(things) <= max_regions
    assert [found.area for found in things] == sorted((found.area for found in things), reverse=True)
    for found in things:
        x0, y0, x1, y1 = found.box
        assert 0 <= x0 < x1 <= 8 and 0 <= y0 < y1 <= 10 and found.area == (x1 - x0) * (y1 - y0)
    covered = np.zeros((10, 8), bool)
    for found in things:
        x0, y0, x1, y1 = map(int, found.box)
        covered[y0:y1, x0:x1] = True
    left = [found.area for found in regions if found.id == 0]
    assert left == ([80 - covered.sum()] if not covered.all() else [])
