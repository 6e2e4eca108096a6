"""The native grounder: the format that the model is trained on, and what replies are read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srum.grounding.base import ProposalError, ground
from srum.grounding.native import QUESTION, Frame, NativeGrounder, format_boxes, parse_boxes
from srum.models.base import Decoding, Segment, Written
from srum.records import Box, Region

WELL_FORMED = '[{"label": "small red circle", "bbox_2d": [4, 8, 14, 18]}, {"label": "cat", "bbox_2d": [0, 0, 9, 9]}]'
BOTH: list[tuple[str | None, Box]] = [("small red circle", (4, 8, 14, 18)), ("cat", (0, 0, 9, 9))]


class Fake:
    """Replies with the given texts, image by image, and keeps what it was asked."""

    def __init__(self, *replies: str) -> None:
        self.replies = replies
        self.asked: list[str] = []

    def write(self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]) -> list[Written]:
        self.asked += [context[-1].text or "" for context in contexts]
        return [Written(reply, (), torch.zeros(0), ended=True) for reply in self.replies]


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
        ('[{"bounding_box": [1, 2, 3, 4], "object": "cat"}]', [("cat", (1, 2, 3, 4))]),
        ('{"name": "cat", "bbox_2d": [1, 2, 3, 4], "score": 0.9}', [("cat", (1, 2, 3, 4))]),
        (
            '[{"label": "cats", "bbox_2d": [[1, 2, 3, 4], [5, 5, 1, 1], [5, 6, 7, 8]]}]',
            [("cats", (1, 2, 3, 4)), ("cats", (5, 6, 7, 8))],
        ),
        ('[{"label": "none", "bbox_2d": []}]', []),
        (
            "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|><|im_end|>",
            [("the cat", (1, 2, 3, 4))],
        ),
        (
            "<|box_start|>(1,2),(3,4)<|box_end|><|box_start|>( 5, 6), (7.5, 8)<|box_end|>",
            [(None, (1, 2, 3, 4)), (None, (5, 6, 7.5, 8))],
        ),
        ("I see <ref>a cat</ref><box>(1,2),(3,4)</box> and <ref>a dog</ref>.", [("a cat", (1, 2, 3, 4))]),
        ("<box>(9,9),(3,4)</box>", []),
    ],
)
def test_replies(reply: str, expected: list[tuple[str | None, Box]]) -> None:
    assert parse_boxes(reply) == expected


@pytest.mark.parametrize("reply", ["", "There is nothing.", '[{"label": "cut o', "{}", '{"label": "no box"}'])
def test_replies_without_objects(reply: str) -> None:
    with pytest.raises(ProposalError, match="no objects"):
        parse_boxes(reply)


@settings(max_examples=60, deadline=None)
@given(st.text(), st.integers(0, len(WELL_FORMED)), st.integers(0, len(WELL_FORMED)))
def test_no_mutation_gives_anything_but_ordered_boxes(noise: str, start: int, end: int) -> None:
    try:
        found = parse_boxes(WELL_FORMED[:start] + noise + WELL_FORMED[end:])
    except ProposalError:
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
    images = [Image.new("RGB", (64, 32)), Image.new("RGB", (8, 8))]

    def found(frame: Frame) -> list[tuple[list[Region], str | None]]:
        return ground(NativeGrounder(Fake(reply, "[]"), frame), images, ["", ""], 8)  # type: ignore[arg-type]

    ((cat, _), error), (none, no_error) = found("thousand")
    assert cat.label == "cat" and [region.id for region in none] == [0] and error is no_error is None
    assert cat.box == pytest.approx((6.4, 6.4, 64, 19.2))
    assert cat.area == pytest.approx(57.6 * 12.8)
    (wrong, error), _ = found("pixels")
    assert wrong == [] and error is not None and error.startswith("ProposalError: none of 2 regions covers a pixel")


def test_an_object_named_twice_counts_once() -> None:
    ((first, second),) = regions_of(NativeGrounder(Fake(WELL_FORMED * 3)))  # type: ignore[arg-type]
    assert (first.label, second.label) == ("small red circle", "cat")


def test_a_reply_without_objects_fails_its_image_and_no_image_is_asked_twice() -> None:
    model = Fake(WELL_FORMED, "I see nothing.", WELL_FORMED)
    images = [Image.new("RGB", (20, 20))] * 3
    outcomes = ground(NativeGrounder(model), images, [""] * 3, max_regions=8)  # type: ignore[arg-type]
    assert [len(regions) for regions, _ in outcomes] == [3, 0, 3]
    assert outcomes[1][1] == "ProposalError: no objects in the reply 'I see nothing.'"
    assert model.asked == [QUESTION] * 3


def test_the_question_may_name_the_prompt() -> None:
    model = Fake("[]")
    NativeGrounder(model, question='{"what"} of {prompt}?').propose([Image.new("RGB", (9, 9))], ["a {cat}"])  # type: ignore[arg-type]
    assert model.asked == ['{"what"} of a {cat}?']


def regions_of(grounder: NativeGrounder) -> list[list[Region]]:
    proposals = grounder.propose([Image.new("RGB", (64, 64))], [""])
    return [proposal for proposal in proposals if not isinstance(proposal, ProposalError)]


def test_a_box_with_endless_digits_is_passed_over_alone() -> None:
    for number in ("9" * 400, "1e400", "-1e400", "NaN", "Infinity", "9" * 5000):
        reply = f'[{{"label":"a","bbox_2d":[10,10,30,30]}},{{"label":"b","bbox_2d":[0,5,17,{number}]}}]'
        assert parse_boxes(reply) == [("a", (10, 10, 30, 30))]
