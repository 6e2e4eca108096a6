"""A context in Harmon's words, as text and images in order (docs/specs/harmon.md, 4).

Three layouts look alike: a question stands on a line of its own behind its image; what an image is drawn from stands
right behind the image that is seen; in training an empty line stands before that image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from srum.errors import ModelError
from srum.models.base import Segment

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
CAPTION, BLANK = "Generate an image: ", "Generate an image."

Part = str | Segment  # a text, or an image that is seen


def asked(context: Sequence[Segment], text_of: Callable[[Segment], str]) -> list[Part]:
    """The conversation up to where the assistant answers. What the model wrote are its own turns, all else the user's;
    texts of a turn stand on lines of their own."""
    parts: list[Part] = []
    text, role, begun = "", "", False
    for segment in context:
        speaker = ASSISTANT if segment.written else USER
        if speaker != role:
            text, role, begun = text + (f"{END}\n" if role else "") + speaker, speaker, False
        if segment.kind == "seen":
            parts += [text, segment]
            text = ""
        elif segment.kind == "text":
            text += ("\n" if begun else "") + text_of(segment)
        else:
            raise ModelError(f"Harmon has no place for a {segment.kind} image in what it reads")
        begun = True
    return [*parts, f"{text}{END}\n{ASSISTANT}" if role else f"{USER}{END}\n{ASSISTANT}"]


def requested(context: Sequence[Segment], text_of: Callable[[Segment], str], trained: bool = False) -> list[Part]:
    """The conversation up to where an image is drawn: a request with the prompt, or, where images are seen, these and
    what is said of them; without a text the request of the blank prompt. ``trained``: as the authors' training has it,
    the texts without blanks at their ends, an empty line before an image that comes first."""
    texts = [segment for segment in context if segment.kind == "text"]
    images = [segment for segment in context if segment.kind == "seen"]
    if other := [segment.kind for segment in context if segment.kind not in ("text", "seen")]:
        raise ModelError(f"Harmon draws after texts and images that it sees, not after a {other[0]} image")

    def said(segment: Segment) -> str:
        return text_of(segment).strip() if trained else text_of(segment)

    if not images:
        return [USER + (CAPTION + "\n".join(map(said, texts)) if texts else BLANK) + f"{END}\n{ASSISTANT}"]
    parts: list[Part] = []
    before, after_text = USER + ("\n" if trained and texts and context[0].kind == "seen" else ""), False
    for segment in context:
        if segment.kind == "seen":
            parts += [before, segment]
            before, after_text = "", False
        else:
            before, after_text = before + ("\n" if after_text else "") + said(segment), True
    return [*parts, before + ("" if texts else BLANK) + f"{END}\n{ASSISTANT}"]
