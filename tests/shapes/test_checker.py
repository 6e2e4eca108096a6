"""The checker is exact on drawings, tolerant of blur and noise, and says what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srum.shapes.checker import Found, check, parse
from srum.shapes.prompts import sample_spec, to_metadata
from srum.shapes.render import BACKGROUND, render
from srum.shapes.scenes import INVERSE, Relation, Scene, Spec, Thing, Want, random_scene, sample_scene

RED_CIRCLE = Thing("circle", "red", "small", 0, 0)
BLUE_SQUARE = Thing("square", "blue", "large", 2, 2)


def worsened(image: np.ndarray, sigma: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """The image with a Gaussian blur (px) and noise (levels)."""
    blurred = cv2.GaussianBlur(image, (0, 0), sigma).astype(float)
    return np.clip(blurred + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8)


def exactly_right(scene: Scene, found: Sequence[Found]) -> bool:
    """Every thing is found, well formed, with its attributes and within half a pixel of its place; nothing else is."""
    right = all(thing.well_formed for thing in found) and len(found) == len(scene.things)
    return right and all(
        any(other.label == thing.label and np.allclose(other.centre, thing.centre, atol=0.5) for other in found)
        for thing in scene.things
    )


# --- from pixels to things


def test_every_drawn_scene_is_read_exactly() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        scene = random_scene(int(rng.integers(0, 8)), rng, allow_held_out=True)
        assert exactly_right(scene, parse(render(scene))), scene


@pytest.mark.parametrize(("sigma", "noise"), [(0.6, 6.0), (0.9, 8.0)])
def test_blur_and_noise_are_tolerated(sigma: float, noise: float) -> None:
    rng = np.random.default_rng(1)
    scenes = [random_scene(int(rng.integers(0, 8)), rng, allow_held_out=True) for _ in range(1000)]
    right = [exactly_right(scene, parse(worsened(render(scene), sigma, noise, rng))) for scene in scenes]
    assert np.mean(right) > 0.99


def test_an_empty_image_has_no_things() -> None:
    assert parse(np.full((64, 64, 3), BACKGROUND, np.uint8)) == []


def test_touching_things_of_different_colours_are_two() -> None:
    scene = Scene((Thing("square", "red", "large", 1, 1, dx=1.0), Thing("circle", "purple", "large", 1, 2, dx=-1.0)))
    assert exactly_right(scene, parse(render(scene)))


@pytest.mark.parametrize("shape", ["circle", "square"])
def test_touching_things_of_one_colour_are_two(shape: str) -> None:
    scene = Scene((Thing(shape, "red", "large", 1, 1, dx=1.0), Thing(shape, "red", "large", 1, 2, dx=-1.0)))
    found = parse(render(scene))
    assert [thing.label for thing in found] == [f"large red {shape}"] * 2
    assert all(thing.well_formed for thing in found)


def test_a_thing_of_two_colours_is_in_pieces() -> None:
    image = render(Scene((Thing("circle", "red", "large", 1, 1),)))
    other = render(Scene((Thing("circle", "green", "large", 1, 1),)))
    image[:24] = other[:24]
    assert {thing.well_formed for thing in parse(image)} == {False}


def test_a_stray_blob_is_no_thing() -> None:
    image = render(Scene((RED_CIRCLE,)))
    image[40:42, 40:42] = (30, 70, 215)
    assert [thing.stray for thing in parse(image)] == [False, True]
    assert check(image, to_metadata(Spec((Want("circle"),), "single_object"))).reasons == ["a stray blue blob"]


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3)), np.zeros((32, 64, 3), np.uint8)]
)
def test_other_images_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(64, 64, 3\)"):
        parse(image)


# --- from things to the verdict

ONE_OF_EACH = Spec((Want("circle", "red", "small"), Want("square", "blue")), "position", Relation(0, "left of", 1))


@pytest.mark.parametrize(
    ("things", "reason"),
    [
        ((RED_CIRCLE, BLUE_SQUARE), None),
        ((RED_CIRCLE, replace(BLUE_SQUARE, size="small")), None),
        ((replace(RED_CIRCLE, colour="green"), BLUE_SQUARE), "small green circle should be red"),
        ((replace(RED_CIRCLE, size="large"), BLUE_SQUARE), "large red circle should be small"),
        (
            (replace(RED_CIRCLE, size="large", colour="black"), BLUE_SQUARE),
            "large black circle should be small and red",
        ),
        ((replace(RED_CIRCLE, shape="star"), BLUE_SQUARE), "small red star is not asked for"),
        ((replace(RED_CIRCLE, shape="star"), BLUE_SQUARE), "a small red circle is missing"),
        ((RED_CIRCLE,), "a blue square is missing"),
        ((RED_CIRCLE, BLUE_SQUARE, replace(RED_CIRCLE, row=3)), "small red circle is one too many"),
        (
            (RED_CIRCLE, BLUE_SQUARE, Thing("star", "black", "large", 3, 0)),
            "large black star is not asked for",
        ),
        ((replace(RED_CIRCLE, column=3), BLUE_SQUARE), "small red circle is not left of blue square"),
        ((replace(RED_CIRCLE, column=2), BLUE_SQUARE), "small red circle is not left of blue square"),
        ((), "a small red circle is missing"),
    ],
)
def test_each_fault_is_named(things: tuple[Thing, ...], reason: str | None) -> None:
    verdict = check(render(Scene(things)), to_metadata(ONE_OF_EACH))
    assert verdict.category == "position"
    assert verdict.correct == (reason is None)
    assert reason in verdict.reasons if reason else verdict.reasons == []


def test_a_malformed_thing_is_named() -> None:
    image = render(Scene((RED_CIRCLE, BLUE_SQUARE)))
    image[32:41, 32:41] = BACKGROUND
    verdict = check(image, to_metadata(ONE_OF_EACH))
    assert not verdict.correct
    assert any("badly drawn: of no clear shape" in reason for reason in verdict.reasons)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["left of", "right of"]))
def test_mirroring_flips_left_and_right_and_nothing_else(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    spec = replace(sample_spec(rng, "position"), relation=Relation(0, kind, 1))
    mirrored = np.ascontiguousarray(render(sample_scene(spec, rng))[:, ::-1])
    without = replace(spec, relation=None)
    assert check(mirrored, to_metadata(without)).correct
    assert check(mirrored, to_metadata(replace(spec, relation=Relation(0, INVERSE[kind], 1)))).correct
    assert not check(mirrored, to_metadata(spec)).correct
