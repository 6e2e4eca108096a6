"""A context in InternVL3's words (docs/specs/openuni.md, 4 and 10)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from srum.models.base import Segment
from srum.models.queries import chat
from srum.models.queries.chat import ASSISTANT, END, USER, Part, Words, told_apart

INTRODUCTION = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)
IMAGE = "<img>"  # begins an image that is seen, and announces one that is drawn
WORDS = Words("OpenUni", f"<|im_start|>system\n{INTRODUCTION}<|im_end|>\n", IMAGE, "</img>\n")
CAPTION, UNASKED = "Generate an image: ", "Generate an image."


def asked(context: Sequence[Segment], text_of: Callable[[Segment], str]) -> list[Part]:
    """The conversation up to where the assistant answers."""
    return chat.asked(context, text_of, WORDS)


def requested(context: Sequence[Segment], text_of: Callable[[Segment], str]) -> list[Part]:
    """The conversation up to where the queries follow, without a system turn: a request for an image with the caption,
    for just any image where there is no text, or, where images are seen, what is said of them."""
    images, texts = told_apart(context, text_of, WORDS)
    parts: list[Part] = []
    before = USER
    for image in images:
        parts += [before + WORDS.image_start, image]
        before = WORDS.image_end
    text = "\n".join(texts).strip()
    request = text if images else CAPTION + text if text else UNASKED
    return [*parts, before + request + END + ASSISTANT + IMAGE]
