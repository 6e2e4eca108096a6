"""The truth labels, by hand, and their agreement with the checker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from srum.shapes.checker import check
from srum.shapes.hard_negatives import perturb
from srum.shapes.prompts import sample_spec, to_metadata
from srum.shapes.render import render
from srum.shapes.scenes import Relation, Scene, Spec, Thing, Want, sample_scene
from srum.shapes.truth import Truth, found_layout_truth, found_region_truth, layout_truth, region_truth

CIRCLE = Thing("circle", "red", "small", 0, 0)
SQUARE = Thing("square", "blue", "large", 0, 3)
ASKED = Spec((Want("circle", "red"), Want("square", size="large")), "size")
LEFT = Spec((Want("circle", "red"), Want("square", "blue")), "position", Relation(0, "left of", 1))


@pytest.mark.parametrize(
    ("things", "index", "damaged", "score", "reason"),
    [
        ((CIRCLE, SQUARE), 0, False, 1.0, "it is asked for"),
        ((CIRCLE, SQUARE), 1, False, 1.0, "it is asked for"),
        ((CIRCLE, SQUARE), 0, True, -1.0, "badly drawn"),
        ((replace(CIRCLE, colour="green"), SQUARE), 0, False, -0.5, "it should be red"),
        ((CIRCLE, replace(SQUARE, size="small")), 1, False, -0.5, "it should be large"),
        ((CIRCLE, SQUARE, replace(CIRCLE, row=2)), 2, False, 1.0, "it is asked for"),  # the layout is to blame
        ((CIRCLE, SQUARE, replace(CIRCLE, row=2, colour="green")), 2, False, -0.5, "it should be red"),
        ((CIRCLE, replace(SQUARE, shape="star")), 1, False, -1.0, "not asked for"),
        ((CIRCLE, SQUARE), None, False, 1.0, "nothing is missing"),
        ((CIRCLE, SQUARE), None, True, -1.0, "it is not clean"),
        ((CIRCLE,), None, False, -1.0, "a large square is missing"),
        ((), None, False, -1.0, "a red circle is missing"),
        ((CIRCLE, replace(SQUARE, size="small")), None, False, 1.0, "nothing is missing"),  # the square is to blame
        ((CIRCLE, replace(CIRCLE, row=2)), None, False, -1.0, "a large square is missing"),
    ],
)
def test_region_truth(things: tuple[Thing, ...], index: int | None, damaged: bool, score: float, reason: str) -> None:
    thing = None if index is None else things[index]
    label = "background" if thing is None else thing.label
    assert region_truth(thing, things, ASKED, damaged) == Truth(score, label, reason)


@pytest.mark.parametrize(
    ("spec", "things", "score", "reason"),
    [
        (ASKED, (CIRCLE, SQUARE), 0.4, "two things as asked"),
        (ASKED, (CIRCLE,), -1.0, "too few things"),
        (ASKED, (CIRCLE, SQUARE, replace(CIRCLE, row=2)), -1.0, "too many things"),
        (LEFT, (CIRCLE, SQUARE), 1.0, "red circle is left of blue square"),
        (LEFT, (replace(CIRCLE, column=3, row=1), SQUARE), -1.0, "red circle is not left of blue square"),
        (LEFT, (replace(CIRCLE, colour="green"), SQUARE), -1.0, "the red circle is missing"),
        (LEFT, (CIRCLE,), -1.0, "too few things"),
    ],
)
def test_layout_truth(spec: Spec, things: tuple[Thing, ...], score: float, reason: str) -> None:
    assert layout_truth(things, spec) == Truth(score, "layout", reason)


def cases(count: int) -> list[tuple[Scene, Spec]]:
    """Scenes right and wrong, half and half, with what was asked for."""
    rng = np.random.default_rng(0)
    result = []
    for index in range(count):
        spec = sample_spec(rng)
        scene = sample_scene(spec, rng)
        result.append((perturb(scene, spec, rng) if index % 2 else scene, spec))
    return result


def test_an_image_is_correct_iff_every_truth_is_good() -> None:
    for scene, spec in cases(800):
        truths = [region_truth(thing, scene.things, spec, False) for thing in (None, *scene.things)]
        good = all(truth.score > 0 for truth in (*truths, layout_truth(scene.things, spec)))
        assert check(render(scene), to_metadata(spec)).correct == good, (scene, spec)


def test_the_truth_of_an_image_is_the_truth_of_its_scene() -> None:
    for scene, spec in cases(300):
        image, metadata = render(scene), to_metadata(spec)
        assert found_layout_truth(image, metadata) == (layout_truth(scene.things, spec).score > 0)
        for thing in (None, *scene.things):
            box = None if thing is None else thing.box
            expected = region_truth(thing, scene.things, spec, False).score > 0
            assert found_region_truth(box, image, metadata) == expected, (scene, spec, thing)


def test_a_box_on_nothing_is_wrong() -> None:
    image, metadata = render(Scene((CIRCLE, SQUARE))), to_metadata(ASKED)
    assert found_region_truth(CIRCLE.box, image, metadata)
    assert not found_region_truth((20.0, 40.0, 30.0, 50.0), image, metadata)
