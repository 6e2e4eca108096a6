"""The model as its own grounder: it is asked for the objects of its image and replies with boxes in JSON.

The paper uses this for models that ground well (Appendix B: BLIP3-o) and SAM for the others (BAGEL).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from PIL.Image import Image

from srum.geometry import clip_box, scale_box
from srum.models.base import Decoding, Question, UnifiedModel
from srum.records import Box, Region, Size

QUESTION = "Find all objects."
BOX_KEYS = ("bbox_2d", "bbox", "box")
THOUSAND: Size = (1000, 1000)

Frame = Literal["pixels", "thousand"]


class NativeGrounder:
    """Asks ``model`` for the objects of each image.

    ``frame`` says what the model's boxes are in: ``pixels`` of the image, or ``thousand`` for a 1000x1000 frame
    stretched over it.
    """

    def __init__(self, model: UnifiedModel, frame: Frame = "pixels", decoding: Decoding | None = None) -> None:
        self.model = model
        self.frame = frame
        self.decoding = decoding or Decoding(max_tokens=512)

    def propose(self, images: Sequence[Image], prompts: Sequence[str]) -> list[list[Region]]:
        """Regions per image, boxes in image pixels. Raises ValueError for a reply that is not a list of objects."""
        replies = self.model.answer(images, [[Question(QUESTION)]] * len(images), self.decoding)
        return [
            self._regions(reply, (image.height, image.width)) for image, (reply,) in zip(images, replies, strict=True)
        ]

    def _regions(self, reply: str, size: Size) -> list[Region]:
        objects = dict.fromkeys(parse_boxes(reply))  # a model that repeats itself names one object once
        regions: list[Region] = []
        for label, box in objects:
            in_pixels = box if self.frame == "pixels" else scale_box(box, THOUSAND, size)
            x0, y0, x1, y1 = in_image = clip_box(in_pixels, size)
            if x0 < x1 and y0 < y1:
                area = (x1 - x0) * (y1 - y0)
                regions.append(Region(id=len(regions) + 1, box=in_image, area=area, source="native", label=label))
        return regions


def format_boxes(objects: Sequence[tuple[str, Sequence[float]]]) -> str:
    """The reply that names ``objects``, pairs of a label and a box, in whole numbers: what the model is pretrained on.

    >>> format_boxes([("small red circle", (4, 8, 12.2, 16))])
    '[{"label": "small red circle", "bbox_2d": [4, 8, 12, 16]}]'
    """
    return json.dumps([{"label": label, "bbox_2d": [round(value) for value in box]} for label, box in objects])


def parse_boxes(reply: str) -> list[tuple[str | None, Box]]:
    """Labels and boxes, in the reply's own frame, of every complete object of ``reply``.

    Code fences, words around the list, wrapping objects and a truncated tail are passed over, and so are objects
    without four finite numbers in order. Raises ValueError for a reply without any object that is no empty list.
    """
    objects = list(_json_objects(reply))
    if not objects and "[]" not in reply:
        raise ValueError(f"no objects in the reply {reply[:200]!r}")
    named = ((entry.get("label"), _box(entry)) for entry in objects)
    return [(label if isinstance(label, str) else None, box) for label, box in named if box is not None]


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object of ``text`` that names a box, left to right."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            value, end = {}, start + 1
        if any(key in value for key in BOX_KEYS):
            yield value
        else:
            end = start + 1
        start = text.find("{", end)


def _box(entry: dict[str, Any]) -> Box | None:
    values = next(entry[key] for key in BOX_KEYS if key in entry)
    if not (isinstance(values, list) and len(values) == 4 and all(isinstance(v, int | float) for v in values)):
        return None
    x0, y0, x1, y1 = values
    ordered = all(map(math.isfinite, values)) and x0 < x1 and y0 < y1
    return (x0, y0, x1, y1) if ordered else None
