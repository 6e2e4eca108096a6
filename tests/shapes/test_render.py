"""The renderer draws what the scene says; damage is where it says it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from srum.geometry import iou
from srum.shapes.checker import parse
from srum.shapes.render import BACKGROUND, DAMAGES, PALETTE, render, render_distorted, thing_opacity
from srum.shapes.scenes import COLOURS, GRID, SHAPES, SIZES, Scene, Thing, outline, random_scene


@pytest.mark.parametrize("colour", COLOURS)
def test_a_thing_is_opaque_on_a_plain_ground(colour: str) -> None:
    image = render(Scene((Thing("circle", colour, "large", 1, 2),)))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert tuple(image[24, 40]) == PALETTE[colour]
    assert tuple(image[0, 0]) == BACKGROUND


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_opacity_adds_up_to_the_area_of_the_polygon(shape: str, size: str) -> None:
    x, y = (outline(shape) * {"small": 10.0, "large": 14.5}[size]).T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    assert thing_opacity(shape, size, (0.4, -0.3)).sum() == pytest.approx(area, rel=0.08)


def test_the_mirrored_scene_is_the_mirrored_image() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = random_scene(4, rng)
        mirrored = Scene(tuple(replace(t, column=GRID - 1 - t.column, dx=-t.dx) for t in scene.things))
        difference = np.abs(render(scene)[:, ::-1].astype(int) - render(mirrored))
        assert difference.mean() < 0.6 and difference.max() < 60  # corners are rounded to a fraction of a pixel


def test_damage_is_seen_and_the_rest_is_left_alone() -> None:
    """At least 97% of damaged things and blobs look damaged to the checker, at most 2% of the others (those that a
    merged neighbour spills onto)."""
    rng = np.random.default_rng(0)
    seen: dict[str, list[bool]] = {}
    for _ in range(400):
        scene = random_scene(int(rng.integers(1, 5)), rng)
        drawn = render_distorted(scene, rng)
        found = parse(drawn.image)
        regions = [(thing.box, drawn.damage.get(index, "none")) for index, thing in enumerate(scene.things)]
        for box, damage in regions + [(box, "blob") for box in drawn.blobs]:
            nearest = max(found, key=lambda other, box=box: iou(box, other.box))
            seen.setdefault(damage, []).append(not nearest.well_formed)
    rates = {damage: float(np.mean(values)) for damage, values in seen.items()}
    assert set(rates) == {*DAMAGES, "none", "blob"}
    assert rates.pop("none") <= 0.02
    assert rates.pop("merged") >= 0.93  # a neighbour drawn later may hide the second shape
    assert min(rates.values()) >= 0.97, rates


def test_a_distorted_image_repeats_with_its_seed() -> None:
    scene = random_scene(4, np.random.default_rng(3))
    one, two = (render_distorted(scene, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(one.image, two.image) and one.damage == two.damage and one.blobs == two.blobs
