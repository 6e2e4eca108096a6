"""Marks and crops, by their pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from srum.geometry import rle_encode
from srum.judging.views import crop, draw_marks
from srum.records import Box, Region

GREY = Image.new("RGB", (96, 64), (128, 128, 128))


def changed(regions: list[Region], image: Image.Image = GREY) -> np.ndarray:
    """Which pixels (H, W) the marks touch."""
    return (np.asarray(draw_marks(image, regions)) != np.asarray(image)).any(-1)


def test_a_box_is_outlined_and_numbered_at_its_corner() -> None:
    touched = changed([Region(id=3, box=(20, 16, 80, 60), area=1, source="test")])
    assert (
        touched[16, 20:80].all() and touched[59, 20:80].all() and touched[16:60, 20].all() and touched[16:60, 79].all()
    )
    touched[16:60, 20] = touched[16:60, 79] = touched[16, 20:80] = touched[59, 20:80] = False
    rows, columns = np.nonzero(touched)  # the tag
    assert len(rows) and rows.max() < 40 and columns.max() < 40


def test_a_mask_is_outlined_along_its_border() -> None:
    y, x = np.mgrid[:64, :96]
    disc = (y - 32) ** 2 + (x - 48) ** 2 < 24**2
    touched = changed([Region(id=1, box=(24, 8, 72, 56), mask=rle_encode(disc), area=disc.sum(), source="test")])
    ring = touched & (y > 24)  # below the tag
    distance = np.sqrt((y - 32) ** 2 + (x - 48) ** 2)[ring]
    assert len(distance) > 60 and distance.min() > 21 and distance.max() < 24


def test_the_background_is_not_marked_and_the_image_stays() -> None:
    before = GREY.tobytes()
    assert not changed([Region(id=0, box=(0, 0, 96, 64), area=1, source="background")]).any()
    assert changed([Region(id=1, box=(0, 0, 96, 64), area=1, source="test")]).any()
    assert GREY.tobytes() == before


@pytest.mark.parametrize("box", [(90.0, 60.0, 96.0, 64.0), (0.0, 0.0, 0.3, 0.3), (95.5, 0.0, 96.0, 64.0)])
def test_tags_and_crops_of_regions_at_the_border(box: Box) -> None:
    region = Region(id=12, box=box, area=1, source="test")
    assert changed([region]).any() and changed([region], Image.new("L", (96, 64), 128).convert("RGB")).any()
    picture, moved = crop(GREY, region)
    assert 1 <= picture.width <= 96 and 1 <= picture.height <= 64
    x0, y0, x1, y1 = moved.box
    assert 0 <= x0 < x1 <= picture.width and 0 <= y0 < y1 <= picture.height


def test_a_crop_shows_the_region_and_what_is_around_it() -> None:
    pixels = np.arange(96 * 64 * 3, dtype=np.uint32).reshape(64, 96, 3).astype(np.uint8)
    region = Region(id=2, box=(40, 20, 60, 30), area=200, source="test", label="a cat")
    picture, moved = crop(Image.fromarray(pixels), region)
    assert moved.box == (10, 10, 30, 20) and (moved.id, moved.label) == (2, "a cat")
    assert np.array_equal(picture, pixels[10:40, 30:70])
