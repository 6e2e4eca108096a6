"""Pixels as they are drawn and as they are seen (docs/specs/openuni.md, 5, 7 and 10)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from srum.models.pixels import to_rgb

MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]


def squared(image: Image.Image, side: int) -> Image.Image:
    """The middle square of an image at ``side`` pixels, bicubic."""
    image = to_rgb(image)
    short = min(image.size)
    left, top = ((length - short) // 2 for length in image.size)
    square = image.crop((left, top, left + short, top + short))
    return square if short == side else square.resize((side, side), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255 * 2 - 1


def levels(images: Tensor) -> list[Image.Image]:
    """Images of pixels (B, 3, H, W) in [-1, 1], cut to them; levels are truncated, as the authors have it."""
    bytes_ = (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(np.asarray(x)) for x in bytes_.permute(0, 2, 3, 1).cpu()]


def seen_drawn(images: Sequence[Tensor], side: int) -> Tensor:
    """Pixels (3, S, S) in [-1, 1] of images that another is drawn after, as the encoder wants them, (B, 3, side, side):
    bilinear without antialiasing, as it was trained."""
    normalised = (torch.stack(list(images)) / 2 + 0.5 - MEAN) / STD
    return interpolate(normalised, size=(side, side), mode="bilinear")


def seen_asked(images: Sequence[Image.Image], side: int) -> Tensor:
    """The same of images that are asked about, (B, 3, side, side): stretched to one tile, bicubic, as InternVL does."""
    tiles = [to_rgb(image).resize((side, side), Image.Resampling.BICUBIC) for image in images]
    return (torch.stack([pixels(tile) for tile in tiles]) / 2 + 0.5 - MEAN) / STD
