"""The native grounder: the format that the model is trained on, and what replies are read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grounding.native import QUESTION, Frame, NativeGrounder, format_boxes, parse_boxes
from srum.models.base import Decoding, Question
from srum.records import Box

WELL_FORMED = '[{"label": "small red circle", "bbox_2d": [4, 8, 14, 18]}, {"label": "cat", "bbox_2d": [0, 0, 9, 9]}]'
BOTH: list[tuple[str | None, Box]] = [("small red circle", (4, 8, 14, 18)), ("cat", (0, 0, 9, 9))]


class Fake:
    """Replies with the given text to everything."""

    def __init__(self, *replies: str) -> None:
        self.replies = replies

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[Sequence[Question]], decoding: Decoding
    ) -> list[list[str]]:
        assert [[question.text for question in own] for own in questions] == [[QUESTION]] * len(images)
        return [[reply] for reply in self.replies]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (WELL_FORMED, BOTH),
        (f"```json\n{WELL_FORMED}\n```", BOTH),
        (f"Here they are: {WELL_FORMED} I hope that helps [1].", BOTH),
        (f'{{"objects": {WELL_FORMED}}}', BOTH),
        (WELL_FORMED.replace("bbox_2d", "bbox"), BOTH),
        (WELL_FORMED.replace("bbox_2d", "box"), BOTH),
        (WELL_FORMED.replace("}, {", "}\n{"), BOTH),
        (WELL_FORMED[:-12], BOTH[:1]),  # cut off
        ('[{"bbox_2d": [1.5, 2, 3, 4.25]}]', [(None, (1.5, 2, 3, 4.25))]),
        ('[{"label": 7, "bbox_2d": [1, 2, 3, 4]}]', [(None, (1, 2, 3, 4))]),
        ('[{"label": "inverted", "bbox_2d": [5, 2, 3, 4]}]', []),
        ('[{"label": "three", "bbox_2d": [5, 2, 3]}]', []),
        ('[{"label": "words", "bbox_2d": ["a", 2, 3, 4]}, {"label": "null", "bbox_2d": null}]', []),
        ('[{"label": "endless", "bbox_2d": [0, 0, Infinity, NaN]}]', []),
        ("[]", []),
        ("```json\n[]\n```", []),
    ],
)
def test_replies(reply: str, expected: list[tuple[str | None, Box]]) -> None:
    assert parse_boxes(reply) == expected


@pytest.mark.parametrize("reply", ["", "There is nothing.", '[{"label": "cut o', "{}", '{"label": "no box"}'])
def test_replies_without_objects(reply: str) -> None:
    with pytest.raises(ValueError, match="no objects"):
        parse_boxes(reply)


@settings(max_examples=60, deadline=None)
@given(st.text(), st.integers(0, len(WELL_FORMED)), st.integers(0, len(WELL_FORMED)))
def test_no_mutation_gives_anything_but_ordered_boxes(noise: str, start: int, end: int) -> None:
    try:
        found = parse_boxes(WELL_FORMED[:start] + noise + WELL_FORMED[end:])
    except ValueError:
        return
    assert all(x0 < x1 and y0 < y1 for _, (x0, y0, x1, y1) in found)


def test_deep_nesting_is_no_crash() -> None:
    assert parse_boxes('{"a":' * 3000 + WELL_FORMED) == BOTH


def test_format_is_what_is_parsed() -> None:
    assert format_boxes([]) == "[]"
    assert format_boxes([("small red circle", (4, 8, 14, 18)), ("cat", (0.2, 0, 9.4, 9))]) == WELL_FORMED
    assert parse_boxes(WELL_FORMED) == BOTH


def test_regions_are_in_pixels_of_each_image_and_cut_to_it() -> None:
    reply = '[{"label": "cat", "bbox_2d": [100, 200, 1500, 600]}, {"label": "gone", "bbox_2d": [1200, 0, 1300, 9]}]'
    model = Fake(reply, "[]")
    images = [Image.new("RGB", (64, 32)), Image.new("RGB", (8, 8))]

    def propose(frame: Frame) -> list[list[tuple[int, str | None, Box, float]]]:
        regions = NativeGrounder(model, frame).propose(images, ["", ""])  # type: ignore[arg-type]
        return [[(r.id, r.label, r.box, r.area) for r in own] for own in regions]

    (inside,), none = propose("thousand")
    assert inside[:2] == (1, "cat") and none == []
    assert inside[2] == pytest.approx((6.4, 6.4, 64, 19.2))
    assert inside[3] == pytest.approx(57.6 * 12.8)
    assert propose("pixels") == [[], []]


def test_an_object_named_twice_counts_once() -> None:
    regions = NativeGrounder(Fake(WELL_FORMED * 3)).propose([Image.new("RGB", (64, 64))], [""])  # type: ignore[arg-type]
    assert [region.label for region in regions[0]] == ["small red circle", "cat"]
