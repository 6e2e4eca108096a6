"""Images: read from files and bytes of any kind, written as PNG, put into the pages and requests that show them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from srum.run_dir import RunError, atomic

UPRIGHT = 4  # EXIF orientations above turn width into height


class ImageError(RunError):
    """An image that cannot be read, or has no pixels."""


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG at once."""
    with atomic(path) as partial:
        image.save(partial, format="png")


def open_image(path: Path) -> Image.Image:
    """The RGB image of a file (``to_rgb``).

    Raises ImageError, naming the file, where it cannot be read.
    """
    return read_image(path, str(path))


def read_image(file: Path | BinaryIO, name: str) -> Image.Image:
    """The same of a path or of bytes, which are called ``name`` in the ImageError."""
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow's readers raise
        raise ImageError(f"{name} is not a readable image: {error}") from None


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the image that ``open_image`` gives; only where it begins is read. Raises ImageError."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > UPRIGHT
            return (image.height, image.width) if turned else image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow's readers raise
        raise ImageError(f"{path} is not a readable image: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB, turned as its EXIF orientation says, its pixels as stored: 16-bit grey is scaled, what is
    transparent lies on white.

    Numbers with a fraction are taken for shares of 1, of 255 or of 65535, the first that none exceeds. Raises
    ImageError for an image without pixels, or with some that are no numbers.
    """
    if 0 in image.size:
        raise ImageError(f"an image of {image.width}x{image.height} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        image = _from_floats(np.asarray(image))
    elif image.mode.startswith("I"):  # 16 bits, perhaps kept in 32; Pillow would cut them off at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _from_floats(values: np.ndarray) -> Image.Image:
    """The grey image of numbers (H, W)."""
    if not np.isfinite(values).all():
        raise ImageError("an image with pixels that are no numbers")
    white = next((limit for limit in (1, 255, 65535) if values.max() <= limit), float(values.max()))
    return Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))


def as_bytes(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    """The file of an image; ``options`` are those of Pillow's writer."""
    data = io.BytesIO()
    image.save(data, format=kind, **options)
    return data.getvalue()


def data_uri(image: Image.Image, kind: str = "png", **options: Any) -> str:
    """An image as the address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(as_bytes(image, kind, **options)).decode()}"
