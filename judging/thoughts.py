"""Where the answer begins in a reply: behind the last thought, in whatever marks that stands."""

from __future__ import annotations

import re

_WORD = r"(?:[\w.-]*:)?\w*(?:think|thought|reasoning|analysis|reflection|scratchpad|working_out|思考|思索|推理)\w*"
_MARK = re.compile(
    rf"[<◁〈《【{{]\|?\s*(?P<end>/|end_(?:of_)?)?{_WORD}\s*\|?[>▷〉》】}}]"
    r"|\[(?P<end_in_square>/)?(?:think|thinking|thought)\]"
    r"|(?P<end_of_channel><\|channel\|>\s*final\s*<\|message\|>)|<\|channel\|>\s*(?:analysis|commentary)\b",
    re.I,
)
_FORM = re.compile(
    r"[\s*#>\-•_`\"'{\[(.,\d)]*(?:json\s*[\[{\s\"'*]*)?(?:region|score|(?:identified\s+)?object|reason|composition|asked|layout|$)",
    re.I,
)


def answer_start(text: str) -> tuple[int, bool]:
    """Where the answer begins, behind the last thought that ends; and whether another begins there and does not end."""
    start, begun = 0, False
    for mark in _MARK.finditer(text):
        if mark["end"] or mark["end_in_square"] or mark["end_of_channel"]:
            start, begun = mark.end(), False
        else:
            begun = True
    return start, begun


def in_form(text: str, start: int) -> bool:
    """Whether the text from ``start`` begins as an answer does, with one of its keys, not as a thought does."""
    return _FORM.match(text, start) is not None
