"""The self-judge with a model of a few lines."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from judging.instructions import layout_reply, region_reply
from judging.self_judge import SelfJudge
from judging.soft_score import LEVELS, expected_score, question_up_to
from srum.models.base import Decoding, Question
from srum.records import Failure, LayoutJudgement, Region, RegionJudgement

Reply = Callable[[Image.Image, str, Decoding], str]


class Fake:
    """Replies by a function of the image, the question and the decoding; its certainty is a hash of the prefix."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.answered: list[tuple[Decoding, list[list[str]]]] = []
        self.prefixes: list[str] = []
        self.continuations: list[Sequence[str]] = []

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[Sequence[Question]], decoding: Decoding
    ) -> list[list[str]]:
        self.answered.append((decoding, [[question.text for question in own] for own in questions]))
        return [
            [self.reply(image, question.text, decoding) for question in own]
            for image, own in zip(images, questions, strict=True)
        ]

    def continuation_logprobs(
        self, images: Sequence[Image.Image], questions: Sequence[Sequence[Question]], continuations: Sequence[str]
    ) -> list[Tensor]:
        self.continuations.append(continuations)
        self.prefixes += [question.reply_prefix for own in questions for question in own]
        return [
            torch.stack([self._logprobs(image, question, len(continuations)) for question in own])
            for image, own in zip(images, questions, strict=True)
        ]

    def _logprobs(self, image: Image.Image, question: Question, count: int) -> Tensor:
        rng = random.Random(repr((image.tobytes(), question)))
        return torch.tensor([rng.gauss(-5, 2) for _ in range(count)])


def region(index: int) -> Region:
    return Region(id=index, box=(index, 0, index + 1, 1), area=1, source="test")


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, shade, shade))


def asked_ids(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"Region ID: (\d+)\nBounding Box", text)]


def well_formed(image: Image.Image, text: str, decoding: Decoding) -> str:
    """The score of region n is n / 10, minus the shade of the image in hundreds."""
    shade = image.getpixel((0, 0))[0]  # type: ignore[index]
    parts = [region_reply(index, f"thing {index}", index / 10 - shade / 100, "so") for index in asked_ids(text)]
    return "\n\n".join(parts) or layout_reply(0.4, "as asked")


def hesitant(image: Image.Image, text: str, decoding: Decoding) -> str:
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
    options = {"soft": soft, "retries": 2, "decoding": Decoding(seed=7, temperature=temperature)}
    together = judge(hesitant, **options)
    judge_one = SelfJudge(Fake(hesitant), **options)  # type: ignore[arg-type]
    single = [judge_one.judge([i], [p], [r])[0] for i, p, r in zip(IMAGES, PROMPTS, REGIONS, strict=True)]
    backwards = judge_one.judge(IMAGES[::-1], PROMPTS[::-1], REGIONS[::-1])[::-1]
    assert together == single == backwards
    assert any(r.attempts > 1 for regions, _ in together for r in regions)


def test_the_seed_changes_the_retries() -> None:
    seeds = [judge(hesitant, soft=False, decoding=Decoding(seed=seed)) for seed in range(3)]
    assert seeds[0] != seeds[1] or seeds[1] != seeds[2]


def test_only_failed_questions_are_asked_again_and_what_was_read_stays() -> None:
    def reply(image: Image.Image, text: str, decoding: Decoding) -> str:
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
    assert [asked_ids(text) for text in questions[0]] == [[1, 2]]


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
