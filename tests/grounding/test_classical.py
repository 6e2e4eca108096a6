"""The classical grounder on drawn shapes and on photographs."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageDraw

from srum.geometry import iou, rle_decode
from srum.grounding.classical import ClassicalGrounder
from srum.records import Box, Region

RED, BLUE, YELLOW, BLACK = (220, 30, 30), (30, 70, 215), (250, 210, 30), (25, 25, 25)


def draw(
    shapes: list[tuple[tuple[int, int, int], Box]], background: tuple[int, int, int] = (240, 240, 240)
) -> Image.Image:
    image = Image.new("RGB", (64, 64), background)
    for colour, (x0, y0, x1, y1) in shapes:
        ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)
    return image


def propose(image: Image.Image) -> list[Region]:
    return ClassicalGrounder().propose([image], ["anything"])[0]


def boxes(image: Image.Image) -> set[Box]:
    return {region.box for region in propose(image)}


def test_separate_shapes() -> None:
    shapes: list[tuple[tuple[int, int, int], Box]] = [
        (RED, (4, 4, 14, 14)),
        (RED, (30, 4, 44, 18)),
        (YELLOW, (4, 40, 14, 50)),
        (BLACK, (40, 40, 64, 64)),
    ]
    assert boxes(draw(shapes)) == {box for _, box in shapes}


def test_touching_shapes_of_different_colour_are_split() -> None:
    shapes: list[tuple[tuple[int, int, int], Box]] = [(RED, (10, 10, 24, 24)), (BLUE, (24, 10, 38, 24))]
    assert boxes(draw(shapes)) == {box for _, box in shapes}


def test_specks_are_dropped_and_an_empty_image_has_no_regions() -> None:
    assert propose(draw([(RED, (10, 10, 12, 12)), (BLACK, (0, 40, 64, 41))])) == []
    assert propose(draw([])) == []


def test_a_dark_background() -> None:
    assert boxes(draw([(YELLOW, (10, 10, 24, 24))], background=(20, 30, 60))) == {(10, 10, 24, 24)}


def test_masks_fit_their_boxes_and_areas() -> None:
    (region,) = propose(draw([(RED, (10, 12, 24, 30))]))
    assert region.mask is not None
    mask = rle_decode(region.mask)
    assert mask.sum() == region.area == 14 * 18
    assert mask[12:30, 10:24].all()


@pytest.mark.parametrize("seed", range(10))
def test_blurred_and_noisy_shapes_in_touching_cells(seed: int) -> None:
    """Discs of 14 px on a grid of 16 px, blurred and noisy as a decoder leaves them: all found, each once."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (256, 256), (240, 240, 240))
    cells = rng.permutation(16)[:6]
    truth: list[Box] = []
    for cell, colour in zip(cells, [RED, BLUE, YELLOW, BLACK, (30, 160, 50), (170, 60, 200)], strict=True):
        x, y = 16.0 * (cell % 4) + 1, 16.0 * (cell // 4) + 1
        ImageDraw.Draw(image).ellipse((4 * x, 4 * y, 4 * x + 56, 4 * y + 56), fill=colour)
        truth.append((x, y, x + 14, y + 14))
    pixels = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)) + rng.normal(0, 4, (64, 64, 3))
    regions = propose(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    assert len(regions) == len(truth)
    assert min(max(iou(box, region.box) for region in regions) for box in truth) > 0.7


@pytest.mark.parametrize("name", ["astronaut", "coffee", "rocket"])
def test_photographs_give_a_handful_of_regions_inside_the_image(name: str) -> None:
    image = Image.fromarray(getattr(skimage.data, name)())
    regions = propose(image)
    assert 1 <= len(regions) <= 60
    for region in regions:
        x0, y0, x1, y1 = region.box
        assert 0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height
        assert region.mask is not None and region.mask.size == (image.height, image.width)


def test_other_modes_and_tiny_images() -> None:
    assert boxes(draw([(RED, (4, 4, 14, 14))]).convert("RGBA")) == {(4, 4, 14, 14)}
    assert propose(Image.new("L", (1, 1))) == []
