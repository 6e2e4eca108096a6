"""Images as Harmon has them: three preparations, and pixels both ways (docs/specs/harmon.md, 5)."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from srum.models.blip3o.images import to_rgb

GREY = (127, 127, 127)


def stretched(image: Image.Image, side: int) -> Image.Image:
    """A square of ``side`` pixels, proportions not kept: first of the long side, then of that. What is reconstructed,
    and what latents are of."""
    image = to_rgb(image)
    for length in (max(image.size), side):
        image = image if image.size == (length, length) else image.resize((length, length), Image.Resampling.BICUBIC)
    return image


def padded(image: Image.Image, side: int) -> Image.Image:
    """A square of ``side`` pixels, the image in the middle of grey: what is asked about."""
    image, length = to_rgb(image), max(image.size)
    if image.width != image.height:
        square = Image.new("RGB", (length, length), GREY)
        square.paste(image, ((length - image.width) // 2, (length - image.height) // 2))
        image = square
    return image if length == side else image.resize((side, side), Image.Resampling.BICUBIC)


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255 * 2 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in about [-1, 1] as an RGB image; fractions of a level are cut off."""
    levels = torch.clamp(127.5 * pixels.float() + 128, 0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
