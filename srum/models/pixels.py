"""Images as numbers, where architectures agree: RGB, CLIP's normalisation, the middle square."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from srum.geometry import Box, Size

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency is composited on white."""
    if image.mode == "RGBA" or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def normalised(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) float32 with CLIP's mean and deviation."""
    return (torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255 - MEAN) / STD


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
