"""Images as the language model sees them (docs/specs/blip3o.md, 11), and the frames that they are seen in."""

from __future__ import annotations

import math

from PIL import Image
from torch import Tensor

from srum.errors import ModelError
from srum.geometry import Size
from srum.models.pixels import normalised, to_rgb

LEAST, MOST = 56 * 56, 14 * 14 * 4 * 16384  # pixels of an image as it is seen
RATIO = 200  # of the sides of an image, at most


def seen_size(size: Size, factor: int) -> Size:
    """(H, W) at which an image of ``size`` (H, W) is seen: multiples of ``factor``, the sides rounded, then within the
    limits of its pixels. Raises ModelError for an image much longer than wide."""
    height, width = size
    if max(size) > RATIO * min(size):
        raise ModelError(f"an image of {width}x{height} pixels: one side is more than {RATIO} times the other")
    h, w = (round(side / factor) * factor for side in size)
    if h * w > MOST:
        shrink = math.sqrt(height * width / MOST)
        return max(factor, int(height / shrink / factor) * factor), max(factor, int(width / shrink / factor) * factor)
    if h * w < LEAST:
        grow = math.sqrt(LEAST / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return h, w


def patches(image: Image.Image, size: Size, patch: int, merge: int) -> Tensor:
    """The image at ``size`` (H, W) as patches (N, 3 * 2 * patch * patch): those that are merged stand together, and
    each patch is there twice, since the encoder takes two frames of a film at a time."""
    image = to_rgb(image)
    image = image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = normalised(image)
    rows, columns = size[0] // patch // merge, size[1] // patch // merge
    x = pixels.reshape(3, rows, merge, patch, columns, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
    return x.reshape(-1, 3, 1, patch * patch).expand(-1, -1, 2, -1).reshape(-1, 6 * patch * patch)
