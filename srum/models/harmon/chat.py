"""A context in Harmon's words, as text and images in order (docs/specs/harmon.md, 4).

Three layouts look alike: a question stands on a line of its own behind its image; what an image is drawn from stands
right behind the image that is seen; in training an empty line stands before that image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from srum.models.base import Segment
from srum.models.queries.chat import ASSISTANT, END, USER, Part, Words, told_apart

WORDS = Words("Harmon", system="", image_start="", image_end="\n")
CAPTION, BLANK = "Generate an image: ", "Generate an image."


def requested(context: Sequence[Segment], text_of: Callable[[Segment], str], trained: bool = False) -> list[Part]:
    """The conversation up to where an image is drawn: a request with the prompt, or, where images are seen, these and
    what is said of them; without a text the request of the blank prompt. ``trained``: as the authors' training has it,
    the texts without blanks at their ends, an empty line before an image that comes first."""

    def said(segment: Segment) -> str:
        return text_of(segment).strip() if trained else text_of(segment)

    images, texts = told_apart(context, said, WORDS)
    if not images:
        return [USER + (CAPTION + "\n".join(texts) if texts else BLANK) + END + ASSISTANT]
    parts: list[Part] = []
    before, after_text = USER + ("\n" if trained and texts and context[0].kind == "seen" else ""), False
    for segment in context:
        if segment.kind == "seen":
            parts += [before, segment]
            before, after_text = "", False
        else:
            before, after_text = before + ("\n" if after_text else "") + said(segment), True
    return [*parts, before + ("" if texts else BLANK) + END + ASSISTANT]
