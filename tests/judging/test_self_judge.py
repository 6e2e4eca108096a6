"""The self-judge with a model of a few lines."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

from srum.judging.base import NoReply, Question
from srum.judging.instructions import layout_reply, region_reply
from srum.judging.self_judge import SelfJudge
from srum.judging.soft_score import (
    LEVELS,
    confidence,
    expected_score,
    forced_question,
    likeliest_score,
    question_up_to,
)
from srum.models.base import Decoding, Segment, Written
from srum.records import Failure, LayoutJudgement, Region, RegionJudgement


class Draw(NamedTuple):
    """How a reply is sampled."""

    temperature: float
    seed: int


Reply = Callable[[Image.Image, str, Draw], str | NoReply]


def image_of(segment: Segment) -> Image.Image:
    assert segment.kind == "seen" and isinstance(segment.image, Image.Image)
    return segment.image


class Fake:
    """Replies by a function of the image, the question and the draw; its certainty is a hash of the context.

    Of every call it keeps the decoding, the images in order and the questions about each.
    """

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.answered: list[tuple[Decoding, list[list[str]]]] = []
        self.shown: list[list[Image.Image]] = []
        self.prefixes: list[str] = []
        self.continuations: list[Sequence[str]] = []

    def write(
        self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]
    ) -> list[Written | NoReply]:
        by_image = [list(own) for _, own in groupby(contexts, key=lambda context: id(context[0]))]
        self.shown.append([image_of(own[0][0]) for own in by_image])
        self.answered.append((decoding, [[question.text or "" for _, question in own] for own in by_image]))
        replies = []
        for (seen, question), seed in zip(contexts, seeds, strict=True):
            reply = self.reply(image_of(seen), question.text or "", Draw(decoding.temperature, seed))
            if isinstance(reply, str):
                said, until, _ = reply.partition(decoding.until) if decoding.until else (reply, "", "")
                reply = Written(said + until, (), torch.zeros(0), ended=not until)
            replies.append(reply)
        return replies

    def score(self, contexts: Sequence[Sequence[Segment]], continuations: Sequence[str]) -> list[Tensor]:
        self.continuations.append(continuations)
        self.prefixes += [context[-1].text or "" for context in contexts if context[-1].open]
        return [self._logprobs(context, len(continuations)) for context in contexts]

    def _logprobs(self, context: Sequence[Segment], count: int) -> Tensor:
        rng = random.Random(repr((image_of(context[0]).tobytes(), [segment.text for segment in context])))
        return torch.tensor([rng.gauss(-5, 2) for _ in range(count)])


def region(index: int) -> Region:
    return Region(id=index, box=(index, 0, index + 1, 1), area=1, source="test")


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, shade, shade))


def asked_ids(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"Region ID: (\d+)\nBounding Box", text)]


def well_formed(image: Image.Image, text: str, decoding: Draw) -> str:
    """The score of region n is n / 10, minus the shade of the image in hundreds."""
    shade = image.getpixel((0, 0))[0]  # type: ignore[index]
    parts = [region_reply(index, f"thing {index}", index / 10 - shade / 100, "so") for index in asked_ids(text)]
    return "\n\n".join(parts) or layout_reply(0.4, "as asked")


def hesitant(image: Image.Image, text: str, decoding: Draw) -> str:
    """Says nothing useful at first, or (by a draw from the seed) later."""
    rng = random.Random(f"{decoding.seed}{text}")
    if decoding.temperature == 0 and "Region ID: 2" in text:
        return "Region ID: 2\nScore: very good"
    return well_formed(image, text, decoding) if rng.random() < 0.6 else "Hm."


IMAGES = [picture(shade) for shade in (0, 20, 40, 60, 80)]
PROMPTS = [f"prompt {number}" for number in range(5)]
REGIONS = [[region(index) for index in (*range(1, count + 1), 0)] for count in (2, 0, 3, 1, 4)]

Judged = list[tuple[list[RegionJudgement], LayoutJudgement]]


def judge(reply: Reply, **options: object) -> Judged:
    return SelfJudge(Fake(reply), **options).judge(IMAGES, PROMPTS, REGIONS)  # type: ignore[arg-type]


@pytest.mark.parametrize("instructions", ["compact", "paper"])
def test_scores_labels_and_order(instructions: str) -> None:
    judged = judge(well_formed, instructions=instructions, soft=False)
    for (regions, layout), proposed, shade in zip(judged, REGIONS, (0, 0.2, 0.4, 0.6, 0.8), strict=True):
        assert [r.region_id for r in regions] == [r.id for r in proposed]
        assert [r.score for r in regions] == pytest.approx([r.id / 10 - shade for r in proposed])
        assert all(r.attempts == 1 and r.reason == "so" and r.raw for r in regions)
        assert (layout.score, layout.reason, layout.attempts) == (0.4, "as asked", 1)


def test_questions_of_an_image_go_in_one_call_grouped_by_the_template() -> None:
    model = Fake(well_formed)
    SelfJudge(model, soft=False).judge(IMAGES, PROMPTS, REGIONS)  # type: ignore[arg-type]
    ((_, questions),) = model.answered
    assert [len(own) for own in questions] == [4, 2, 5, 3, 6]
    assert questions[1] == [
        "Prompt: prompt 1\nRegion ID: 0\nBounding Box: the background\nScore the region.",
        "Prompt: prompt 1\nScore the layout.",
    ]
    model = Fake(well_formed)
    nine = [[region(index) for index in (*range(1, 9), 0)]]
    SelfJudge(model, instructions="paper", soft=False).judge(IMAGES[:1], PROMPTS[:1], nine)  # type: ignore[arg-type]
    ((_, questions),) = model.answered
    assert [asked_ids(text) for text in questions[0]] == [[*range(1, 9)], [0], []]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("soft", [False, True])
def test_no_result_depends_on_the_batch_or_its_order(soft: bool, temperature: float) -> None:
    options = {"soft": soft, "retries": 2, "seed": 7, "decoding": Decoding(temperature=temperature)}
    together = judge(hesitant, **options)
    judge_one = SelfJudge(Fake(hesitant), **options)  # type: ignore[arg-type]
    single = [judge_one.judge([i], [p], [r])[0] for i, p, r in zip(IMAGES, PROMPTS, REGIONS, strict=True)]
    backwards = judge_one.judge(IMAGES[::-1], PROMPTS[::-1], REGIONS[::-1])[::-1]
    assert together == single == backwards
    assert any(r.attempts > 1 for regions, _ in together for r in regions)


def test_every_sampled_reply_has_a_seed_of_its_own() -> None:
    """Of the image, the question and the attempt alone: in company or not, first or last."""
    seeds: dict[tuple[bytes, str], set[int]] = {}

    def reply(image: Image.Image, text: str, draw: Draw) -> str:
        seeds.setdefault((image.tobytes(), text), set()).add(draw.seed)
        return well_formed(image, text, draw)

    for first in (0, 2):
        SelfJudge(Fake(reply), soft=False).judge(IMAGES[first:], PROMPTS[first:], REGIONS[first:])  # type: ignore[arg-type]
    assert all(len(of_question) == 1 for of_question in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds) == 20


def test_the_seed_changes_the_retries() -> None:
    seeds = [judge(hesitant, soft=False, seed=seed) for seed in range(3)]
    assert seeds[0] != seeds[1] or seeds[1] != seeds[2]


def test_only_failed_questions_are_asked_again_and_what_was_read_stays() -> None:
    def reply(image: Image.Image, text: str, decoding: Draw) -> str:
        ids = asked_ids(text)
        if not ids:
            return layout_reply(0.4, "as asked")
        if decoding.temperature == 0:
            return region_reply(ids[0], "cat", 0.5, "first") + "\n\nRegion ID: 2\nScore: 7"
        return region_reply(ids[0], "dog", -0.5, "second") + "\n\n" + region_reply(2, "cow", -0.5, "second")

    model = Fake(reply)
    ((regions, layout),) = SelfJudge(model, "paper", soft=False).judge(  # type: ignore[arg-type]
        IMAGES[:1], PROMPTS[:1], [[region(1), region(2)]]
    )
    assert [(r.score, r.label, r.attempts) for r in regions] == [(0.5, "cat", 1), (-0.5, "cow", 2)]
    assert layout.attempts == 1
    (first, _), (second, questions) = model.answered
    assert (first.temperature, second.temperature) == (0.0, 0.7)
    (again,) = questions[0]
    assert asked_ids(again) == [2]
    assert again.startswith("The image was generated for the prompt: prompt 0")


def test_a_question_that_is_never_answered_is_a_failure_with_its_reply() -> None:
    ((regions, layout),) = SelfJudge(Fake(lambda *_: "Hm."), retries=2).judge(  # type: ignore[arg-type]
        IMAGES[:1], PROMPTS[:1], [[region(1)]]
    )
    assert regions == [RegionJudgement(region_id=1, score=None, failure=Failure.NO_SCORE, raw="Hm.", attempts=3)]
    assert layout == LayoutJudgement(score=None, failure=Failure.NO_SCORE, raw="Hm.", attempts=3)


def test_soft_scores_continue_the_reply_up_to_each_score() -> None:
    model = Fake(well_formed)
    SelfJudge(model, "paper").judge(IMAGES[:1], PROMPTS[:1], [[region(1), region(2)]])  # type: ignore[arg-type]
    whole = region_reply(1, "thing 1", 0.1, "so") + "\n\n" + region_reply(2, "thing 2", 0.2, "so")
    assert model.prefixes == [
        "Region ID: 1\nIdentified Object: thing 1\nScore:",
        whole[: whole.rindex(" 0.2")],
        "Score:",
    ]
    assert model.continuations == [[f" {level:.1f}" for level in LEVELS]]


def test_soft_scores_of_replies_with_and_without_a_space() -> None:
    model = Fake(lambda image, text, decoding: "Score:0.5" if asked_ids(text) else "Score: 0.5")
    ((regions, layout),) = SelfJudge(model).judge(IMAGES[:1], PROMPTS[:1], [[region(1)]])  # type: ignore[arg-type]
    assert sorted(own[0] for own in model.continuations) == [" -1.0", "-1.0"]
    assert regions[0].score != 0.5 != layout.score


def test_levels_and_expectations() -> None:
    """All mass on a level gives it; an even spread, whatever its total, gives 0; 3:1 on 1.0 and -1.0 gives 0.5."""
    assert [f"{level:.1f}" for level in LEVELS][::5] == ["-1.0", "-0.5", "0.0", "0.5", "1.0"]
    sure = torch.full((21,), float("-inf"))
    sure[3] = -40.0
    assert expected_score(sure).item() == pytest.approx(-0.7)
    assert expected_score(torch.full((2, 21), -9.0)).tolist() == pytest.approx([0.0, 0.0])
    torn = torch.full((21,), float("-inf"))
    torn[0], torn[20] = 0.0, torch.log(torch.tensor(3.0))
    assert expected_score(torn).item() == pytest.approx(0.5)


def test_the_space_goes_with_the_number() -> None:
    question, space = question_up_to("ask", "**Score:**  -0.5", 12)
    assert (question, space) == (Question("ask", "**Score:**"), "  ")


# --- judges that misbehave

BAD: list[tuple[str, str | NoReply, Failure | None]] = [
    ("another language", "Regi\N{LATIN SMALL LETTER O WITH ACUTE}n 1: un gato rojo.\nNota: 0,9", Failure.NO_SCORE),
    ("another script", "\u533a\u57df 1: \u7ea2\u732b\n\u8bc4\u5206: 0.9", Failure.NO_SCORE),
    ("repeats itself before the score", "Region ID: 1\nIdentified Object: a cat\n" * 200, Failure.NO_SCORE),
    ("repeats itself with the score", "Region ID: 1\nScore: 0.5\n" * 200, None),
    ("never stops", "and then " * 5000, Failure.NO_SCORE),
    ("never stops behind the score", "Score: 0.5\nReason: " + "very " * 5000, None),
    ("never stops thinking", "<think>" + "hmm " * 5000, Failure.TRUNCATED_THOUGHT),
    ("says nothing", "", Failure.EMPTY),
    ("scores on another scale", "Region ID: 1\nScore: 8/10", Failure.OUT_OF_RANGE),
    ("speaks of another region", "Region ID: 7\nScore: 0.5", Failure.MISSING_REGION),
    ("is not there", NoReply("HTTP 500"), Failure.NO_REPLY),
]


@pytest.mark.parametrize(("name", "reply", "failure"), BAD, ids=[name for name, *_ in BAD])
def test_what_becomes_of_bad_judges(name: str, reply: str | NoReply, failure: Failure | None) -> None:
    """A counted failure with the reply, after the retries; the others of the batch are judged as ever."""

    def mixed(image: Image.Image, text: str, decoding: Draw) -> str | NoReply:
        return reply if "prompt 0" in text and asked_ids(text) else well_formed(image, text, decoding)

    judged = judge(mixed, soft=False, retries=2)
    (said, _), _ = judged[0], judged[1]
    raw = reply.why if isinstance(reply, NoReply) else reply
    assert (said[0].failure, said[0].score) == (failure, None if failure else 0.5)
    assert said[0].raw == raw and said[0].attempts == (3 if failure else 1)
    assert judged[1:] == judge(well_formed, soft=False)[1:]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("name", "reply", "failure"), BAD[:-1], ids=[name for name, *_ in BAD[:-1]])
def test_a_constrained_reply_always_has_a_score(name: str, reply: str, failure: Failure | None, soft: bool) -> None:
    model = Fake(lambda *_: reply)
    judge = SelfJudge(model, soft=soft, reply="constrained", retries=0)  # type: ignore[arg-type]
    ((regions, layout),) = judge.judge(IMAGES[:1], PROMPTS[:1], [[region(1), region(0)]])
    for said in (*regions, layout):
        assert said.failure is None and said.score is not None and -1 <= said.score <= 1
        assert (said.confidence is None) == (said.attempts == 1 and not soft)
        if said.attempts == 2:
            assert said.raw.startswith(reply.lstrip()) and LEVELS.index(float(said.raw.rpartition("Score: ")[2])) >= 0
    assert regions[0].attempts == (1 if failure is None else 2)


def test_a_short_reply_has_the_score_of_a_long_one_and_no_reason() -> None:
    """Soft scores are the same to the last bit, since what is asked for them is; what never comes to its score is
    asked again, and then forced."""
    free = judge(well_formed)
    short = SelfJudge(Fake(well_formed), reply="short").judge(IMAGES, PROMPTS, REGIONS)  # type: ignore[arg-type]
    for (whole, of_layout), (cut, of_cut_layout) in zip(free, short, strict=True):
        for long, brief in zip([*whole, of_layout], [*cut, of_cut_layout], strict=True):
            assert (brief.score, brief.confidence, brief.attempts) == (long.score, long.confidence, 1)
            assert brief.reason is None and long.raw.startswith(brief.raw.rpartition(" ")[0] + " ")
        assert [one.label for one in cut] == [one.label for one in whole]
    (((stubborn,), _),) = SelfJudge(Fake(lambda *_: "Hm."), reply="short").judge(  # type: ignore[arg-type]
        IMAGES[:1], PROMPTS[:1], [[region(1)]]
    )
    assert stubborn.attempts == 3 and stubborn.raw.startswith("Hm.\n\nRegion ID: 1\nScore: ")
    with pytest.raises(ValueError, match="paper-2 asks about several regions at once"):
        SelfJudge(Fake(well_formed), "paper", reply="short")  # type: ignore[arg-type]


def test_a_forced_line_closes_the_thought_and_names_the_region() -> None:
    assert forced_question("ask", "", 3) == (Question("ask", "Region ID: 3\nScore:"), " ")
    assert forced_question("ask", "", None) == (Question("ask", "Score:"), " ")
    assert forced_question("ask", "<think>hm", 0)[0].reply_prefix == "<think>hm</think>\n\nRegion ID: 0\nScore:"
    assert forced_question("ask", "<think>a</think>b", None)[0].reply_prefix == "<think>a</think>b\n\nScore:"


@pytest.mark.parametrize("soft", [False, True])
def test_without_a_reply_the_score_line_is_all(soft: bool) -> None:
    model = Fake(well_formed)
    judge = SelfJudge(model, "paper", soft=soft, reply="none")  # type: ignore[arg-type]
    ((regions, layout),) = judge.judge(IMAGES[:1], PROMPTS[:1], [[region(1), region(2)]])
    assert model.answered == [] and len(model.continuations) == 1
    assert model.prefixes == ["Region ID: 1\nScore:", "Region ID: 2\nScore:", "Score:"]
    for said, prefix in zip((*regions, layout), model.prefixes, strict=True):
        assert said.raw.startswith(f"{prefix} ") and said.attempts == 1 and said.reason is None
        assert (said.score in LEVELS) == (not soft)


# --- what is shown and asked


def test_marks_are_shown_with_the_regions_and_not_with_the_layout() -> None:
    model = Fake(well_formed)
    judge = SelfJudge(model, "paper", soft=False, view="marks")  # type: ignore[arg-type]
    image, thing = Image.new("RGB", (64, 64)), Region(id=1, box=(32, 32, 60, 60), area=784, source="test")
    ((regions, layout),) = judge.judge([image], ["a cat"], [[thing, region(0)]])
    assert [r.score for r in regions] == [0.1, 0.0] and layout.score == 0.4
    ((marked, plain),) = model.shown
    assert plain.tobytes() == image.tobytes() != marked.tobytes()
    ((_, ((about_regions,), (about_layout,))),) = model.answered
    assert "outlined in the image" in about_regions and "outlined" not in about_layout


def test_crops_are_shown_one_by_one_with_the_box_in_their_own_pixels() -> None:
    model = Fake(well_formed)
    thing = Region(id=4, box=(3, 2, 5, 4), area=4, source="test")
    judge = SelfJudge(model, soft=False, view="crops")  # type: ignore[arg-type]
    ((regions, layout),) = judge.judge([picture(0)], ["a cat"], [[thing, region(0)]])
    assert [(r.region_id, r.score) for r in regions] == [(4, 0.4), (0, 0.0)] and layout.score == 0.4
    ((cut_out, whole),) = model.shown
    assert (cut_out.size, whole.size) == ((4, 4), (8, 8))
    ((_, ((about_region,), others)),) = model.answered
    assert "Region ID: 4\nBounding Box: [1, 1, 3, 3]" in about_region
    assert [asked_ids(text) for text in others] == [[0], []]


def test_one_score_of_the_whole_image_is_that_of_every_region() -> None:
    def reply(image: Image.Image, text: str, decoding: Draw) -> str:
        return layout_reply(-0.6 if "as a\nwhole" in text else 0.4, "so")

    model = Fake(reply)
    judge = SelfJudge(model, "paper", soft=False, view="whole")  # type: ignore[arg-type]
    (regions, layout), (none, _) = judge.judge(IMAGES[:2], PROMPTS[:2], [[region(1), region(0)], []])
    assert [(r.region_id, r.score, r.reason) for r in regions] == [(1, -0.6, "so"), (0, -0.6, "so")]
    assert layout.score == 0.4 and none == []
    assert [len(own) for own in model.answered[0][1]] == [2, 1]


def test_thinking_is_asked_for_once() -> None:
    model = Fake(lambda *_: "<think>hm")
    SelfJudge(model, "paper", soft=False, think=True).judge(IMAGES[:1], PROMPTS[:1], [[]])  # type: ignore[arg-type]
    ((first,),), ((second,),) = (questions for _, questions in model.answered)
    assert first.startswith("You should first think") and "think" not in second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view": "whole"}, "compact-1 have no text 'whole'"),
        ({"think": True}, "compact-1 have no text 'think'"),
        ({"model": object()}, "log-probabilities"),
        ({"model": object(), "soft": False, "reply": "constrained"}, "log-probabilities"),
    ],
)
def test_what_cannot_work_is_refused_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfJudge(**{"model": Fake(well_formed), **options})  # type: ignore[arg-type]


def test_confidence_and_the_likeliest_level() -> None:
    """Sure of a level: 1. Torn between -1 and 1: 0. Between 0.0 and 0.2: a standard deviation of 0.1."""
    logprobs = torch.full((3, 21), float("-inf"))
    logprobs[0, 7] = logprobs[1, 0] = logprobs[1, 20] = logprobs[2, 10] = logprobs[2, 12] = -3.0
    assert confidence(logprobs).tolist() == pytest.approx([1.0, 0.0, 0.9])
    assert likeliest_score(logprobs).tolist() == [-0.3, -1.0, 0.0]
