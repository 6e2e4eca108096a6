"""Replies beside what is read of them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srum.judging.instructions import layout_reply, load_instructions, region_reply
from srum.judging.replies import Reading, parse_layout, parse_regions
from srum.records import Failure

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "bagel" / "srum_parser.json").read_text())
E, T, N, O, M = (  # noqa: E741
    Failure.EMPTY,
    Failure.TRUNCATED_THOUGHT,
    Failure.NO_SCORE,
    Failure.OUT_OF_RANGE,
    Failure.MISSING_REGION,
)
WELL_FORMED = "Region ID: 1\nIdentified Object: a cat\nScore: 0.9\nReason: It is asked for."


def outcome(reading: Reading) -> float | Failure | None:
    return reading.score if reading.failure is None else reading.failure


# One question about region 1. Regions by name of the table: what varies is how the number is written.
NUMBERS: list[tuple[str, float | Failure]] = [
    ("Score: 0.9", 0.9),
    ("Score: 1", 1.0),
    ("Score: -1", -1.0),
    ("Score: 0", 0.0),
    ("score:0.5", 0.5),
    ("SCORE : 0.5", 0.5),
    ("Score = 0.5", 0.5),
    ("Score: +0.5", 0.5),
    ("Score: .5", 0.5),
    ("Score: -.5", -0.5),
    ("Score: 0,9", 0.9),
    ("Score: \N{MINUS SIGN}0.4", -0.4),
    ("Score: \N{EN DASH}0.4", -0.4),
    ("Score\N{FULLWIDTH COLON}0.4", 0.4),
    ("**Score:** 0.7", 0.7),
    ("**Score**: 0.7", 0.7),
    ("**Score: 0.7**", 0.7),
    ("- Score: 0.7", 0.7),
    ("- **Score:** `-0.7`", -0.7),
    ("* Score: 0.7", 0.7),
    ("2. Score: 0.7", 0.7),
    ("### Score: 0.7", 0.7),
    ("| Score: 0.7 |", 0.7),
    ("Score: 0.9/1.0", 0.9),
    ("Score: 0.9 / 1", 0.9),
    ("Score: 0.9\r/ 1", 0.9),
    ("Score: 0.9\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}1", 0.9),
    ("Score: 9\x0b/10", O),
    ("Score: 0.9 out of 1", 0.9),
    ("Score: 0.9 (good)", 0.9),
    ("Score: 0.9, well drawn", 0.9),
    ("Score: 0.9. Well drawn.", 0.9),
    ("Score: 0.9.", 0.9),
    ("Score: (0.9)", 0.9),
    ("Score: [0.9]", 0.9),
    ("Score: ~0.9", 0.9),
    ("Score:\n0.9", 0.9),
    ('{"region_id": 1, "score": 0.9, "reason": "good"}', 0.9),
    ("Score: 0.\nReason: none", 0.0),
    ("Overall Score: 0.6, Score: 0.9", N),  # two numbers in a line
    ("Overall score: 0.6\nScore: 0.9", 0.9),  # a line of its own comes first
    ("Reason: the score: 3 goals is shown\nScore: 0.9", 0.9),
    ("Score: 1.5", O),
    ("Score: -2", O),
    ("Score: 95", O),
    ("Score: 9/10", O),
    ("Score: 1/10", O),
    ("Score: 1%", O),
    ("Score: 1" + "0" * 5000, O),
    ("Score: 0.5 to 0.7", N),
    ("Score: 0.5-0.7", N),
    ("Score: -1.0 \N{EN DASH} 1.0", N),
    ("Score: [-1, 1]", N),
    ("Score: a number from -1 to 1", N),
    ("Score: high", N),
    ("Score: N/A", N),
    ("Score:", N),
    ("Score: 1e5", N),
    ("Score: 0.9x", N),
    ("Score: 0.5\nReason: The prompt asks for 2 apples, and there are 3.", 0.5),  # the reason's end, not the number's
    ("Score: -0.5\nReason: It shows 1 apple instead of +0", -0.5),
    ("Score: 0.", N),  # cut off
    ("Score: -0", N),  # cut off
    ("Score: -", N),
    ("Score 0.9", N),  # no colon: nothing says that this is the score
    ("0.9", N),
    ("I cannot see any regions.", N),
    ("", E),
    (" \n ", E),
    ("<think>fine</think>", E),
    ("<think>fine</think>Score: 0.9", 0.9),
    ("<think>Score: 0.1</think>\nScore: 0.9", 0.9),
    ("fine</think>\nScore: 0.9", 0.9),
    ("<think>one</think> two </think> Score: 0.9", 0.9),
    ("<think>Score: 0.1", T),
    ("Score: 0.9\n<think>but", T),
    ("<think>a</think>Score: 0.9<think>", T),
]

# What a line says beside its number, in ten languages.
NUMBERS += [
    ("Score: 1 (one of seven)", N),
    ("Score: 1, of a possible twenty", N),
    ("Score: 0.5, of two cats one is missing", N),
    ("Score: 0.5 out of 1", 0.5),
    ("Score: 0.5 out of 1.0, fine", 0.5),
    ("Score: 0.5 of 1", 0.5),
    ("Score: 0.5 out of 10", N),
    ("Score: 1 out of 10", N),
    ("Score: 1 out of ten", N),
    ("Score: 1 (out of ten)", N),
    ("Score: 1 of 5 stars", N),
    ("Score: 1 star", N),
    ("Score: 1 \N{BLACK STAR}", N),
    ("Score: 1 percent", N),
    ("Score: 1 per cent", N),
    ("Score: 1\N{FULLWIDTH SOLIDUS}10", O),
    ("Score: 1\N{FULLWIDTH PERCENT SIGN}", O),
    ("Score: 1\N{PER MILLE SIGN}", N),
    ("Score: 1\N{FRACTION SLASH}2", N),
    ("Score: 1/2", O),
    ("Score: 1\N{VULGAR FRACTION ONE HALF}", N),
    ("Score: 1\N{SUPERSCRIPT TWO}", N),
    ("Score: 1 half", N),
    ("Score: 1, on a scale from one to ten", N),
    ("Score: 1 on a scale of 1 to 10", N),
    ("On a scale of 1 to 10:\nScore: 1", N),
    ("On a scale of -1 to 1:\nScore: 1", 1.0),
    ("Percent score: 1", N),
    ("Out of ten, the score: 1", N),
    ("Score: 1\n/10", N),
    ("Score: 1\nout of 10", N),
    ("Score: 0.5\N{EM DASH}0.7", N),
    ("Score: 0.5\N{HORIZONTAL BAR}0.7", N),
    ("Score: 0.5\N{WAVE DASH}0.7", N),
    ("Score: 0.5\N{HORIZONTAL ELLIPSIS}0.7", N),
    ("Score: 0.5 \N{RIGHTWARDS ARROW} 0.7", N),
    ("Score: 0.5 and 0.7", N),
    ("Score: 0.5, maybe 0.7", N),
    ("Score: 0.5 (was 0.7)", N),
    ("Score: 0.5 \N{PLUS-MINUS SIGN} 0.1", N),
    ("Score: 0.5+", N),
    ("Score: <0.5", N),
    ("Score: <0.5>", 0.5),
    ("Score: 0.5; 0.7", N),
    ("Score: between 0.5 and 0.7", N),
    ("Score: 0.5.7", N),
    ("Score: 0. 5", N),
    ("Score: 0\N{MIDDLE DOT}5", N),
    ("Score: 1,000", N),
    ("Score: 1 000", N),
    ("Score: 1'000", N),
    ("Score: 1_0", N),
    ("Score: 1 x 0.5", N),
    ("Score: 0.9e-1", N),
    ("Score: 0.5 because there are 3", N),
    ("Score: 0.5 because it is blurred", 0.5),
    ("Score: 0.5 - blurred", 0.5),
    ("Score: 0.5 Reason: 2 of the 3 apples are there", 0.5),
    ('{"score": 0.5, "reason": "2 of the 3 apples"}', 0.5),
    ('{"score": 1, "max_score": 10}', N),
    ('{"max_score": 10, "score": 1}', O),
    ('{\n  "score": 1,\n  "max_score": 10\n}', N),
    ('{\n  "score": 1,\n  "scale": "1-10"\n}', N),
    ('{\n  "score": 1,\n  "unit": "percent"\n}', N),
    ('{\n  "score": 0.5,\n  "max_score": 1.0\n}', 0.5),
    ("Score: 1\nMaximum: 10", N),
    ("Score: 0.5\nScore: 0.7", N),
    ("Score: 0.5\nScore: 0.5", 0.5),
    ("Score: 0\N{FULLWIDTH FULL STOP}8", 0.8),
    ("\N{FULLWIDTH LATIN CAPITAL LETTER S}core\N{FULLWIDTH COLON}\N{FULLWIDTH DIGIT ZERO}.5", 0.5),
    ("Score: \u0660\u066b\u0668", 0.8),  # Arabic digits and decimal separator
    ("Score: \u0967", 1.0),  # Devanagari
    ("Score: \u0967/\u0967\u0966", O),
    ("Score: \N{FULLWIDTH DIGIT ONE}\N{FULLWIDTH DIGIT ZERO}", O),
    ("Score: \N{CIRCLED DIGIT ONE}", N),
    ("Score: 1 von 10", N),  # German
    ("Score: 1 Prozent", N),
    ("Score: 1, von zehn", N),
    ("Score: 0,5 bis 0,7", N),
    ("Score: 0,5, weil es unscharf ist", 0.5),
    ("Score: 1 (Skala von 1 bis 10)", N),
    ("Score: 1 sur 10", N),  # French
    ("Score: 1 sur dix", N),
    ("Score: 1, sur une échelle de dix", N),
    ("Score: 1 pour cent", N),
    ("Score: 0,5 à 0,7", N),
    ("Score: 0,5, le cercle est flou", 0.5),
    ("Score: 1 de 10", N),  # Spanish
    ("Score: 1 sobre diez", N),
    ("Score: 1 por ciento", N),
    ("Score: 1 (escala del uno al diez)", N),
    ("Score: 0,5 porque está borroso", 0.5),
    ("Score: 1 em 10", N),  # Portuguese
    ("Score: 1 de dez", N),
    ("Score: 1 por cento", N),
    ("Score: 0,5 ou 0,7", N),
    ("Score: 0,5, um pouco desfocado", 0.5),
    ("Score: 1 su dieci", N),  # Italian
    ("Score: 1 per cento", N),
    ("Score: 1, in una scala da uno a dieci", N),
    ("Score: 0,5, un po' sfocato", 0.5),
    ("Score: 1 из 10", N),  # Russian
    ("Score: 1 из десяти", N),
    ("Score: 1 процент", N),
    ("Score: 1 балл", N),
    ("Score: 1, по шкале до десяти", N),
    ("Score: 0,5 — размыто", 0.5),
    ("Score：1分（满分10分）", N),  # Chinese
    ("Score：1（十分制）", N),
    ("Score：百分之1", N),
    ("Score：1，满分为十", N),
    ("Score：0.5到0.7", N),
    ("Score：0.5～0.7", N),
    ("Score：0.5，圆形有点模糊。", 0.5),
    ("Score：1/10点", O),  # Japanese
    ("Score：1（10点満点）", N),
    ("Score：1点、十点満点", N),
    ("Score：1パーセント", N),
    ("Score：0.5から0.7", N),
    ("Score：0.5。少しぼやけている。", 0.5),
    ("Score: 10점 만점에 1", O),  # Korean
    ("Score: 1점", N),
    ("Score: 1, 십점 만점", N),
    ("Score: 1퍼센트", N),
    ("Score: 0.5, 조금 흐립니다", 0.5),
    ("Score: 1 من 10", N),  # Arabic
    ("Score: \u0661 من \u0661\u0660", N),
    ("Score: 1 من عشرة", N),
    ("Score: 1 بالمئة", N),
    ("Score: 1\N{FULLWIDTH SOLIDUS}10", O),
    ("Score: 0\N{FULLWIDTH FULL STOP}8", 0.8),
    ("Score: 0.5\N{EM DASH}0.7", N),
    ("Score: 0.5 out of 1", 0.5),
    ("Score: 0.5، غير واضح", N),  # the Arabic comma is none of the separators that are known
]


@pytest.mark.parametrize(("reply", "expected"), NUMBERS)
def test_one_number(reply: str, expected: float | Failure) -> None:
    """A question about one region may be answered with or without its id, and the layout in the same way."""
    assert outcome(parse_regions(reply, [1])[1]) == expected
    assert outcome(parse_layout(reply)) == expected


def test_the_table_is_long_enough() -> None:
    assert len({reply for reply, *_ in (*NUMBERS, *SEVERAL, *((reply, None) for reply, _ in THOUGHTS))}) >= 200


# Several regions: the reply, and what is read of the regions 1 and 2.
SEVERAL: list[tuple[str, float | Failure, float | Failure]] = [
    ("Region ID: 1\nScore: 0.1\n\nRegion ID: 2\nScore: 0.2", 0.1, 0.2),
    ("Region ID: 1\nScore: 0.1\n---\nRegion ID: 2\nScore: 0.2", 0.1, 0.2),
    ("Region ID: 1\nScore: 0.1\nRegion ID: 2\nScore: 0.2", 0.1, 0.2),
    ("Region ID: 2\nScore: 0.2\n\nRegion ID: 1\nScore: 0.1", 0.1, 0.2),
    ("Region ID: 1\n\nIdentified Object: a boat\n\nScore: 0.1\n\nRegion ID: 2\n\nScore: 0.2", 0.1, 0.2),
    ("**Region ID: 1**\n**Score:** 0.1\n\n**Region ID:** 2\nScore: 0.2", 0.1, 0.2),
    ("### Region ID 1\n- Score: 0.1\n### Region ID 2\n- Score: 0.2", 0.1, 0.2),
    ("1. Region ID: 1\n   Score: 0.1\n2. Region ID: 2\n   Score: 0.2", 0.1, 0.2),
    ("Region ID: #1\nScore: 0.1\nRegion ID: #2\nScore: 0.2", 0.1, 0.2),
    ("Region ID: 1 Score: 0.1 Region ID: 2 Score: 0.2", 0.1, 0.2),
    ("Region ID: 1\r\nScore: 0.1\r\n\r\nRegion ID: 2\r\nScore: 0.2\r\n", 0.1, 0.2),
    ('[{"region_id": 1, "score": 0.1}, {"region_id": 2, "score": 0.2}]', 0.1, 0.2),
    ("Region ID: 1\nScore: 0.1\nReason: unlike Region ID: 2, good\n\nRegion ID: 2\nScore: 0.2", 0.1, 0.2),
    ("Region ID: 1\nRegion ID: 2\n\nRegion ID: 1\nScore: 0.1\nRegion ID: 2\nScore: 0.2", 0.1, 0.2),  # list repeated
    ("Region ID: 1\nScore: 0.3\nRegion ID: 2\nScore: 0.2\nRegion ID: 1\nScore: 0.1", 0.1, 0.2),  # the last counts
    ("Region ID: 1\nScore: 0.1\nRegion ID: 2\nScore: 0.2\nRegion ID: 1\nScore:", 0.1, 0.2),  # cut off while repeating
    ("Region ID: 1\nScore: 0.1\nRegion ID: 2\nScore: 0.2\nReason: Of 2 apples there are 3.", 0.1, 0.2),
    ("Region ID: 1\nScore: 0.1\nRegion ID: 2\nScore: 0.", 0.1, N),  # cut off
    ("Region ID: 1\nScore: 0.1", 0.1, M),
    ("Region ID: 1\nScore: 0.1\nRegion ID: 12\nScore: 0.2", 0.1, M),
    ("Region ID: 1\nRegion ID: 2\nScore: 0.2", N, 0.2),
    ("Region ID: 1\nScore: 7\nRegion ID: 2\nScore: 0.2", O, 0.2),
    ("Region ID: one\nScore: 0.1\nRegion ID: 2\nScore: 0.2", M, 0.2),
    ("Region ID: 1\nRegion ID: two\nScore: 0.2", N, M),  # the score of an unknown region is nobody's
    ("Region ID: " + "1" * 5000 + "\nScore: 0.1\nRegion ID: 2\nScore: 0.2", M, 0.2),
    ("Score: 0.1\nScore: 0.2", M, M),
    ("no regions", M, M),
    ("", E, E),
    ("<think>Region ID: 1\nScore: 0.1\nRegion ID: 2", T, T),
]


@pytest.mark.parametrize(("reply", "first", "second"), SEVERAL)
def test_several_regions(reply: str, first: float | Failure, second: float | Failure) -> None:
    readings = parse_regions(reply, [1, 2])
    assert [outcome(readings[1]), outcome(readings[2])] == [first, second]


def test_a_reply_about_another_region_is_no_answer() -> None:
    assert outcome(parse_regions("Region ID: 3\nScore: 0.5", [1])[1]) == M


@pytest.mark.parametrize(
    ("reply", "label", "reason"),
    [
        (WELL_FORMED, "a cat", "It is asked for."),
        (
            "Region ID: 1\n**Identified Object:** `a cat`\n**Score:** 0.9\n**Reason:** good\nin two lines\n---",
            "a cat",
            "good\nin two lines",
        ),
        ("Object: hill Score: 0.6", "hill", None),
        ("Score: 0.6 because it is blurred", None, "because it is blurred"),
        ("Reason: it is blurred\nScore: 0.6", None, "it is blurred"),
        ('{"object": "a cat", "score": 0.6, "reason": "blurred"}', "a cat", "blurred"),
        ("Score: 0.6", None, None),
    ],
)
def test_labels_and_reasons(reply: str, label: str | None, reason: str | None) -> None:
    reading = parse_regions(reply, [1])[1]
    assert (reading.label, reading.reason) == (label, reason)


def test_the_start_of_the_score_is_a_place_in_the_reply() -> None:
    reply = "<think>\N{MINUS SIGN}</think>Region ID: 1\nScore: \N{MINUS SIGN}0.4\n\nRegion ID: 2\n**Score:** +0.5"
    readings = parse_regions(reply, [1, 2])
    starts = [readings[index].score_start for index in (1, 2)]
    assert [reply[start : start + 4] for start in starts if start is not None] == ["\N{MINUS SIGN}0.4", "+0.5"]


def test_well_formed_replies_and_the_examples_of_the_instructions() -> None:
    reading = parse_regions(region_reply(3, "small red circle", -0.5, "it should be blue"), [3])[3]
    assert (reading.score, reading.label, reading.reason) == (-0.5, "small red circle", "it should be blue")
    layout = parse_layout(layout_reply(0.4, "two things as asked"))
    assert (layout.score, layout.reason) == (0.4, "two things as asked")
    described = parse_layout(layout_reply(-1.0, "too few things", "a small red circle at 12, 20"))
    assert (described.score, described.reason) == (-1.0, "too few things")
    paper = load_instructions("paper")
    example = parse_regions(example_of(paper.region), [1, 2])
    assert [(r.score, r.label) for r in example.values()] == [(0.9, "a red apple"), (-0.7, "a blurred second stalk")]
    assert all(reading.reason for reading in example.values())
    short = parse_regions(example_of(paper.short_region), [1])[1]
    assert (short.score, short.label, short.reason) == (0.9, "a red apple", "It is asked for.")
    for text, score in ((paper.layout, 0.3), (paper.short_layout, 0.3), (paper.whole, -0.6)):
        reading = parse_layout(example_of(text))
        assert reading.score == score and reading.reason


def example_of(instruction: str | None) -> str:
    """The example that ends an instruction."""
    assert instruction is not None
    return re.split(r"exactly\s+this format", instruction)[1]


# Thoughts in other marks than <think>: the reply, and what is read of it.
THOUGHTS: list[tuple[str, float | Failure]] = [
    ("\u25c1think\u25b7\nScore: 0.9\nno, it is blue.\u25c1/think\u25b7\nScore: -0.5", -0.5),
    ("[THINK]\nScore: 0.9\nno[/THINK]\nScore: -0.5", -0.5),
    ("<seed:think>\nScore: 0.9\nno</seed:think>Score: -0.5", -0.5),
    ("<reasoning>\nScore: 0.9\nno</reasoning>Score: -0.5", -0.5),
    ("<thought>\nScore: 0.9\nno</thought>\nScore: -0.5", -0.5),
    ("<thinking>\nScore: 0.9\n</thinking>\nScore: -0.5", -0.5),
    ("<analysis>\nScore: 0.9\n</analysis>\nScore: -0.5", -0.5),
    ("<|begin_of_thought|>\nScore: 0.9\n<|end_of_thought|>\nScore: -0.5", -0.5),
    ("<start_working_out>\nScore: 0.9\n<end_working_out>\nScore: -0.5", -0.5),
    ("<|channel|>analysis<|message|>Score: 0.9<|end|><|channel|>final<|message|>Score: -0.5", -0.5),
    ("\N{FULLWIDTH LESS-THAN SIGN}think\N{FULLWIDTH GREATER-THAN SIGN}Score: 0.9</think>Score: -0.5", -0.5),
    ("<思考>\nScore: 0.9\n</思考>\nScore: -0.5", -0.5),
    ("\u25c1think\u25b7\nScore: 0.9", T),
    ("[THINK]\nScore: 0.9", T),
    ("<seed:think>Score: 0.9", T),
    ("<|channel|>analysis<|message|>Score: 0.9", T),
    ("<reasoning>fine</reasoning>", E),
]


@pytest.mark.parametrize(("reply", "expected"), THOUGHTS)
def test_thoughts_in_other_marks(reply: str, expected: float | Failure) -> None:
    assert outcome(parse_layout(reply)) == expected
    assert outcome(parse_regions(reply, [1])[1]) == expected


@pytest.mark.parametrize(
    ("reply", "thinks", "expected"),
    [
        ("Okay, the rubric says\nScore: 0.9\nwould be good, but the circle is blue, so", False, T),
        ("Score: 0.9\nwould be good, but the circle is blue, so", True, T),
        ("<think>no</think>Score: 0.9\nReason: it is", True, 0.9),
        ("Score: 0.9\nReason: it is", False, 0.9),
        ("Region ID: 1\nScore: 0.9\nReason: it is", False, 0.9),
        ('```json\n{"score": 0.9, "reason": "it', False, 0.9),
        ("Score: 0.9", False, N),  # 0.9 or 0.95
        ("Score: 0.9\n", False, N),
        ("Score: 1", False, N),
    ],
)
def test_replies_that_the_limit_cut_off(reply: str, thinks: bool, expected: float | Failure) -> None:
    assert outcome(parse_layout(reply, ended=False, thinks=thinks)) == expected
    assert outcome(parse_regions(reply, [1], ended=False, thinks=thinks)[1]) == expected


# --- the released parser on the golden texts; {} stands for "no score"

# case number, region: what we read instead, and why
DIFFERENT_REGIONS: dict[tuple[int, int], float | Failure] = {
    (1, 2): 0.1,  # blocks separated by --- are blocks
    (1, 3): -0.8,
    (3, 1): 0.5,  # blank lines inside a block
    (4, 1): 0.5,  # plus sign
    (4, 2): 0.5,  # .5
    (4, 4): 0.7,  # bold key
    (4, 5): -0.4,  # typographic minus
    (5, 1): O,  # 95 is no score
    (5, 2): O,  # nor is -2
    (6, 1): T,  # numbers of an unfinished thought are none
}
DIFFERENT_LAYOUTS: dict[int, float | Failure] = {
    4: 0.9,  # bold key
    6: T,
    9: O,
    10: N,  # two scores in a line
}


def reference_score(output: dict, key: str) -> float | Failure:  # type: ignore[type-arg]
    return output.get(key, N)


@pytest.mark.parametrize("number", range(len(GOLDEN["regions"])))
def test_regions_like_the_released_parser_except_where_it_errs(number: int) -> None:
    case = GOLDEN["regions"][number]
    ids = sorted({int(key) for key in case["output"]} | {r for n, r in DIFFERENT_REGIONS if n == number} | {98, 99})
    readings = parse_regions(case["input"], ids)
    for index in ids:
        expected = DIFFERENT_REGIONS.get((number, index))
        if expected is None and str(index) in case["output"]:
            expected = reference_score(case["output"][str(index)], "score")
        if expected is None:
            assert readings[index].failure in (M, E, T)
        else:
            assert outcome(readings[index]) == expected


def test_labels_like_the_released_parser() -> None:
    for number in (0, 1, 2, 4):
        case = GOLDEN["regions"][number]
        readings = parse_regions(case["input"], [int(key) for key in case["output"]])
        for key, entry in case["output"].items():
            assert readings[int(key)].label == entry["identified_object"]
            assert "reason" not in entry or readings[int(key)].reason == entry["reason"]


@pytest.mark.parametrize("number", range(len(GOLDEN["global_layout"])))
def test_layouts_like_the_released_parser_except_where_it_errs(number: int) -> None:
    case = GOLDEN["global_layout"][number]
    reading = parse_layout(case["input"])
    assert outcome(reading) == DIFFERENT_LAYOUTS.get(number, reference_score(case["output"], "global_layout_score"))
    if number in (0, 1, 2, 3, 8):
        assert reading.reason == case["output"]["reason"]


# --- whatever the text

SCORES = st.sampled_from(["0", "1", "-1", "0.5", "-0.5", "1.0", ".5", "0,5", "\uff10\uff0e\uff15", "\u0661"])
MARKS = st.sampled_from(["", "**", "`", '"', ")", "]"])
# fmt: off
ANOTHER = st.sampled_from([
    "/10", "/ 5", "/100", "%", "percent", "per cent", "Prozent", "pour cent", "por ciento", "por cento",
    "per cento", "процентов", "パーセント", "퍼센트", "بالمئة", "प्रतिशत", "out of 10", "out of ten",
    "out of five", "of 10", "von 10", "von zehn", "sur 10", "sur dix", "sobre 10", "sobre diez", "de dez",
    "em 10", "su dieci", "из 10", "из десяти", "من 10", "من عشرة", "में से 10", "(10点満点)", "(满分10分)",
    "(十分制)", "10점 만점", "stars", "points", "★", "on a scale of 1 to 10", "(scale: 0-10)", "／１０", "％",
])
JOINS = st.sampled_from([
    " to ", " or ", " and ", "-", " - ", "~", "..", "–", "—", "〜", "～", "…", " → ", ", ", "; ", " / ", " ",
    " bis ", " à ", " a ", " до ", " 到 ", " から ", " ~ ", " إلى ", " से ", " (", " [", " vs. ", ", maybe ",
    ". Or ",
])
# fmt: on
SECOND = st.decimals(0, 2, places=2).filter(lambda value: value != 1)


@settings(max_examples=500, deadline=None)
@given(SCORES, MARKS, ANOTHER, st.sampled_from(["", " ", "  "]), st.sampled_from(["", "\nReason: fine", ". Good."]))
def test_no_reply_with_another_scale_gives_a_score(number: str, mark: str, scale: str, space: str, tail: str) -> None:
    space = space or " " * scale[:1].isalpha()
    reply = f"Score: {number}{mark}{space}{scale}{tail}"
    assert parse_layout(reply).score is None, reply
    assert parse_regions(f"Region ID: 1\n{reply}", [1])[1].score is None, reply


@settings(max_examples=500, deadline=None)
@given(
    SCORES,
    MARKS,
    JOINS,
    SECOND,
    st.sampled_from(["", "\nReason: fine", " Good."]),
)
def test_no_line_with_two_numbers_gives_a_score(number: str, mark: str, join: str, other: object, tail: str) -> None:
    reply = f"Score: {number}{mark}{join}{other}{tail}"
    assert parse_layout(reply).score is None, reply
    assert parse_regions(f"Region ID: 1\n{reply}", [1])[1].score is None, reply


PIECES = st.sampled_from(
    [
        "Region ID:",
        "1",
        "2",
        "\n",
        " ",
        "Score:",
        "0.9",
        "-",
        ".",
        "1.5",
        "Reason:",
        "<think>",
        "</think>",
        "---",
        "**",
        "/",
        "e9",
    ]
)
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join))


def check(readings: list[Reading], reply: str) -> None:
    for reading in readings:
        assert (reading.score is None) == (reading.failure is not None)
        assert (reading.score is None) == (reading.score_start is None)
        if reading.score is not None and reading.score_start is not None:
            assert -1 <= reading.score <= 1
            assert reply[reading.score_start] not in " \n"


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_no_text_raises_or_gives_a_score_out_of_range(reply: str) -> None:
    check([*parse_regions(reply, [1, 2]).values(), *parse_regions(reply, [1]).values(), parse_layout(reply)], reply)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 300), st.integers(0, 20), st.one_of(PIECES, st.text(max_size=5)))
def test_no_mutation_of_a_good_reply_does_either(place: int, removed: int, inserted: str) -> None:
    good = WELL_FORMED + "\n\n" + WELL_FORMED.replace("1", "2").replace("0.9", "-0.6")
    reply = good[:place] + inserted + good[place + removed :]
    check([*parse_regions(reply, [1, 2]).values(), parse_layout(reply)], reply)


@pytest.mark.slow
def test_a_hundred_thousand_mutated_replies() -> None:
    """Well-formed replies and those of the tables with pieces dropped, doubled, swapped and put in."""
    rng = random.Random(0)
    replies = [WELL_FORMED + "\n\n" + WELL_FORMED.replace("1", "2").replace("0.9", "-0.6"), layout_reply(0.4, "fine")]
    replies += [reply[:400] for reply, *_ in (*NUMBERS, *SEVERAL)]
    pieces = ["Region ID:", "Score:", "-", "\n", "0.9", "<think>", "</think>", "**", "\u0665", "1e", "/10", "\x00", "{"]
    for _ in range(100_000):
        reply = rng.choice(replies)
        for _ in range(rng.randint(1, 6)):
            start, end = sorted(rng.randint(0, len(reply)) for _ in range(2))
            middle = rng.choice(["", reply[start:end] * 2, rng.choice(pieces), chr(rng.randrange(0xD800))])
            reply = reply[:start] + middle + reply[min(end, start + 20) :]
        check([*parse_regions(reply, [1, 2]).values(), *parse_regions(reply, [1]).values(), parse_layout(reply)], reply)


@pytest.mark.parametrize("filler", ["\n", " ", "*", "score", "region id", "score:", "Score: 0", "1", "- "])
def test_long_degenerate_replies_take_no_time(filler: str) -> None:
    parse_regions(filler * (20_000 // len(filler)), [1, 2])
