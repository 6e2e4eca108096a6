"""Laws of the rasterizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srum.geometry import rle_encode
from srum.records import Box, Candidate, Failure, Grounding, Judgement, LayoutJudgement, Region, RegionJudgement, Size
from srum.reward_map import Overlap, Skipped, rasterize, sample_score

OVERLAPS: tuple[Overlap, ...] = ("smallest", "mean", "max", "min")
QUICK = settings(max_examples=40, deadline=None)


def candidate(size: Size = (16, 16)) -> Candidate:
    return Candidate(id="c", prompt_id="p", prompt="two cats", index=0, seed=0, image="c.png", latent="c.st", size=size)


def region(index: int, box: Box, mask: np.ndarray | None = None) -> Region:
    area = (box[2] - box[0]) * (box[3] - box[1]) if mask is None else float(mask.sum())
    return Region(id=index, box=box, area=area, source="test", mask=None if mask is None else rle_encode(mask))


def judgement(scores: dict[int, float | None], layout: float | None = 1.0) -> Judgement:
    def failure(score: float | None) -> Failure | None:
        return Failure.NO_SCORE if score is None else None

    regions = [RegionJudgement(region_id=i, score=score, failure=failure(score)) for i, score in scores.items()]
    return Judgement(candidate_id="c", regions=regions, layout=LayoutJudgement(score=layout, failure=failure(layout)))


def reward(
    boxes: list[Box], scores: dict[int, float | None], size: Size = (16, 16), grid: Size = (4, 4), **options: str
) -> Tensor:
    grounding = Grounding(candidate_id="c", regions=[region(i, box) for i, box in enumerate(boxes, start=1)])
    outcome = rasterize(candidate(size), grounding, judgement(scores), grid, **options)  # type: ignore[arg-type]
    assert not isinstance(outcome, Skipped)
    return outcome[0]


@st.composite
def boxes_of(draw: st.DrawFn, width: float = 16, height: float = 16) -> Box:
    x = draw(st.floats(0, width - 1))
    y = draw(st.floats(0, height - 1))
    return x, y, draw(st.floats(x + 0.5, width)), draw(st.floats(y + 0.5, height))


scores_in_range = st.floats(-1, 1)
some_boxes = st.lists(boxes_of(), min_size=1, max_size=4)


def test_by_hand() -> None:
    """The example of srum/reward_map.py: of two regions of equal area, the later one wins the shared column."""
    boxes: list[Box] = [(0, 0, 2, 2), (1, 0, 3, 2)]
    assert reward(boxes, {1: 1.0, 2: -1.0}, size=(4, 4), grid=(2, 2)).tolist() == [[0.0, -0.5], [0.0, 0.0]]


def test_by_hand_for_every_overlap_rule() -> None:
    """One cell of 4x4 px. The box (0, 0, 4, 2), score 0.8, and in it (0, 0, 2, 2), score -0.4; background 0.2 below.

    Quarters of the cell: shared, only the larger, background twice. smallest and min: (-0.4 + 0.8 + 0.4) / 4 = 0.2;
    max: (0.8 + 0.8 + 0.4) / 4 = 0.5; mean: (0.2 + 0.8 + 0.4) / 4 = 0.35.
    """
    boxes: list[Box] = [(0, 0, 4, 2), (0, 0, 2, 2)]
    scores: dict[int, float | None] = {0: 0.2, 1: 0.8, 2: -0.4}
    values = {rule: reward(boxes, scores, (4, 4), (1, 1), overlap=rule).item() for rule in OVERLAPS}
    assert values == pytest.approx({"smallest": 0.2, "min": 0.2, "max": 0.5, "mean": 0.35})


@QUICK
@given(some_boxes, st.sampled_from(OVERLAPS), st.sampled_from(["signed", "unit"]))
def test_all_ones_give_a_map_of_ones(boxes: list[Box], overlap: str, mapping: str) -> None:
    ones = dict.fromkeys(range(len(boxes) + 1), 1.0)
    assert torch.allclose(reward(boxes, ones, overlap=overlap, mapping=mapping), torch.ones(4, 4))  # type: ignore[arg-type]


@QUICK
@given(some_boxes, st.lists(scores_in_range, min_size=5, max_size=5), st.floats(0, 2), st.sampled_from(OVERLAPS))
def test_a_lower_score_lowers_its_cells_and_no_others(
    boxes: list[Box], values: list[float], drop: float, overlap: str
) -> None:
    scores: dict[int, float | None] = dict(enumerate(values[: len(boxes) + 1]))
    before = reward(boxes, scores, overlap=overlap)
    after = reward(boxes, scores | {1: max(-1.0, values[1] - drop)}, overlap=overlap)
    x0, y0, x1, y1 = boxes[0]
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[int(y0 // 4) : int(-(-y1 // 4)), int(x0 // 4) : int(-(-x1 // 4))] = True
    assert (after <= before + 1e-6).all()
    assert torch.equal(after[~inside], before[~inside])


@QUICK
@given(boxes_of(), boxes_of(), scores_in_range)
def test_the_default_rule_lets_criticism_of_the_smallest_region_reach_its_cells(
    small: Box, large: Box, score: float
) -> None:
    """Wherever the smaller of two regions covers a whole cell, the cell has exactly its score."""
    first, second = sorted((small, large), key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    rewards = reward([first, second], {0: 1.0, 1: score, 2: 1.0})
    full = reward([first], {0: 0.0, 1: 1.0}) > 1 - 1e-9
    assert torch.allclose(rewards[full], torch.tensor(score, dtype=torch.float32), atol=1e-6)


@QUICK
@given(some_boxes, st.lists(scores_in_range, min_size=5, max_size=5), st.sampled_from(OVERLAPS))
def test_mirrored_boxes_mirror_the_map(boxes: list[Box], values: list[float], overlap: str) -> None:
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes]
    boxes = [box for i, box in enumerate(boxes) if all(abs(areas[i] - a) > 1e-3 for a in areas[:i])]  # no near ties
    scores: dict[int, float | None] = dict(enumerate(values[: len(boxes) + 1]))
    mirrored: list[Box] = [(16 - x1, y0, 16 - x0, y1) for x0, y0, x1, y1 in boxes]
    expected = reward(boxes, scores, overlap=overlap).flip(1)
    assert torch.allclose(reward(mirrored, scores, overlap=overlap), expected, atol=1e-5)


@QUICK
@given(some_boxes, st.lists(scores_in_range, min_size=5, max_size=5), st.sampled_from(OVERLAPS))
def test_the_map_stays_between_the_scores_and_unit_is_its_affine_image(
    boxes: list[Box], values: list[float], overlap: str
) -> None:
    scores: dict[int, float | None] = dict(enumerate(values[: len(boxes) + 1]))
    signed = reward(boxes, scores, size=(13, 17), grid=(4, 5), overlap=overlap)
    known = [score for score in scores.values() if score is not None]
    assert min(known) - 1e-6 <= signed.min() and signed.max() <= max(known) + 1e-6
    unit = reward(boxes, scores, size=(13, 17), grid=(4, 5), overlap=overlap, mapping="unit")
    assert torch.allclose(unit, (signed + 1) / 2)


def test_a_mask_counts_by_its_pixels() -> None:
    mask = np.zeros((16, 16), bool)
    mask[:4, :4] = np.eye(4, dtype=bool)
    grounding = Grounding(candidate_id="c", regions=[region(1, (0, 0, 4, 4), mask)])
    outcome = rasterize(candidate(), grounding, judgement({1: -1.0}), (4, 4))
    assert isinstance(outcome, tuple)
    assert outcome[0][0].tolist() == [-0.25, 0.0, 0.0, 0.0]


def test_alpha_is_the_layout_mapped_to_zero_one_and_zero_is_kept() -> None:
    for layout, alpha in ((-1.0, 0.0), (0.0, 0.5), (0.4, 0.7), (1.0, 1.0)):
        outcome = rasterize(candidate(), Grounding(candidate_id="c", regions=[]), judgement({0: 0.5}, layout), (4, 4))
        assert isinstance(outcome, tuple)
        assert outcome[1] == pytest.approx(alpha)
        assert torch.equal(outcome[0], torch.full((4, 4), 0.5))


def test_a_background_that_nobody_judged_is_neutral() -> None:
    assert reward([(0, 0, 16, 4)], {1: -1.0}).tolist() == [[-1.0] * 4] + [[0.0] * 4] * 3


def test_failures_are_outcomes() -> None:
    regions = [region(1, (0, 0, 4, 4)), region(2, (8, 8, 12, 12))]
    found = Grounding(candidate_id="c", regions=regions)
    lost = Grounding(candidate_id="c", regions=[], error="RuntimeError: out of memory")
    partly = judgement({0: 0.5, 1: 1.0, 2: None})
    assert rasterize(candidate(), lost, judgement({}), (4, 4)) is Skipped.GROUNDING_FAILED
    assert rasterize(candidate(), found, judgement({1: 1.0}, None), (4, 4), on_failure="keep") is Skipped.LAYOUT_FAILED
    assert rasterize(candidate(), found, judgement({1: None}), (4, 4), on_failure="keep") is Skipped.NOTHING_JUDGED
    assert rasterize(candidate(), found, judgement({}), (4, 4)) is Skipped.NOTHING_JUDGED
    assert rasterize(candidate(), found, partly, (4, 4)) is Skipped.REGION_FAILED
    kept = rasterize(candidate(), found, partly, (4, 4), on_failure="keep")
    assert isinstance(kept, tuple)
    expected = torch.full((4, 4), 0.5)
    expected[0, 0], expected[2, 2] = 1.0, 0.0
    assert torch.equal(kept[0], expected)


@pytest.mark.parametrize(
    ("scores", "layout", "expected"),
    [
        ({0: 1.0, 1: 0.9}, 0.4, 0.9),  # a neutral layout does not count against it
        ({0: 1.0, 1: 0.9}, 1.0, 0.9),
        ({0: -0.5, 1: 0.9}, 1.0, -0.5),  # the background counts
        ({1: 1.0}, -1.0, -1.0),
        ({1: 1.0}, -0.3, 0.0),  # the middle of [-1, 0.4]
        ({1: 1.0}, 0.4, 1.0),
        ({1: 0.2, 2: None}, 1.0, 0.2),
    ],
)
def test_sample_score(scores: dict[int, float | None], layout: float, expected: float) -> None:
    assert sample_score(judgement(scores, layout)) == pytest.approx(expected)


@given(st.lists(scores_in_range, min_size=1, max_size=4), scores_in_range, st.floats(0, 1))
def test_sample_score_stays_in_range_and_follows_the_layout(values: list[float], layout: float, drop: float) -> None:
    scores: dict[int, float | None] = dict(enumerate(values))
    score = sample_score(judgement(scores, layout))
    assert -1 <= sample_score(judgement(scores, max(-1.0, layout - drop))) <= score <= min(values)


@pytest.mark.parametrize("bad", [judgement({1: None}), judgement({}), judgement({1: 1.0}, None)])
def test_sample_score_of_a_failed_judgement(bad: Judgement) -> None:
    with pytest.raises(ValueError, match="candidate c"):
        sample_score(bad)
