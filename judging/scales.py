"""What a line says about its number beside the number: another scale, a second number, a unit, a part of a whole.

A judge is asked for a number from -1 to 1. ``1`` may also stand for one of ten, for one percent or for the lower end of
a range; whoever says so in the line, in whatever script, has given no score.
"""

from __future__ import annotations

import re
import unicodedata

SPACE = r"[^\S\n]"
_FULL_WIDTH = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_DASHES = "\N{MINUS SIGN}\N{EN DASH}\N{FIGURE DASH}\N{SMALL HYPHEN-MINUS}"
_SIGNS = {"\N{ARABIC DECIMAL SEPARATOR}": ".", "\N{ARABIC THOUSANDS SEPARATOR}": ",", **dict.fromkeys(_DASHES, "-")}
_PLAIN = _FULL_WIDTH | _SIGNS

_OF_ONE = rf"(?:{SPACE}*/{SPACE}*|{SPACE}+(?:out{SPACE}+)?of{SPACE}+)1(?:\.0*)?(?![.,]?\d)"
_SEPARATOR = r"[.,;:!(\[{#|\N{IDEOGRAPHIC FULL STOP}\N{IDEOGRAPHIC COMMA}\N{EM DASH}]|-\s"
_GROUND = r"(?:because|since|due|reason|region|weil|denn|parce|car|porque|perch\S|poich\S|потому|так как|因为|ので|لأن)"
_HARMLESS = re.compile(rf"(?:{_OF_ONE})?[*_`\"')\]}}>$|~\s]*(?:$|(?={_SEPARATOR})|(?={_GROUND}))", re.I)
_KEY = re.compile(
    r"\b(?:reason|explanation|justification|rationale|comment|object|label|region)[\w\s]*[*_`\"']*\s*:", re.I
)
_OTHER = re.compile(
    r"[%‰‱٪﹪★☆⭐✩✭✯]|\bout\s+of\b"
    r"|\b(?:per\s?cent\w*|pct|prozent\w*|pour\s?cent\w*|por\s?cien\w*|por\s?cento|per\s?cento|процент\w*)\b"
    r"|百分|パーセント|퍼센트|بالمئة|بالمائة|المئة|المائة|प्रतिशत"
    r"|\b(?:scale|échelle|skala|escala|scala|шкал\w*)\b|满分|滿分|満点|分制|点制|段階|만점|점\s?척도|مقياس|पैमाने"
    r"|\bof\s+(?:a\s+)?(?:possible|max\w*|total|two|three|four|six|seven|eight|nine|twelve|twenty)\b"
    r"|\b(?:five|ten|hundred|fünf|zehn|hundert|cinq|dix|cent|cinco|diez|cien|dez|cem|cinque|dieci|cento)\b"
    r"|\b(?:пят[иь]|десят[иь]|сто|ста)\b|عشرة|خمسة|مئة|مائة|दस|सौ|पाँच|पांच|[一二三四五六七八九十百]分之|열\s|다섯",
    re.I,
)
_LIMIT = re.compile(  # a key with the end of a scale, of JSON too, that is not "-1 to 1" or 1
    r"(?:^|[\s{,\"'*_`-])(?:max(?:imum)?|scale|out[_ ]of|unit)\w*(?:[_ ]\w+)?[*_`\"'\s]*[:=][\s*_`\"'(\[]*"
    r"(?!(?:-1(?:\.0*)?\s*(?:to|,|;|-|\.\.+)\s*)?\+?1(?:\.0*)?(?![.,]?\d|\s*%))(?:[-+]?\d|per|%|point|star)",
    re.I,
)
_SCALE = re.compile(
    r"\b(?:scale|range|échelle|skala|escala|scala|шкал\w*)\b\D{0,20}(?P<first>\d+)(?:\D{1,8}(?P<last>\d+))?", re.I
)


def plain(text: str) -> str:
    """The text with the digits, signs and full-width letters of all scripts in ASCII, character by character."""
    return re.sub(r"[^\x00-\x7f]", lambda match: _plain(match[0]), text)


def _plain(character: str) -> str:
    return str(unicodedata.decimal(character)) if character.isdecimal() else _PLAIN.get(character, character)


def says_more(text: str, start: int, line_start: int, number_end: int, end: int) -> bool:
    """Whether the part of the plain ``text`` from ``start`` to ``end`` names another scale or a second number for a
    number in it.

    The number's line counts from ``line_start``, where the score's key begins in it, on: what ends at ``number_end``
    may be followed by ``/1``, ``out of 1``, punctuation and words, up to a key such as ``Reason:``.
    """
    line_end = _line_end(text, number_end, end)
    rest = text[number_end:line_end]
    if not (harmless := _HARMLESS.match(rest)):
        return True
    words = rest[harmless.end() :]
    key = _KEY.search(words)
    words = words[: key.start()] if key else words
    before = text[max(start, text.rfind("\n", 0, line_start) + 1) : line_start]
    if _OTHER.search(before) or _OTHER.search(words) or any(unicodedata.category(c)[0] == "N" for c in words):
        return True
    return _LIMIT.search(text, start, end) is not None or any(map(_is_other, _SCALE.finditer(text, start, end)))


def _line_end(text: str, place: int, end: int) -> int:
    """The end of the line; of the next one too where it begins with a scale."""
    continued = re.compile(r"[^\n]*\n\s*(?:[/%]|out\s+of\b)[^\n]*|[^\n]*").match(text, place, end)
    assert continued is not None  # the second branch fits anything
    return continued.end()


def _is_other(scale: re.Match[str]) -> bool:
    """Whether a scale in words is another one than from -1, or 0, to 1."""
    return any(int(limit) > 1 for limit in (scale["first"], scale["last"]) if limit)
