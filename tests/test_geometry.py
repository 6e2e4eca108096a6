"""Laws of boxes and masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from srum.geometry import (
    area_average,
    clip_box,
    coverage,
    iou,
    rle_decode,
    rle_encode,
    scale_box,
)
from srum.records import Box, MaskRLE, Size

QUICK = settings(max_examples=60, deadline=None)

sides = st.integers(1, 40)
sizes = st.tuples(sides, sides)
masks = st_numpy.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@st.composite
def sized_boxes(draw: st.DrawFn) -> tuple[Size, Box]:
    """A size (H, W) and a box inside it."""
    height, width = draw(sizes)
    xs = sorted(draw(st.tuples(st.floats(0, width), st.floats(0, width))))
    ys = sorted(draw(st.tuples(st.floats(0, height), st.floats(0, height))))
    return (height, width), (xs[0], ys[0], xs[1], ys[1])


@QUICK
@given(sized_boxes(), sizes)
def test_coverage_sums_to_the_area(sized: tuple[Size, Box], grid: Size) -> None:
    size, box = sized
    x0, y0, x1, y1 = box
    covered = coverage(torch.tensor([box], dtype=torch.float64), size, grid)
    cell_area = size[0] * size[1] / (grid[0] * grid[1])
    assert covered.shape == (1, *grid)
    assert covered.min() >= 0 and covered.max() <= 1 + 1e-12
    assert covered.sum().item() * cell_area == pytest.approx((x1 - x0) * (y1 - y0), abs=1e-9)


def test_coverage_by_hand() -> None:
    """6x4 px on 2x3 cells of 2 px (w) x 2 px (h): the box (1, 0, 4, 1) takes half of a half, then half of a cell."""
    covered = coverage(torch.tensor([[1.0, 0.0, 4.0, 1.0]]), image_size=(4, 6), grid=(2, 3))
    assert covered.tolist() == [[[0.25, 0.5, 0.0], [0.0, 0.0, 0.0]]]


def test_coverage_of_several_boxes_is_that_of_each() -> None:
    boxes = torch.tensor([[0.0, 0.0, 3.0, 5.0], [-4.0, -4.0, 40.0, 40.0], [2.5, 1.5, 2.75, 7.0]])
    together = coverage(boxes, (10, 8), (4, 4))
    assert torch.equal(together, torch.cat([coverage(box[None], (10, 8), (4, 4)) for box in boxes]))
    assert torch.equal(together[1], torch.ones(4, 4, dtype=torch.float64))
    assert coverage(boxes[:0], (10, 8), (4, 4)).shape == (0, 4, 4)


@QUICK
@given(masks, st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_the_average_of_a_mask_keeps_its_area_whatever_the_grid(mask: np.ndarray, grid: Size) -> None:
    covered = area_average(mask.astype(float), grid)
    cell_area = mask.size / (grid[0] * grid[1])
    assert covered.sum().item() * cell_area == pytest.approx(mask.sum(), abs=1e-9)
    assert covered.min() >= 0 and covered.max() <= 1 + 1e-12


@QUICK
@given(sized_boxes(), sizes)
def test_a_box_of_whole_pixels_is_its_mask(sized: tuple[Size, Box], grid: Size) -> None:
    size, box = sized
    x0, y0, x1, y1 = (round(value) for value in box)
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    of_box = coverage(torch.tensor([[x0, y0, x1, y1]], dtype=torch.float64), size, grid)[0]
    assert area_average(mask.astype(float), grid) == pytest.approx(of_box.numpy(), abs=1e-9)


def test_area_average_on_sides_that_are_no_multiple() -> None:
    """Three pixels on two cells: each cell is one pixel and half of the middle one, weights 2/3 and 1/3."""
    assert area_average(np.array([[3.0, 6.0, 0.0]]), (1, 2)) == pytest.approx(np.array([[4.0, 2.0]]))


def test_area_average_of_rectangles_is_that_of_their_pixels() -> None:
    """Rows of 1, 3 and 2 px, columns of 2 and 4 px."""
    values = np.random.default_rng(0).normal(size=(3, 2))
    pixels = values.repeat([1, 3, 2], axis=0).repeat([2, 4], axis=1)
    average = area_average(values, (4, 5), np.array([0, 1, 4, 6]), np.array([0, 2, 6]))
    assert average == pytest.approx(area_average(pixels, (4, 5)))


@QUICK
@given(sized_boxes(), sizes)
def test_scaling_there_and_back(sized: tuple[Size, Box], other: Size) -> None:
    size, box = sized
    assert scale_box(scale_box(box, size, other), other, size) == pytest.approx(box, abs=1e-9)


@QUICK
@given(sizes, st.tuples(*[st.floats(-100, 100)] * 4))
def test_a_clipped_box_lies_inside_and_stays(size: Size, box: Box) -> None:
    clipped = clip_box(box, size)
    assert all(0 <= value <= limit for value, limit in zip(clipped, (size[1], size[0]) * 2, strict=True))
    assert clip_box(clipped, size) == clipped


def test_iou_by_hand() -> None:
    """Two 2x2 boxes that share one pixel: 1 / (4 + 4 - 1)."""
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == iou((0, 0, 2, 2), (2, 0, 4, 2)) == 0


@QUICK
@given(masks)
def test_run_lengths_there_and_back(mask: np.ndarray) -> None:
    rle = rle_encode(mask)
    assert np.array_equal(rle_decode(rle), mask)
    assert all(count > 0 for count in rle.counts[1:])


def test_run_lengths_begin_with_zeros() -> None:
    assert rle_encode(np.array([[True, False], [False, True]])).counts == [0, 1, 2, 1]


@pytest.mark.parametrize("counts", [[3], [5], [2, -1, 3], []])
def test_run_lengths_that_do_not_fill_the_mask(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="runs of a mask 2x2"):
        rle_decode(MaskRLE(size=(2, 2), counts=counts))
