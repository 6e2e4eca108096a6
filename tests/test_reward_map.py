"""Laws of the rasterizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srum.evaluation.released import reference_map
from srum.geometry import rle_encode
from srum.records import Box, Candidate, Failure, Grounding, Judgement, LayoutJudgement, Region, RegionJudgement, Size
from srum.run import find_method
from srum.stages.reward_map import (
    Overlap,
    Skipped,
    binarized,
    centred,
    rasterize,
    reference_grid,
    sample_score,
    usual_scores,
)
from srum.train.objective import Tokens
from tests.train.ranks import config_of

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
    boxes: list[Box],
    scores: dict[int, float | None],
    size: Size = (16, 16),
    grid: Size = (4, 4),
    masks: dict[int, np.ndarray] | None = None,
    **options: str,
) -> Tensor:
    regions = [region(i, box, (masks or {}).get(i)) for i, box in enumerate(boxes, start=1)]
    grounding = Grounding(candidate_id="c", regions=regions)
    outcome = rasterize(candidate(size), grounding, judgement(scores), grid, **options)  # type: ignore[arg-type]
    assert not isinstance(outcome, Skipped)
    return outcome[0]


@st.composite
def boxes_of(draw: st.DrawFn, width: float = 16, height: float = 16) -> Box:
    x = draw(st.floats(0, width - 1))
    y = draw(st.floats(0, height - 1))
    return x, y, draw(st.floats(x + 0.5, width)), draw(st.floats(y + 0.5, height))


def painted(boxes: list[Box], scores: list[float], masks: dict[int, np.ndarray], overlap: str) -> np.ndarray:
    """The map of an image of 16x16 px on 4x4 cells, the scores painted pixel by pixel, region by region."""
    pixels = np.full((16, 16), scores[0])
    inside = []
    for index, (x0, y0, x1, y1) in enumerate(boxes, start=1):
        covered = np.zeros((16, 16), bool)
        covered[int(y0) : int(y1), int(x0) : int(x1)] = True
        inside.append(masks.get(index, covered))
    if overlap == "mean":
        for y, x in np.ndindex(16, 16):
            here = [score for score, covered in zip(scores[1:], inside, strict=True) if covered[y, x]]
            pixels[y, x] = sum(here) / len(here) if here else scores[0]
    else:
        areas = [float(covered.sum()) for covered in inside]
        priority = {"smallest": [-a for a in areas], "max": scores[1:], "min": [-s for s in scores[1:]]}[overlap]
        for index in sorted(range(len(boxes)), key=priority.__getitem__):
            pixels[inside[index]] = scores[1 + index]
    return pixels.reshape(4, 4, 4, 4).mean(axis=(1, 3))


@st.composite
def whole_boxes(draw: st.DrawFn) -> Box:
    x, y = draw(st.integers(0, 15)), draw(st.integers(0, 15))
    return x, y, draw(st.integers(x + 1, 16)), draw(st.integers(y + 1, 16))


some_masks = st.dictionaries(
    st.integers(1, 4), st.binary(min_size=32, max_size=32).map(lambda b: np.unpackbits(np.frombuffer(b, np.uint8)))
).map(lambda found: {i: bits.reshape(16, 16).astype(bool) for i, bits in found.items() if bits.any()})

scores_in_range = st.floats(-1, 1)
some_boxes = st.lists(boxes_of(), min_size=1, max_size=4)


def test_by_hand() -> None:
    """The example of srum/stages/reward_map.py: of two regions of equal area, the later one wins the shared column."""
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


@QUICK
@given(
    st.lists(whole_boxes(), min_size=1, max_size=4),
    st.lists(scores_in_range, min_size=5, max_size=5),
    some_masks,
    st.sampled_from(OVERLAPS),
)
def test_it_is_painting_pixels_one_region_after_another(
    boxes: list[Box], values: list[float], masks: dict[int, np.ndarray], overlap: str
) -> None:
    values = values[: len(boxes) + 1]
    expected = painted(boxes, values, masks, overlap)
    found = reward(boxes, dict(enumerate(values)), masks=masks, overlap=overlap)
    assert np.allclose(found, expected, atol=1e-6)


@QUICK
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.data())
def test_the_cells_of_a_region_sum_to_its_area(size: Size, grid: Size, data: st.DataObject) -> None:
    height, width = size
    box = data.draw(boxes_of(width, height))
    x0, y0, x1, y1 = box
    covered = reward([box], {0: 0.0, 1: 1.0}, size, grid)
    assert covered.double().sum().item() * height * width == pytest.approx(
        (x1 - x0) * (y1 - y0) * grid[0] * grid[1], rel=1e-5
    )


@QUICK
@given(some_masks, st.sampled_from(OVERLAPS), st.lists(scores_in_range, min_size=5, max_size=5), st.floats(0, 2))
def test_the_laws_hold_for_masks(masks: dict[int, np.ndarray], overlap: str, values: list[float], drop: float) -> None:
    """A lower score lowers cells under its mask and no others; mirrored masks mirror the map."""
    boxes: list[Box] = [(0, 0, 16, 16)] * 4
    masks = {1: np.eye(16, dtype=bool)} | masks
    scores: dict[int, float | None] = dict(enumerate(values))
    before = reward(boxes, scores, masks=masks, overlap=overlap)
    after = reward(boxes, scores | {1: max(-1.0, values[1] - drop)}, masks=masks, overlap=overlap)
    under = torch.from_numpy(masks[1].reshape(4, 4, 4, 4).any(axis=(1, 3)))
    assert (after <= before + 1e-6).all() and torch.equal(after[~under], before[~under])
    mirrored = {index: mask[:, ::-1] for index, mask in masks.items()}
    assert torch.allclose(reward(boxes, scores, masks=mirrored, overlap=overlap), before.flip(1), atol=1e-5)


def test_a_region_that_another_hides_leaves_nothing_at_its_edges() -> None:
    """The same fractional box twice, 1 and then -1: half of the first pixel of two, then the second."""
    boxes: list[Box] = [(0.5, 0, 2, 1)] * 2
    assert reward(boxes, {1: 1.0, 2: -1.0}, (1, 2), (1, 2)).tolist() == [[-0.5, -1.0]]


@QUICK
@given(some_boxes, st.sampled_from(OVERLAPS))
def test_a_map_of_ones_is_plain_flow_matching(boxes: list[Box], overlap: str) -> None:
    """All scores 1, a perfect layout, no constraint: Eq. 1-3 are the flow matching loss of every token."""
    grounding = Grounding(candidate_id="c", regions=[region(i, box) for i, box in enumerate(boxes, start=1)])
    judged = judgement(dict.fromkeys(range(len(boxes) + 1), 1.0), layout=1.0)
    outcome = rasterize(candidate(), grounding, judged, (4, 4), overlap=overlap)  # type: ignore[arg-type]
    assert isinstance(outcome, tuple)
    reward_map, alpha = outcome
    tokens = Tokens("image", torch.rand(16), alpha * reward_map.flatten())
    terms = find_method("srum").terms(tokens, config_of(method="srum", constraint_weight=0.0))
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(dim=0), tokens.error)


def test_boxes_in_place_of_masks() -> None:
    masks = {1: np.eye(16, dtype=bool)}
    boxes: list[Box] = [(0, 0, 16, 16), (0, 0, 8, 8)]
    scores: dict[int, float | None] = {1: 1.0, 2: -1.0}
    in_masks = reward(boxes, scores, masks=masks)
    assert torch.equal(reward(boxes, scores, masks=masks, shape="box"), reward(boxes, scores))
    assert in_masks[0].tolist() == [-0.5, -1.0, 0.0, 0.0]  # the diagonal of 16 px is the smaller region of the two


def test_a_background_that_is_left_neutral() -> None:
    scores: dict[int, float | None] = {0: 0.8, 1: -1.0}
    neutral = reward([(0, 0, 16, 4)], scores, background="neutral")
    assert neutral.tolist() == [[-1.0] * 4] + [[0.0] * 4] * 3


@QUICK
@given(st.lists(boxes_of(30, 20), max_size=4), st.lists(scores_in_range, min_size=5, max_size=5), scores_in_range)
def test_reference_is_the_released_codes_map(boxes: list[Box], values: list[float], layout: float) -> None:
    """Whatever the background: the released code knows none. Times alpha it is the weight of the released loss."""
    scores: dict[int, float | None] = dict(enumerate(values[: len(boxes) + 1]))
    grounding = Grounding(candidate_id="c", regions=[region(i, box) for i, box in enumerate(boxes, start=1)])
    outcome = rasterize(candidate((20, 30)), grounding, judgement(scores, layout), (4, 5), mapping="reference")
    assert isinstance(outcome, tuple)
    rewards, alpha = outcome
    entries = [{"object": "x", "bbox": list(box), "score": scores[i]} for i, box in enumerate(boxes, start=1)]
    expected = reference_grid(reference_map(entries, layout, (30, 20)), (4, 5))
    assert torch.allclose(alpha * rewards, expected, atol=1e-6)
    assert rewards.min() >= 0.5 and rewards.max() <= 1


def all_centred(judgements: list[Judgement], prompts: list[str]) -> list[Judgement]:
    """Each less what is usual for its prompt."""
    usual = usual_scores(judgements, prompts)
    return [centred(one, usual.get(prompt, 0.0)) for one, prompt in zip(judgements, prompts, strict=True)]


def test_centred_scores_by_hand() -> None:
    """Candidates of p score (1 + 0.5) / 2 = 0.75 and -0.25 on average, 0.25 together; one of q scores 0.3 alone."""
    judged = [judgement({0: 1.0, 1: 0.5}), judgement({1: -0.25, 2: None}), judgement({1: 0.3}), judgement({1: None})]
    found = all_centred(judged, ["p", "p", "q", "r"])
    scores = [[region.score for region in one.regions] for one in found]
    assert scores == [[0.75, 0.25], [-0.5, None], [0.0], [None]]
    assert [one.layout for one in found] == [one.layout for one in judged]


def test_binary_scores_by_hand() -> None:
    """Good is above neutral; a failure stays one, and the layout keeps its score."""
    found = binarized(judgement({0: 0.0, 1: 0.1, 2: -0.4, 3: None}, 0.3))
    assert [region.score for region in found.regions] == [-1.0, 1.0, -1.0, None] and found.layout.score == 0.3


@given(st.lists(st.lists(scores_in_range, min_size=1, max_size=3), min_size=1, max_size=5), st.floats(-1, 1))
def test_centred_scores_stay_in_range_and_forget_what_all_share(candidates: list[list[float]], shift: float) -> None:
    half = [[score / 4 for score in scores] for scores in candidates]
    moved = [[score + shift / 2 for score in scores] for scores in half]
    one, other = (
        [
            [region.score or 0.0 for region in judged.regions]
            for judged in all_centred([judgement(dict(enumerate(scores))) for scores in group], ["p"] * len(group))
        ]
        for group in (half, moved)
    )
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, abs=1e-12) and all(-1 <= score <= 1 for score in a)
    assert sum(sum(scores) / len(scores) for scores in one) == pytest.approx(0, abs=1e-9)
    wide = all_centred([judgement(dict(enumerate(scores))) for scores in candidates], ["p"] * len(candidates))
    assert all(-1 <= (region.score or 0) <= 1 for judged in wide for region in judged.regions)


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
    expected[0, 0] = 1.0  # and the failed region's place is the background's
    assert torch.equal(kept[0], expected)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_failed_region_hides_none_that_has_a_score(overlap: str) -> None:
    """A whole image of -1; whatever region fails in it, smaller or last, no cell becomes a neutral 0."""
    boxes: list[Box] = [(0, 0, 16, 16), (0, 0, 8, 8)]
    options = {"on_failure": "keep", "overlap": overlap}
    assert reward(boxes, {1: -1.0, 2: None}, grid=(2, 2), **options).tolist() == [[-1.0] * 2] * 2
    assert reward(boxes[::-1], {1: -0.5, 2: None}, grid=(2, 2), **options).tolist() == [[-0.5, 0.0], [0.0, 0.0]]
    masks = {2: np.eye(16, dtype=bool)}
    assert reward(boxes, {1: -1.0, 2: None}, grid=(2, 2), masks=masks, **options).tolist() == [[-1.0] * 2] * 2
    assert reward(boxes[:1], {0: -1.0, 1: None}, **options).eq(-1).all()
    assert reward(boxes[1:], {0: None, 1: 1.0}, grid=(2, 2), **options).tolist() == [[1.0, 0.0], [0.0, 0.0]]


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
