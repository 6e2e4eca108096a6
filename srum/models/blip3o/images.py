"""Images as the two encoders want them (docs/specs/blip3o.md, 6 and 11), and the frames that they are seen in."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from srum.errors import ModelError
from srum.geometry import Box, Size

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
LEAST, MOST = 56 * 56, 14 * 14 * 4 * 16384  # pixels of an image as it is seen
RATIO = 200  # of the sides of an image, at most


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency is composited on white."""
    if image.mode == "RGBA" or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def normalised(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) float32 with CLIP's mean and deviation."""
    return (torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255 - MEAN) / STD


# --- as its features are made of it


def cropped(image: Image.Image, side: int) -> Image.Image:
    """The middle square of an image, the shorter side resized to ``side``."""
    image = to_rgb(image)
    width, height = image.size
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    image = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)
    return image.crop((left, top, left + side, top + side))


def crop_box(size: Size) -> Box:
    """The middle square of an image of ``size`` (H, W), in its pixels: what ``cropped`` leaves of it."""
    height, width = size
    side = min(size)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


# --- as the language model sees it


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
