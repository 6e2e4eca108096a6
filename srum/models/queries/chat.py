"""A context in the words of ChatML, as text and images in order; an architecture brings those around an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from srum.errors import ModelError
from srum.models.base import Segment

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"

Part = str | Segment  # a text, or an image that is seen


class Words(NamedTuple):
    """Of an architecture: its name, its system turn, and what stands before and after an image."""

    name: str
    system: str
    image_start: str
    image_end: str


def asked(context: Sequence[Segment], text_of: Callable[[Segment], str], words: Words) -> list[Part]:
    """The conversation up to where the assistant answers. What the model wrote are its own turns, all else the user's;
    the texts of a turn stand on lines of their own."""
    parts: list[Part] = []
    text, role, after_text = words.system, "", False
    for segment in context:
        speaker = ASSISTANT if segment.written else USER
        if speaker != role:
            text, role, after_text = text + (END if role else "") + speaker, speaker, False
        if segment.kind == "seen":
            parts += [text + words.image_start, segment]
            text, after_text = words.image_end, False
        elif segment.kind == "text":
            text, after_text = text + ("\n" if after_text else "") + text_of(segment), True
        else:
            raise ModelError(f"{words.name} has no place for a {segment.kind} image in what it reads")
    return [*parts, text + END + ASSISTANT]


def told_apart(
    context: Sequence[Segment], text_of: Callable[[Segment], str], words: Words
) -> tuple[list[Segment], list[str]]:
    """The images that another is drawn after, and the texts. Raises ModelError for latents among them."""
    images = [segment for segment in context if segment.kind == "seen"]
    texts = [text_of(segment) for segment in context if segment.kind == "text"]
    if other := [segment.kind for segment in context if segment.kind not in ("text", "seen")]:
        raise ModelError(f"{words.name} draws after texts and images that it sees, not after a {other[0]} image")
    return images, texts
