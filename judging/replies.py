"""From the text of a reply to scores, or to the reason why there are none. Nothing here raises, whatever the text.

What a model writes is read generously (markdown, bullets, JSON keys, typographic signs, ``.5``, ``0.9/1.0``, words
behind the number), but a number is never guessed: a range (``0.5 to 0.7``), another scale (``9/10``, ``90%``), a number
cut off by the end of the reply and a number outside [-1, 1] are failures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from srum.records import Failure

_SPACE = r"[^\S\n]"
_MARKS = r"[\s*_`\"'(\[{<~≈$]*"  # what may stand around a key's colon
_LINE_START = rf"^(?:{_SPACE}|[*#>\-•_`\"'.,{{\[)]|\d{{1,3}}[.)])*"
_NUMBER = r"(?P<number>(?>[+-]?(?:\d+(?:[.,]\d+|\.)?|\.\d+)))(?![A-Za-z\d])"
_SCORE = rf"score{_MARKS}[:=]{_MARKS}{_NUMBER}(?P<scale>{_SPACE}*/{_SPACE}*\d+(?:\.\d+)?|{_SPACE}*%)?"
_REGION = rf"region[\s_-]*id{_MARKS}[:=]?{_MARKS}#?(?:(?P<id>\d{{1,6}})(?!\d))?"

_SCORES = (re.compile(_LINE_START + _SCORE, re.I | re.M), re.compile(_SCORE, re.I))
_REGIONS = (re.compile(_LINE_START + _REGION, re.I | re.M), re.compile(_REGION, re.I))
_LABEL = re.compile(rf"object{_MARKS}:[ \t*_`\"']*(?P<value>[^\n]*?)[ \t]*(?:\bscore\b|$)", re.I | re.M)
_REASON = re.compile(rf"reason{_MARKS}:", re.I)
_RANGE = re.compile(rf"{_SPACE}*(?:to\b|or\b|-|~|\.\.+|,){_SPACE}*[+-]?\.?\d", re.I)
_CUT_OFF = re.compile(r"[+-]?\d+\.|[+-]0")  # in place of the number and all behind it
_DASHES = "\N{MINUS SIGN}\N{EN DASH}\N{FIGURE DASH}\N{SMALL HYPHEN-MINUS}\N{FULLWIDTH HYPHEN-MINUS}"
_SIGNS = str.maketrans({**dict.fromkeys(_DASHES, "-"), "\N{FULLWIDTH COLON}": ":", "\N{FULLWIDTH PLUS SIGN}": "+"})
_TRIM = " \t\r\n*_`\"'{}[](),;|>-"


@dataclass(frozen=True)
class Reading:
    """What a reply says of one region or of the layout: a score in [-1, 1] or a failure.

    ``score_start`` is where the score's number begins in the reply.
    """

    score: float | None = None
    failure: Failure | None = None
    label: str | None = None
    reason: str | None = None
    score_start: int | None = None


def parse_regions(reply: str, region_ids: Sequence[int]) -> dict[int, Reading]:
    """What ``reply`` says of each of the regions that were asked about.

    A region is what follows its ``Region ID:``; of several with the same id the last that has a score counts. A
    question about one region may be answered without the id.
    """
    text = reply.translate(_SIGNS)
    start, failure = _body(text)
    if failure is not None:
        return {region_id: Reading(failure=failure) for region_id in region_ids}
    marks = _region_marks(text, start, region_ids)
    if not marks and len(region_ids) == 1:
        return {region_ids[0]: _read(text, start, len(text))}
    found: dict[int, Reading] = {}
    ends = [mark.start() for mark in marks] + [len(text)]
    for mark, end in zip(marks, ends[1:], strict=True):
        if mark["id"] is not None:
            reading = _read(text, mark.end(), end)
            if int(mark["id"]) not in found or reading.failure != Failure.NO_SCORE:
                found[int(mark["id"])] = reading
    missing = Reading(failure=Failure.MISSING_REGION)
    return {region_id: found.get(region_id, missing) for region_id in region_ids}


def parse_layout(reply: str) -> Reading:
    """What ``reply`` says of the layout."""
    text = reply.translate(_SIGNS)
    start, failure = _body(text)
    return Reading(failure=failure) if failure is not None else replace(_read(text, start, len(text)), label=None)


def _body(text: str) -> tuple[int, Failure | None]:
    """Where the answer begins, behind the last thought; a failure where there is none."""
    start = max((mark.end() for mark in re.finditer("</think>", text, re.I)), default=0)
    if re.compile("<think>", re.I).search(text, start):
        return start, Failure.TRUNCATED_THOUGHT
    return start, None if text[start:].strip() else Failure.EMPTY


def _region_marks(text: str, start: int, region_ids: Sequence[int]) -> list[re.Match[str]]:
    """Where regions begin: at the marks that begin lines, unless these leave out regions that others name."""
    leading, anywhere = (list(pattern.finditer(text, start)) for pattern in _REGIONS)
    return leading if {str(index) for index in region_ids} <= {mark["id"] for mark in leading} else anywhere


def _read(text: str, start: int, end: int) -> Reading:
    """The score, label and reason between two places of the text."""
    leading, anywhere = (pattern.search(text, start, end) for pattern in _SCORES)
    match = leading or anywhere
    if match is None:
        return Reading(failure=Failure.NO_SCORE)
    label = _LABEL.search(text, start, match.start("number"))
    reading = Reading(label=_trimmed(label["value"]) if label else None, reason=_reason(text, start, match, end))
    if _RANGE.match(text, match.end(), end) or _CUT_OFF.fullmatch(text, match.start("number")):
        return replace(reading, failure=Failure.NO_SCORE)
    score = float(match["number"].replace(",", "."))
    scale = (match["scale"] or "/1").strip().removeprefix("/")
    if not -1 <= score <= 1 or scale == "%" or float(scale) != 1:
        return replace(reading, failure=Failure.OUT_OF_RANGE)
    return replace(reading, score=score, score_start=match.start("number"))


def _reason(text: str, start: int, score: re.Match[str], end: int) -> str | None:
    """What follows ``Reason:`` behind the score, else before it, else all that follows the score."""
    for first, last in ((score.end(), end), (start, score.start())):
        if mark := _REASON.search(text, first, last):
            return _trimmed(text[mark.end() : last])
    return _trimmed(text[score.end() : end])


def _trimmed(text: str) -> str | None:
    return text.strip(_TRIM) or None
