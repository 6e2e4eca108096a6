"""What a model sees in images: scores against verdicts, and short questions whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL.Image import Image, fromarray

from srum import models
from srum.evaluation.understanding import alignment, answered, questions
from srum.shapes.render import render
from srum.shapes.scenes import Scene, Thing

RED, BLUE = Thing("circle", "red", "large", 0, 0), Thing("square", "blue", "large", 2, 3)


def picture(*things: Thing) -> Image:
    return fromarray(render(Scene(things)))


def test_alignment_by_hand() -> None:
    """Of three right images two are seen as such, of two wrong ones one; a judgement that failed is a wrong one."""
    told = alignment([0.9, 0.2, -0.1, 0.5, None], [True, True, True, False, False])
    assert told.accuracy == pytest.approx(2 / 5) and told.balanced == pytest.approx((2 / 3 + 0) / 2)
    assert told.auroc == pytest.approx(1 / 3) and told.failures == 1 and told.n == 5


def test_where_all_images_are_right_nothing_is_balanced() -> None:
    told = alignment([0.9, -0.2], [True, True])
    assert (told.accuracy, told.balanced, told.auroc) == (0.5, None, None)
    with pytest.raises(ValueError, match="no scores"):
        alignment([], [])


def test_questions_have_the_answers_of_the_scene() -> None:
    """Of one red circle and one blue square, whatever is drawn by the seed."""
    for seed in range(20):
        count, cell, relation, exists = questions(picture(RED, BLUE), seed)
        assert count[1] == str(sum(f"{shape}s" in count[0] for shape in ("circle", "square")))
        there = {"r1 c1": "large red circle", "r3 c4": "large blue square"}
        assert cell[1] == next((thing for place, thing in there.items() if place in cell[0]), "nothing")
        of_both = "red circle" in relation[0] and "blue square" in relation[0]
        turned = relation[0].index("red circle") > relation[0].index("blue square") if of_both else False
        holds = any(kind in relation[0] for kind in (("right of", "below") if turned else ("left of", "above")))
        assert relation[1] == ("yes" if of_both and holds else "no")
        assert exists[1] == ("yes" if any(t in exists[0] for t in ("red circle", "blue square")) else "no")


def test_nothing_is_asked_of_what_is_badly_drawn() -> None:
    spoilt = np.asarray(picture(RED, BLUE)).copy()
    spoilt[:8, :14] = spoilt[-1, -1]  # the circle's upper half is gone
    assert questions(fromarray(spoilt), 0) == [] and questions(picture(), 0) == []


def test_the_shipped_model_answers() -> None:
    model = models.load("srum-tiny", "cpu")
    right = answered(model, [picture(RED), picture(RED, BLUE)], 0)
    assert len(right) == 8 and sum(right) >= 6
