"""The measures of the judge: AUROC by hand and by its laws, and judges whose quality is known."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from srum.evaluation.judge_quality import FlippedRelations, Separation, auroc, flipped_relations, judge_quality
from srum.records import Candidate, Failure, Grounding, Judgement, LayoutJudgement, Region, RegionJudgement
from srum.shapes.prompts import to_metadata
from srum.shapes.render import render
from srum.shapes.scenes import COLOURS, SHAPES, Relation, Scene, Spec, Thing, Want
from srum.shapes.truth import found_layout_truth

# --- AUROC


@pytest.mark.parametrize(
    ("scores", "right", "expected"),
    [
        ([0.1, 0.9], [False, True], 1.0),
        ([0.9, 0.1], [False, True], 0.0),
        ([0.5, 0.5], [False, True], 0.5),
        ([0.1, 0.4, 0.35, 0.8], [False, False, True, True], 3 / 4),  # 0.35 is above 0.1 only, 0.8 above both
        ([-1, 0, 0, 1], [False, True, False, True], 3.5 / 4),  # one of four pairs is a tie
        ([1, 1, 1, 0], [True, True, False, False], (0.5 + 1 + 0.5 + 1) / 4),
    ],
)
def test_auroc_by_hand(scores: list[float], right: list[bool], expected: float) -> None:
    assert auroc(scores, right) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        ([0.1, 0.2], [True, True], "2 right and 0 wrong"),
        ([0.1], [False], "0 right and 1 wrong"),
        ([], [], "0 right and 0 wrong"),
        ([float("nan"), 0.2], [True, False], "a number for each of 2 labels"),
        ([0.1, 0.2, 0.3], [True, False], "got 3 scores"),
    ],
)
def test_auroc_is_never_a_guess(scores: list[float], right: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auroc(scores, right)


# Whole numbers, so that a monotone map of theirs is monotone in floating point too.
labelled = st.lists(st.tuples(st.integers(-10, 10), st.booleans()), min_size=2, max_size=40).filter(
    lambda pairs: len({right for _, right in pairs}) == 2
)


@given(labelled)
def test_auroc_depends_on_the_order_alone(pairs: list[tuple[int, bool]]) -> None:
    scores, right = [score for score, _ in pairs], [label for _, label in pairs]
    for monotone in (lambda x: x**3 + 5.0, lambda x: 2.0**x, lambda x: 0.1 * x - 7):
        assert auroc([monotone(score) for score in scores], right) == pytest.approx(auroc(scores, right), abs=1e-12)


@given(labelled)
def test_auroc_is_symmetric(pairs: list[tuple[int, bool]]) -> None:
    """Turning the scores round, or the labels, turns it round; both leave it; so does another order of the items."""
    scores, right = [score for score, _ in pairs], [label for _, label in pairs]
    value, turned, wrong = auroc(scores, right), [-score for score in scores], [not label for label in right]
    assert auroc(turned, right) == pytest.approx(1 - value, abs=1e-12)
    assert auroc(scores, wrong) == pytest.approx(1 - value, abs=1e-12)
    assert auroc(turned, wrong) == pytest.approx(value, abs=1e-12)
    assert auroc(scores[::-1], right[::-1]) == pytest.approx(value, abs=1e-12)


@given(labelled)
def test_auroc_is_the_share_of_pairs_in_order(pairs: list[tuple[int, bool]]) -> None:
    above = [1.0 if good > bad else 0.5 if good == bad else 0.0 for good, a in pairs if a for bad, b in pairs if not b]
    assert auroc([score for score, _ in pairs], [right for _, right in pairs]) == pytest.approx(np.mean(above))


# --- a round

CIRCLE, SQUARE = Thing("circle", "red", "large", 0, 0), Thing("square", "blue", "large", 0, 3)
ASKED = Spec((Want("circle", "red"), Want("square", "blue")), "color_attr")
METADATA = {"p": to_metadata(ASKED)}
SHOWN = (  # things, and what is right: the circle, the second thing, the background, the layout
    ((CIRCLE, SQUARE), (True, True, True, True)),
    ((CIRCLE, Thing("square", "green", "large", 0, 3)), (True, False, True, True)),
    ((CIRCLE, Thing("star", "blue", "large", 0, 3)), (True, False, False, True)),
    ((CIRCLE,), (True, None, False, False)),
)


def round_of(scores: Sequence[Sequence[float | None]]) -> tuple:
    """The records of a round of ``SHOWN``, judged with the scores."""
    candidates, groundings, judgements, images = [], [], [], []
    for index, ((things, _), given_scores) in enumerate(zip(SHOWN, scores, strict=True)):
        name, boxes = f"p-{index}", [thing.box for thing in things]
        regions = [Region(id=i, box=box, area=1, source="test") for i, box in enumerate(boxes, start=1)]
        regions.append(Region(id=0, box=(0, 0, 64, 64), area=1, source="background"))
        of_regions = [*given_scores[: len(things)], given_scores[2]]
        candidates.append(
            Candidate(
                id=name, prompt_id="p", prompt="x", index=index, seed=0, image="x.png", latent="x.st", size=(64, 64)
            )
        )
        groundings.append(Grounding(candidate_id=name, regions=regions))
        judgements.append(
            Judgement(
                candidate_id=name,
                regions=[
                    RegionJudgement(region_id=region.id, score=score, failure=None if score is not None else NO_SCORE)
                    for region, score in zip(regions, of_regions, strict=True)
                ],
                layout=LayoutJudgement(score=given_scores[3]),
            )
        )
        images.append(Image.fromarray(render(Scene(things))))
    return candidates, groundings[::-1], judgements[::-1], METADATA, images


NO_SCORE = Failure.NO_SCORE


def test_a_judge_that_knows_the_truth_and_one_that_knows_it_wrong() -> None:
    truth = [[1.0 if right else -0.5 for right in rights] for _, rights in SHOWN]
    known = judge_quality(*round_of(truth))
    assert known.regions == Separation(1.0, right=5, wrong=2, failures=0)
    assert known.background == Separation(1.0, right=2, wrong=2, failures=0)
    assert known.layout == Separation(1.0, right=3, wrong=1, failures=0)
    wrong = judge_quality(*round_of([[-score for score in scores] for scores in truth]))
    assert [wrong.regions.auroc, wrong.background.auroc, wrong.layout.auroc] == [0.0, 0.0, 0.0]


def test_failures_are_counted_and_left_out() -> None:
    """Without the two scores of the wrong regions there is nothing left to separate."""
    scores: list[list[float | None]] = [[0.5, 0.5, 0.5, 0.5] for _ in SHOWN]
    scores[1][1] = scores[2][1] = None
    quality = judge_quality(*round_of(scores))
    assert quality.regions == Separation(None, right=5, wrong=0, failures=2)
    assert quality.background == Separation(0.5, right=2, wrong=2, failures=0)


# --- flipped relations


class FakeJudge:
    """Scores layouts by a function of the image and the prompt."""

    def __init__(self, score: object) -> None:
        self.score = score

    def judge(
        self, images: Sequence[Image.Image], prompts: Sequence[str], regions: Sequence[Sequence[Region]]
    ) -> list[tuple[list[RegionJudgement], LayoutJudgement]]:
        assert not any(regions)
        scores = [self.score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]  # type: ignore[operator]
        return [([], LayoutJudgement(score=s, failure=None if s is not None else NO_SCORE)) for s in scores]


def read(prompt: str) -> Spec:
    """What a prompt about positions asks for, read from its words."""
    nouns = re.findall(rf"(?:a|one) (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})\b", prompt)
    wants = tuple(Want(shape, colour or None) for colour, shape in nouns)
    words = {"left": "left of", "right": "right of", "above": "above", "below": "below", "under": "below"}
    kind = next(kind for word, kind in words.items() if re.search(rf"\b{word}\b", prompt))
    subject = 1 if " with " in prompt else 0  # "a square with a circle to its left"
    return Spec(wants, "position", Relation(subject, kind, 1 - subject))


def oracle(image: Image.Image, prompt: str) -> float:
    return 1.0 if found_layout_truth(np.asarray(image), to_metadata(read(prompt))) else -1.0


def test_an_oracle_rejects_every_flipped_relation_and_accepts_every_other() -> None:
    assert flipped_relations(FakeJudge(oracle), 60, seed=0) == FlippedRelations(1.0, 1.0, 60)


def test_a_judge_that_sees_the_things_and_not_their_places_rejects_none() -> None:
    assert flipped_relations(FakeJudge(lambda image, prompt: 0.4), 10, seed=1) == FlippedRelations(0.0, 1.0, 10)


def test_neutral_scores_and_failures_neither_reject_nor_accept() -> None:
    for score in (0.0, None):
        assert flipped_relations(FakeJudge(lambda image, prompt, s=score: s), 10, seed=1) == FlippedRelations(0, 0, 10)
