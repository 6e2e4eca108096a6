"""Boxes and masks, and the one place where they move between the image, model-input and latent frames.

Boxes are ``(x0, y0, x1, y1)`` in continuous coordinates of a frame of size (H, W): x in [0, W], y in [0, H], origin at
the top left corner, so that a box of whole numbers covers exactly its pixels ``[y0:y1, x0:x1]``. A change of frame is a
change of size: the whole image is always the whole frame (docs/specs/srum.md, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from srum.records import Box, MaskRLE, Size


def clip_box(box: Sequence[float], size: Size) -> Box:
    """``box`` cut to a frame of ``size`` (H, W); empty (x0 == x1 or y0 == y1) where it lies outside."""
    height, width = size
    x0, y0, x1, y1 = box
    return min(max(x0, 0), width), min(max(y0, 0), height), min(max(x1, 0), width), min(max(y1, 0), height)


def scale_box(box: Sequence[float], from_size: Size, to_size: Size) -> Box:
    """``box`` of a frame of ``from_size`` (H, W) in the coordinates of a frame of ``to_size`` (H, W)."""
    y_scale, x_scale = to_size[0] / from_size[0], to_size[1] / from_size[1]
    x0, y0, x1, y1 = box
    return x0 * x_scale, y0 * y_scale, x1 * x_scale, y1 * y_scale


def format_box(box: Sequence[float]) -> str:
    """``[x0, y0, x1, y1]`` in whole pixels, as models are told of it."""
    return f"[{', '.join(str(round(value)) for value in box)}]"


def iou(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union, in [0, 1], of two boxes (x0, y0, x1, y1), neither of them empty."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (_area(box) + _area(other) - shared)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def rle_encode(mask: np.ndarray) -> MaskRLE:
    """Run lengths of a binary mask (H, W), row-major, the first run one of zeros (perhaps of length 0)."""
    flat = np.concatenate(([False], np.asarray(mask, dtype=bool).ravel()))
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate(([0], edges, [flat.size - 1])))
    return MaskRLE(size=(mask.shape[0], mask.shape[1]), counts=counts.tolist())


def rle_decode(rle: MaskRLE) -> np.ndarray:
    """The bool mask (H, W). Raises ValueError when the runs do not fill the mask."""
    height, width = rle.size
    if sum(rle.counts) != height * width or min(rle.counts, default=0) < 0:
        raise ValueError(f"runs of a mask {height}x{width} sum to {sum(rle.counts)}, expected {height * width}")
    values = np.arange(len(rle.counts)) % 2 == 1
    return np.repeat(values, rle.counts).reshape(height, width)


def coverage(boxes: Tensor, image_size: Size, grid: Size) -> Tensor:
    """Exact fraction (N, h, w), in [0, 1], of each cell of ``grid`` (h, w) that each box (N, 4) covers.

    Boxes are in pixels of an image of ``image_size`` (H, W) and may reach outside it. Separable: the covered area of a
    cell is the product of the covered lengths along y and x.
    """
    height, width = image_size
    x0, y0, x1, y1 = boxes.to(torch.float64).numpy().T
    along_y = _covered_length(y0, y1, height, grid[0])
    along_x = _covered_length(x0, x1, width, grid[1])
    return torch.from_numpy(along_y[:, :, None] * along_x[:, None, :])


def area_average(
    values: np.ndarray, grid: Size, rows: np.ndarray | None = None, columns: np.ndarray | None = None
) -> np.ndarray:
    """Mean (h, w) of a map (R, C) over the area of each cell of ``grid`` (h, w).

    ``rows`` (R + 1,) and ``columns`` (C + 1,) are the borders of the map's rectangles, ascending from 0 to the side of
    the image; by default these are pixels. A rectangle that several cells share counts in each with its part there.
    """
    rows = np.arange(values.shape[0] + 1) if rows is None else rows
    columns = np.arange(values.shape[1] + 1) if columns is None else columns
    along_y = _covered_length(rows[:-1], rows[1:], rows[-1], grid[0])
    along_x = _covered_length(columns[:-1], columns[1:], columns[-1], grid[1])
    return along_y.T @ values @ along_x


def _covered_length(start: np.ndarray, end: np.ndarray, length: float, cells: int) -> np.ndarray:
    """Fraction (N, cells) of each of ``cells`` equal parts of [0, length] inside each interval [start, end] (N,)."""
    scale = cells / length
    covered = np.minimum(end[:, None] * scale, np.arange(1.0, cells + 1))
    covered -= np.maximum(start[:, None] * scale, np.arange(float(cells)))
    return np.maximum(covered, 0, out=covered)
