"""Scenes show exactly what was asked for, and never a held-out pair by chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srum.shapes.checker import check
from srum.shapes.prompts import COLOURED, sample_spec, to_metadata
from srum.shapes.render import BACKGROUND, render
from srum.shapes.scenes import (
    CATEGORIES,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    Relation,
    Scene,
    Spec,
    Thing,
    Want,
    canonical,
    random_scene,
    sample_scene,
    separated,
    shows_held_out,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CATEGORIES), st.integers(0, 2**32))
def test_a_sampled_scene_satisfies_its_spec(category: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = sample_spec(rng, category)
    assert check(render(sample_scene(spec, rng)), to_metadata(spec)).reasons == []


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(COLOURED), st.integers(0, 2**32))
def test_a_compositional_scene_satisfies_its_spec_and_shows_a_held_out_pair(category: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = sample_spec(rng, category, compositional=True)
    scene = sample_scene(spec, rng)
    assert shows_held_out(scene.things)
    assert check(render(scene), to_metadata(spec)).correct


def test_held_out_pairs_are_drawn_only_where_allowed() -> None:
    rng = np.random.default_rng(0)
    specs = [sample_spec(rng) for _ in range(1500)]
    assert not any(shows_held_out(sample_scene(spec, rng).things) for spec in specs)
    drawn = {(t.shape, t.colour) for spec in specs for t in sample_scene(spec, rng, allow_held_out=True).things}
    assert drawn >= HELD_OUT_PAIRS


def test_held_out_pairs_take_each_shape_once() -> None:
    assert sorted(shape for shape, _ in HELD_OUT_PAIRS) == sorted(SHAPES)
    assert len({colour for _, colour in HELD_OUT_PAIRS}) == 4


def test_things_of_one_colour_keep_apart() -> None:
    rng = np.random.default_rng(0)
    assert all(separated(random_scene(7, rng).things) for _ in range(300))
    near = (Thing("square", "red", "large", 0, 0, 1.0), Thing("square", "red", "large", 0, 1, -1.0))
    assert not separated(near)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_box_is_tight(shape: str, size: str) -> None:
    """The visible pixels end within 1 px of the box on every side, and the longer side is 10 or 14.5 px."""
    thing = Thing(shape, "black", size, 1, 2, 0.3, -0.7)
    ys, xs = np.nonzero((render(Scene((thing,))) != BACKGROUND).any(axis=2))
    np.testing.assert_allclose((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), thing.box, atol=1.0)
    x0, y0, x1, y1 = thing.box
    assert max(x1 - x0, y1 - y0) == pytest.approx({"small": 10.0, "large": 14.5}[size])


def test_the_box_ends_at_the_border() -> None:
    assert Thing("square", "red", "large", 0, 0, -1.0, -1.0).box == (0.0, 0.0, 14.25, 14.25)


def test_a_scene_refuses_two_things_in_one_cell() -> None:
    thing = Thing("circle", "red", "small", 2, 3)
    with pytest.raises(ValueError, match=r"share a cell.*\(2, 3\)"):
        Scene((thing, thing))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Want("hexagon"), "hexagon"),
        (lambda: Want("circle", "pink"), "pink"),
        (lambda: Want("circle", size="huge"), "huge"),
        (lambda: Want("circle", count=0), "count is 0"),
        (lambda: Spec((Want("circle"),), "poetry"), "poetry"),
        (lambda: Spec((), "counting"), "0 things"),
        (lambda: Spec((Want("circle"), Want("circle", "red")), "color_attr"), "could be both"),
        (lambda: Spec((Want("circle"),), "position", Relation(0, "above", 1)), "two single things"),
        (lambda: Spec((Want("circle"), Want("star")), "position", Relation(0, "near", 1)), "near"),
    ],
)
def test_impossible_specs_are_refused_with_the_offending_value(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_specs_that_mean_the_same_share_their_canonical_form() -> None:
    circle, square = Want("circle", "red"), Want("square", "blue")
    same = [
        Spec((circle, square), "position", Relation(0, "left of", 1)),
        Spec((circle, square), "position", Relation(1, "right of", 0)),
        Spec((square, circle), "position", Relation(1, "left of", 0)),
    ]
    assert len({canonical(spec) for spec in same}) == 1
    other = Spec((circle, square), "position", Relation(1, "left of", 0))
    assert canonical(other) != canonical(same[0])
