"""From the text of a reply to scores, or to the reason why there are none. Nothing here raises, whatever the text.

What a model writes is read generously (markdown, bullets, JSON keys, typographic signs, ``.5``, ``0.9/1.0``, words
behind the number, digits of any script), but a number is never guessed: it is a score where the rest of its line says
nothing else about it. A range (``0.5 to 0.7``), another scale (``9/10``, ``90%``, ``1 out of ten``), two numbers or two
score lines that differ, a number cut off by the end of the reply and a number outside [-1, 1] are failures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from srum.judging.scales import SPACE, plain, says_more
from srum.judging.thoughts import answer_start, in_form
from srum.records import Failure

_MARKS = r"[\s*_`\"'(\[{<~≈$]*"  # what may stand around a key's colon
_LINE_START = rf"^(?:{SPACE}|[*#>\-•_`\"'.,{{\[)]|\d{{1,3}}[.)])*"
_NUMBER = r"(?P<number>(?>[+-]?(?:\d+(?:[.,]\d+|\.)?|\.\d+)))(?![A-Za-z\d])"
_SCORE = rf"score{_MARKS}[:=]{_MARKS}{_NUMBER}(?P<scale>{SPACE}*/{SPACE}*\d+(?:\.\d+)?|{SPACE}*%)?"
_REGION = rf"region[\s_-]*id{_MARKS}[:=]?{_MARKS}#?(?:(?P<id>\d{{1,6}})(?!\d))?"

_SCORES = (re.compile(_LINE_START + _SCORE, re.I | re.M), re.compile(_SCORE, re.I))
_REGIONS = (re.compile(_LINE_START + _REGION, re.I | re.M), re.compile(_REGION, re.I))
_LABEL = re.compile(rf"object{_MARKS}:[ \t*_`\"']*(?P<value>[^\n]*?)[ \t]*(?:\bscore\b|$)", re.I | re.M)
_REASON = re.compile(rf"reason{_MARKS}:", re.I)
_CUT_OFF = re.compile(r"[+-]?\d+\.|[+-]0")  # in place of the number and all behind it
_THOUSANDS = re.compile(r"[+-]?[1-9]\d*,\d{3}")
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


def parse_regions(
    reply: str, region_ids: Sequence[int], ended: bool = True, thinks: bool = False
) -> dict[int, Reading]:
    """What ``reply`` says of each of the regions that were asked about.

    A region is what follows its ``Region ID:``; of several with the same id the last that has a score counts. A
    question about one region may be answered without the id. ``ended`` is false for a reply that the limit of tokens
    cut off; where it ``thinks``, a thought was asked for, a cut reply without the end of a thought is all thought.
    """
    text = plain(reply)
    start, failure = _body(text, ended, thinks)
    if failure is not None:
        return {region_id: Reading(failure=failure) for region_id in region_ids}
    marks = _region_marks(text, start, region_ids)
    if not marks and len(region_ids) == 1:
        return {region_ids[0]: _read(text, start, len(text), ended)}
    readings: dict[int, Reading] = {}
    ends = [mark.start() for mark in marks] + [len(text)]
    for mark, end in zip(marks, ends[1:], strict=True):
        if mark["id"] is not None:
            reading = _read(text, mark.end(), end, ended)
            if int(mark["id"]) not in readings or reading.failure != Failure.NO_SCORE:
                readings[int(mark["id"])] = reading
    missing = Reading(failure=Failure.MISSING_REGION)
    return {region_id: readings.get(region_id, missing) for region_id in region_ids}


def parse_layout(reply: str, ended: bool = True, thinks: bool = False) -> Reading:
    """What ``reply`` says of the layout; ``ended`` and ``thinks`` as for ``parse_regions``."""
    text = plain(reply)
    start, failure = _body(text, ended, thinks)
    if failure is not None:
        return Reading(failure=failure)
    return replace(_read(text, start, len(text), ended), label=None)


def _body(text: str, ended: bool, thinks: bool) -> tuple[int, Failure | None]:
    """Where the answer begins, behind the last thought; a failure where there is none.

    A cut reply that does not begin as an answer does is a thought without marks.
    """
    start, begun = answer_start(text)
    if not text[start:].strip():
        return start, Failure.TRUNCATED_THOUGHT if begun else Failure.EMPTY
    unmarked = not ended and start == 0 and (thinks or not in_form(text, start))
    return start, Failure.TRUNCATED_THOUGHT if begun or unmarked else None


def _region_marks(text: str, start: int, region_ids: Sequence[int]) -> list[re.Match[str]]:
    """Where regions begin: at the marks that begin lines, unless these leave out regions that others name."""
    leading, anywhere = (list(pattern.finditer(text, start)) for pattern in _REGIONS)
    return leading if {str(index) for index in region_ids} <= {mark["id"] for mark in leading} else anywhere


def _read(text: str, start: int, end: int, ended: bool) -> Reading:
    """The score, label and reason between two places of the text."""
    leading, anywhere = (list(pattern.finditer(text, start, end)) for pattern in _SCORES)
    matches = leading or anywhere
    if not matches:
        return Reading(failure=Failure.NO_SCORE)
    match = matches[0]
    label = _LABEL.search(text, start, match.start("number"))
    reading = Reading(label=_trimmed(label["value"]) if label else None, reason=_reason(text, start, match, end))
    scores = {_value(match) for match in matches}
    scale = (match["scale"] or "/1").strip().removeprefix("/")
    if not -1 <= _value(match) <= 1 or scale == "%" or float(scale) != 1:
        return replace(reading, failure=Failure.OUT_OF_RANGE)
    if len(scores) > 1 or _is_guess(text, start, match, end, ended):
        return replace(reading, failure=Failure.NO_SCORE)
    return replace(reading, score=_value(match), score_start=match.start("number"))


def _value(match: re.Match[str]) -> float:
    return float(match["number"].replace(",", "."))


def _is_guess(text: str, start: int, match: re.Match[str], end: int, ended: bool) -> bool:
    """Whether to read the number as a score would be to guess: cut off, a thousand, a bound, or more is said of it."""
    cut_off = _CUT_OFF.fullmatch(text, match.start("number")) or not (ended or text[match.end() :].strip(_TRIM))
    bound = "<" in text[match.start() : match.start("number")] and ">" not in text[match.end("number") :][:2]
    if cut_off or bound or _THOUSANDS.fullmatch(match["number"]):
        return True
    return says_more(text, start, match.start(), match.end("number"), end)


def _reason(text: str, start: int, score: re.Match[str], end: int) -> str | None:
    """What follows ``Reason:`` behind the score, else before it, else all that follows the score."""
    for first, last in ((score.end(), end), (start, score.start())):
        if mark := _REASON.search(text, first, last):
            return _trimmed(text[mark.end() : last])
    return _trimmed(text[score.end() : end])


def _trimmed(text: str) -> str | None:
    return text.strip(_TRIM) or None
