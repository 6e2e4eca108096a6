"""Pure functions on the regions of one image: which of them are kept. The order of what is kept never changes."""

from __future__ import annotations

from collections.abc import Sequence

import cv2

from srum.records import Region, Size


def by_area(regions: Sequence[Region], image_size: Size, low: float = 0.0, high: float = 1.0) -> list[Region]:
    """The regions whose area is between the fractions ``low`` and ``high`` of an image of ``image_size`` (H, W)."""
    pixels = image_size[0] * image_size[1]
    return [region for region in regions if low * pixels <= region.area <= high * pixels]


def without_overlaps(regions: Sequence[Region], threshold: float) -> list[Region]:
    """Non-maximum suppression: a region goes when its box has an IoU above ``threshold`` with an earlier one kept."""
    corners_and_sides = [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in (region.box for region in regions)]
    earlier_is_better = [float(rank) for rank in range(len(regions), 0, -1)]
    kept = cv2.dnn.NMSBoxes(corners_and_sides, earlier_is_better, score_threshold=0.0, nms_threshold=threshold)
    return [regions[index] for index in sorted(kept)]
