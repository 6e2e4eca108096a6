"""The model as the judge of its own images (paper, Sec. 3.2): it is asked region by region, then for the layout."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from PIL.Image import Image

from judging.instructions import load_instructions
from judging.replies import Reading, parse_layout, parse_regions
from judging.soft_score import question_up_to, soft_scores
from srum.models.base import Decoding, Question, UnifiedModel
from srum.records import LayoutJudgement, Region, RegionJudgement

RETRY_TEMPERATURE = 0.7
LAYOUT = -1  # stands for the layout where regions have their ids


@dataclass(frozen=True)
class _Asked:
    """A question and what it is about: region ids, or LAYOUT alone."""

    text: str
    subjects: tuple[int, ...]

    def read(self, reply: str) -> dict[int, Reading]:
        return {LAYOUT: parse_layout(reply)} if self.subjects == (LAYOUT,) else parse_regions(reply, self.subjects)


@dataclass(frozen=True)
class _Answer:
    """What was last heard of one subject."""

    question: str
    raw: str
    reading: Reading
    attempts: int


@dataclass
class _Case:
    """One image with its questions, and the answers so far, by subject."""

    image: Image
    questions: list[_Asked]
    answers: dict[int, _Answer] = field(default_factory=dict)

    def open_questions(self) -> list[_Asked]:
        return [asked for asked in self.questions if not all(map(self.is_settled, asked.subjects))]

    def is_settled(self, subject: int) -> bool:
        return subject in self.answers and self.answers[subject].reading.failure is None

    def record(self, asked: _Asked, reply: str, attempt: int) -> None:
        for subject, reading in asked.read(reply).items():
            if not self.is_settled(subject):
                self.answers[subject] = _Answer(asked.text, reply, reading, attempt)


class SelfJudge:
    """Judges with ``model`` itself, by the ``instructions`` of a template (a shipped name or a .yaml path).

    ``soft``: a reply that could be read is scored by the expectation over its score (``judging.soft_score``), not by
    the number written. ``decoding`` is that of the first attempt; a question without a readable answer is asked again
    up to ``retries`` times, sampled with temperature 0.7. Nothing depends on the size or the order of a batch: sampled
    replies are asked for image by image, with a seed from ``decoding.seed``, the attempt, the image and the questions.
    """

    def __init__(
        self,
        model: UnifiedModel,
        instructions: str = "compact",
        soft: bool = True,
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
        retries: int = 1,
    ) -> None:
        self.model = model
        self.instructions = load_instructions(instructions)
        self.soft = soft
        self.decoding = decoding
        self.retries = retries

    def judge(
        self, images: Sequence[Image], prompts: Sequence[str], regions: Sequence[Sequence[Region]]
    ) -> list[tuple[list[RegionJudgement], LayoutJudgement]]:
        """Per image the judgements of its ``regions`` (boxes in image pixels), in their order, and of its layout."""
        cases = [
            _Case(image, self._questions(prompt, proposed))
            for image, prompt, proposed in zip(images, prompts, regions, strict=True)
        ]
        for attempt in range(1, self.retries + 2):
            self._attempt(cases, attempt)
        if self.soft:
            self._soften(cases)
        return [
            ([_region_judgement(region.id, case.answers[region.id]) for region in proposed], _layout_judgement(case))
            for case, proposed in zip(cases, regions, strict=True)
        ]

    def _questions(self, prompt: str, regions: Sequence[Region]) -> list[_Asked]:
        size = self.instructions.regions_per_question
        groups = [regions[first : first + size] for first in range(0, len(regions), size)]
        about_regions = [
            _Asked(self.instructions.about_regions(prompt, group), tuple(region.id for region in group))
            for group in groups
        ]
        return [*about_regions, _Asked(self.instructions.about_layout(prompt), (LAYOUT,))]

    def _attempt(self, cases: Sequence[_Case], attempt: int) -> None:
        """Asks what is still open, and records the replies."""
        decoding = self.decoding if attempt == 1 else replace(self.decoding, temperature=RETRY_TEMPERATURE)
        asked = [(case, questions) for case in cases if (questions := case.open_questions())]
        if not asked:
            return
        images = [case.image for case, _ in asked]
        texts = [[Question(question.text) for question in questions] for _, questions in asked]
        for (case, questions), replies in zip(asked, self._replies(images, texts, decoding, attempt), strict=True):
            for question, reply in zip(questions, replies, strict=True):
                case.record(question, reply, attempt)

    def _replies(
        self, images: Sequence[Image], questions: Sequence[Sequence[Question]], decoding: Decoding, attempt: int
    ) -> list[list[str]]:
        if decoding.temperature == 0:
            return self.model.answer(images, questions, decoding)
        return [
            self.model.answer([image], [own], replace(decoding, seed=_seed(decoding.seed, attempt, image, own)))[0]
            for image, own in zip(images, questions, strict=True)
        ]

    def _soften(self, cases: Sequence[_Case]) -> None:
        """Replaces every score by its expectation; one call for all replies with the same space before the number."""
        by_space: dict[str, list[tuple[_Case, dict[int, Question]]]] = defaultdict(list)
        for case in cases:
            for space, questions in _score_questions(case).items():
                by_space[space].append((case, questions))
        for space, group in by_space.items():
            images = [case.image for case, _ in group]
            scores = soft_scores(self.model, images, [list(questions.values()) for _, questions in group], space)
            for (case, questions), values in zip(group, scores, strict=True):
                for subject, score in zip(questions, values, strict=True):
                    answer = case.answers[subject]
                    case.answers[subject] = replace(answer, reading=replace(answer.reading, score=score))


def _score_questions(case: _Case) -> dict[str, dict[int, Question]]:
    """By the space before the number, then by subject: the questions whose continuation is the score."""
    questions: dict[str, dict[int, Question]] = defaultdict(dict)
    for subject, answer in case.answers.items():
        if answer.reading.score_start is not None:
            question, space = question_up_to(answer.question, answer.raw, answer.reading.score_start)
            questions[space][subject] = question
    return questions


def _seed(seed: int, attempt: int, image: Image, questions: Sequence[Question]) -> int:
    """A seed in [0, 2^63) that depends on what is asked about what, and not on its place in a batch."""
    content = repr((seed, attempt, image.mode, image.size, [question.text for question in questions])).encode()
    digest = hashlib.blake2b(content + image.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _region_judgement(region_id: int, answer: _Answer) -> RegionJudgement:
    reading = answer.reading
    return RegionJudgement(
        region_id=region_id,
        score=reading.score,
        label=reading.label,
        reason=reading.reason,
        failure=reading.failure,
        raw=answer.raw,
        attempts=answer.attempts,
    )


def _layout_judgement(case: _Case) -> LayoutJudgement:
    answer = case.answers[LAYOUT]
    reading = answer.reading
    return LayoutJudgement(
        score=reading.score, reason=reading.reason, failure=reading.failure, raw=answer.raw, attempts=answer.attempts
    )
