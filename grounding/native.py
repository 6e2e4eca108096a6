"""The model as its own grounder: it is asked for the objects of its image and replies with boxes.

The paper uses this for models that ground well (Appendix B: BLIP3-o) and SAM for the others (BAGEL). Replies are
JSON, as the embedded model and Qwen-VL since 2.5 write them, the tagged corners of earlier Qwen-VL, or the tagged lists
of InternVL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

from PIL.Image import Image
from pydantic import ConfigDict, SkipValidation, validate_call

from srum.config import Count
from srum.geometry import scale_box
from srum.grounding.base import ProposalError
from srum.models.base import Decoding, Segment, UnifiedModel, box_frame
from srum.records import Box, Region, Size

QUESTION = "Find all objects."
BOX_KEYS = ("bbox_2d", "bbox", "box", "bounding_box")
LABEL_KEYS = ("label", "object", "name")
NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
TAGGED = re.compile(  # <|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>, or <ref> and <box>
    r"(?:<(?:\|object_ref_start\||ref)>([^<]*)<(?:\|object_ref_end\||/ref)>\s*)?"
    rf"<(?:\|box_start\||box)>\({NUMBER},{NUMBER}\),\s*\({NUMBER},{NUMBER}\)"
)
LISTED = re.compile(
    r"(?:<ref>([^<]*)</ref>\s*)?<box>\s*(\[[^<]*\])\s*</box>"
)  # <ref>cat</ref><box>[[1, 2, 3, 4]]</box>
LARGEST = 2.0**31  # of a box's numbers; NaN and infinity are not below it
THOUSAND: Size = (1000, 1000)

Frame = Literal["model", "pixels", "thousand"]


class NativeGrounder:
    """Asks ``model`` for the objects of each image.

    ``frame`` says what the model's boxes are in: what the ``model`` itself says (``srum.models.base.box_frame``: the
    resized image of Qwen2.5-VL, else the image), ``pixels`` of the image, or ``thousand`` for a 1000x1000 frame
    stretched over it (Qwen-VL, Qwen2-VL and Qwen3-VL). ``question`` is put as it is, with the image's prompt for
    ``{prompt}`` where it has that.
    """

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def __init__(
        self,
        model: SkipValidation[UnifiedModel],
        frame: Frame = "model",
        question: str = QUESTION,
        max_tokens: Count = 512,
    ) -> None:
        self.model = model
        self.frame = frame
        self.question = question
        self.decoding = Decoding(max_tokens=max_tokens)

    def propose(self, images: Sequence[Image], prompts: Sequence[str]) -> list[list[Region] | ProposalError]:
        """Regions per image, boxes in image pixels and not cut to it; an error for a reply without any object."""
        contexts = [
            [Segment("seen", image=image), Segment("text", text=self.question.replace("{prompt}", prompt))]
            for image, prompt in zip(images, prompts, strict=True)
        ]
        replies = self.model.write(contexts, self.decoding, [0] * len(contexts))  # greedy
        return [
            self._regions(reply.text, (image.height, image.width)) for image, reply in zip(images, replies, strict=True)
        ]

    def _regions(self, reply: str, size: Size) -> list[Region] | ProposalError:
        try:
            objects = dict.fromkeys(parse_boxes(reply))  # a model that repeats itself names one object once
        except ProposalError as error:
            return error
        frame = {"model": box_frame(self.model, size), "pixels": size, "thousand": THOUSAND}[self.frame]
        return [
            Region(id=index, box=scale_box(box, frame, size), area=1, source="native", label=label)
            for index, (label, box) in enumerate(objects, start=1)
        ]


def format_boxes(objects: Sequence[tuple[str, Sequence[float]]]) -> str:
    """The reply that names ``objects``, pairs of a label and a box, in whole numbers: what the model is pretrained on.

    >>> format_boxes([("small red circle", (4, 8, 12.2, 16))])
    '[{"label": "small red circle", "bbox_2d": [4, 8, 12, 16]}]'
    """
    return json.dumps([{"label": label, "bbox_2d": [round(value) for value in box]} for label, box in objects])


def parse_boxes(reply: str) -> list[tuple[str | None, Box]]:
    """Labels and boxes, in the reply's own frame, of every complete object of ``reply``.

    Code fences, words around the list, wrapping objects and a truncated tail are passed over, and so are boxes that are
    not four finite numbers in order. Raises ProposalError for a reply without any object that is no empty list.
    """
    objects = [*_json_objects(reply)] or [*_tagged_objects(reply)]
    if not objects and "[]" not in reply:
        raise ProposalError(f"no objects in the reply {reply[:200]!r}")
    return [(label, box) for label, values in objects for box in _boxes(values)]


def _json_objects(text: str) -> Iterator[tuple[str | None, Any]]:
    """Label and value of the box of every JSON object of ``text`` that names a box, left to right."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            value, end = {}, start + 1
        if key := next((key for key in BOX_KEYS if key in value), None):
            yield next((value[name] for name in LABEL_KEYS if isinstance(value.get(name), str)), None), value[key]
        else:
            end = start + 1
        start = text.find("{", end)


def _tagged_objects(text: str) -> Iterator[tuple[str | None, Any]]:
    for label, *corners in TAGGED.findall(text):
        yield label.strip() or None, [float(value) for value in corners]
    for label, boxes in LISTED.findall(text):
        with suppress(ValueError, RecursionError):
            yield label.strip() or None, json.loads(boxes)


def _boxes(values: Any) -> list[Box]:
    """The box that four numbers are, or those in a list of such fours."""
    if not isinstance(values, list):
        return []
    boxes = []
    for four in values if all(isinstance(value, list) for value in values) else [values]:
        if len(four) == 4 and all(isinstance(value, int | float) and abs(value) < LARGEST for value in four):
            x0, y0, x1, y1 = map(float, four)
            if x0 < x1 and y0 < y1:
                boxes.append((x0, y0, x1, y1))
    return boxes
