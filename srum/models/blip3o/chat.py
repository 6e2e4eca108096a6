"""A context in Qwen2.5-VL's words (docs/specs/blip3o.md, 4 and 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from srum.models.base import Segment
from srum.models.queries import chat
from srum.models.queries.chat import ASSISTANT, END, USER, Part, Words, told_apart

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
WORDS = Words("BLIP3-o", SYSTEM, "<|vision_start|>", "<|vision_end|>")
CAPTION = "Please generate image based on the following caption: "
IMAGE = "[IMG]"
BLANK = " "  # the prompt of no prompt, which stands in no turn


def asked(context: Sequence[Segment], text_of: Callable[[Segment], str]) -> list[Part]:
    """The conversation up to where the assistant answers."""
    return chat.asked(context, text_of, WORDS)


def requested(context: Sequence[Segment], text_of: Callable[[Segment], str], closed: bool = False) -> list[Part]:
    """The conversation up to where the queries follow: a request for an image with the caption, or, where images are
    seen, what is said of them. ``closed``: with the empty turn that the authors' training has there."""
    images, texts = told_apart(context, text_of, WORDS)
    parts: list[Part] = []
    before = SYSTEM + USER
    for image in images:
        parts += [before + WORDS.image_start, image]
        before = WORDS.image_end
    request = "\n".join([before, *texts]) if images else before + CAPTION + "\n".join(texts)
    return [*parts, request + END + ASSISTANT + (END if closed else "") + IMAGE]
