"""Images as the two encoders want them: the resize rule, normalisation, patches (docs/specs/bagel.md, section 6)."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from srum.models.bagel.config import ResizeLimits


def resized_size(width: int, height: int, limits: ResizeLimits, max_pixels: float) -> tuple[int, int]:
    """(width, height) after the resize rule. ``max_pixels`` is already divided by the number of images.

    The second step scales by the pixel ratio and not by its square root, as the reference does (it overshrinks).
    """
    stride = limits.image_stride

    def apply(w: int, h: int, scale: float) -> tuple[int, int]:
        w, h = round(w * scale), round(h * scale)
        return tuple(max(stride, int(round(x / stride) * stride)) for x in (w, h))  # type: ignore[return-value]

    scale = min(limits.max_image_size / max(width, height), 1.0)
    scale = max(scale, limits.min_image_size / min(width, height))
    width, height = apply(width, height, scale)
    if width * height > max_pixels:
        width, height = apply(width, height, max_pixels / (width * height))
    if max(width, height) > limits.max_image_size:
        width, height = apply(width, height, limits.max_image_size / max(width, height))
    return width, height


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency is composited on white."""
    if image.mode == "RGBA" or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.split()[3])
        return white
    return image.convert("RGB")


def resize(image: Image.Image, limits: ResizeLimits, max_pixels: float) -> Image.Image:
    """RGB image resized by the rule with PIL's bicubic filter; unchanged when it already has that size."""
    image = to_rgb(image)
    size = resized_size(*image.size, limits, max_pixels)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to (3, H, W) float32 in [-1, 1]."""
    array = np.array(image, dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 255 * 2 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in about [-1, 1] to an image; values are truncated, not rounded, to uint8."""
    array = ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """(3, H, W) to (h * w, patch * patch * 3): patches row-major, each in the order row, column, channel."""
    channels, height, width = pixels.shape
    x = pixels.reshape(channels, height // patch, patch, width // patch, patch)
    return x.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def latent_to_tokens(latent: Tensor, patch: int) -> Tensor:
    """(C, h p, w p) to (h w, p p C), row-major, channel fastest."""
    channels, height, width = latent.shape
    x = latent.reshape(channels, height // patch, patch, width // patch, patch)
    return x.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def tokens_to_latent(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Inverse of ``latent_to_tokens``."""
    h, w = grid
    return tokens.reshape(h, w, patch, patch, -1).permute(4, 0, 2, 1, 3).reshape(-1, h * patch, w * patch)
