"""A context in Qwen2.5-VL's words, as text and images in order (docs/specs/blip3o.md, 4 and 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from srum.errors import ModelError
from srum.models.base import Segment

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
CAPTION = "Please generate image based on the following caption: "
IMAGE_START, IMAGE_END, IMAGE = "<|vision_start|>", "<|vision_end|>", "[IMG]"
BLANK = " "  # the prompt of no prompt, which stands in no turn

Part = str | Segment  # a text, or an image that is seen


def asked(context: Sequence[Segment], text_of: Callable[[Segment], str]) -> list[Part]:
    """The conversation up to where the assistant answers. What the model wrote are its own turns, all else the user's;
    the texts of a turn stand on lines of their own."""
    parts: list[Part] = []
    text, role, after_text = SYSTEM, "", False
    for segment in context:
        speaker = ASSISTANT if segment.written else USER
        if speaker != role:
            text, role, after_text = text + (END if role else "") + speaker, speaker, False
        if segment.kind == "seen":
            parts += [text + IMAGE_START, segment]
            text, after_text = IMAGE_END, False
        elif segment.kind == "text":
            text, after_text = text + ("\n" if after_text else "") + text_of(segment), True
        else:
            raise ModelError(f"BLIP3-o has no place for a {segment.kind} image in what it reads")
    return [*parts, text + END + ASSISTANT]


def requested(context: Sequence[Segment], text_of: Callable[[Segment], str], closed: bool = False) -> list[Part]:
    """The conversation up to where the queries follow: a request for an image with the caption, or, where images are
    seen, what is said of them. ``closed``: with the empty turn that the authors' training has there."""
    texts = [text_of(segment) for segment in context if segment.kind == "text"]
    images = [segment for segment in context if segment.kind == "seen"]
    if other := [segment.kind for segment in context if segment.kind not in ("text", "seen")]:
        raise ModelError(f"BLIP3-o draws after texts and images that it sees, not after a {other[0]} image")
    parts: list[Part] = []
    before = SYSTEM + USER
    for image in images:
        parts += [before + IMAGE_START, image]
        before = IMAGE_END
    request = "\n".join([IMAGE_END, *texts]) if images else before + CAPTION + "\n".join(texts)
    return [*parts, request + END + ASSISTANT + (END if closed else "") + IMAGE]
