"""How regions are shown to the judge where their boxes are not enough: outlined and numbered, or cut out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from srum.geometry import rle_decode
from srum.records import MaskRLE, Region

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000")
CONTEXT = 0.5  # of a region's longer side, shown around it on every side of its crop


def draw_marks(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """A copy of ``image``, RGB, with every region outlined and its id on a tag (set-of-mark prompting).

    The outline follows the region's mask where it has one, else its box; region 0, the background, is not marked.
    """
    marked = image.convert("RGB")
    draw = ImageDraw.Draw(marked)
    width = max(1, round(min(image.size) / 256))
    things = [(region, COLOURS[region.id % len(COLOURS)]) for region in regions if region.id != 0]
    for region, colour in things:
        x0, y0, x1, y1 = region.box
        if region.mask is None:
            draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=width)
        else:
            draw.bitmap((0, 0), _outline(region.mask, width), fill=colour)
    font = ImageFont.load_default(size=max(10, min(image.size) / 32))
    for region, colour in things:  # tags last: no outline runs through a number
        left, top, right, bottom = draw.textbbox((0, 0), str(region.id), font=font)
        x, y = (
            min(start, side - end) for start, side, end in zip(region.box, image.size, (right, bottom), strict=False)
        )
        draw.rectangle((x + left - 1, y + top - 1, x + right, y + bottom), fill=colour)
        draw.text((x, y), str(region.id), fill="white", font=font)
    return marked


def crop(image: Image.Image, region: Region) -> tuple[Image.Image, Region]:
    """The region with some of what is around it, and the region there: its box in pixels of the crop, without mask."""
    x0, y0, x1, y1 = region.box
    margin = CONTEXT * max(x1 - x0, y1 - y0)
    left, top = max(0, math.floor(x0 - margin)), max(0, math.floor(y0 - margin))
    right, bottom = min(image.width, math.ceil(x1 + margin)), min(image.height, math.ceil(y1 + margin))
    moved = region.model_copy(update={"box": (x0 - left, y0 - top, x1 - left, y1 - top), "mask": None})
    return image.crop((left, top, right, bottom)), moved


def _outline(mask: MaskRLE, width: int) -> Image.Image:
    """The pixels of a mask that are at most ``width`` from its border."""
    filled = Image.fromarray(rle_decode(mask)).convert("L")
    return ImageChops.subtract(filled, filled.filter(ImageFilter.MinFilter(2 * width + 1)))
