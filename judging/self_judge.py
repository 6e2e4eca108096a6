"""The model as the judge of its own images (paper, Sec. 3.2): it is asked region by region, then for the layout."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from PIL.Image import Image

from srum.geometry import scale_box
from srum.json_files import as_unicode
from srum.judging.base import NoReply, Question, Scorer, Writer
from srum.judging.instructions import InstructionsError, load_instructions
from srum.judging.replies import Reading, parse_layout, parse_regions
from srum.judging.soft_score import (
    confidence,
    expected_score,
    forced_question,
    likeliest_score,
    question_up_to,
    score_logprobs,
)
from srum.judging.views import crop, draw_marks
from srum.models.base import Decoding, Segment, Written, box_frame, remembering
from srum.records import Failure, LayoutJudgement, Region, RegionJudgement, Size

RETRY_TEMPERATURE = 0.7
LAYOUT, WHOLE = -1, -2  # stand for the layout and for the whole image where regions have their ids

View = Literal["boxes", "marks", "crops", "whole"]
ReplyMode = Literal["free", "constrained", "short", "none"]
SCORE = "Score:"  # what a short reply ends with


@dataclass(frozen=True)
class _Topic:
    """What one question is about: regions, boxes in pixels of the picture shown; without any, LAYOUT or WHOLE."""

    regions: tuple[Region, ...] = ()
    otherwise: int = LAYOUT

    @property
    def subjects(self) -> tuple[int, ...]:
        return tuple(region.id for region in self.regions) or (self.otherwise,)

    def without(self, settled: Container[int]) -> _Topic:
        return replace(self, regions=tuple(region for region in self.regions if region.id not in settled))


@dataclass(frozen=True)
class _Asked:
    """A question in words, the subjects that it is about, and whether it ``thinks``: asks for a thought first."""

    text: str
    subjects: tuple[int, ...]
    thinks: bool = False

    def read(self, reply: str, ended: bool) -> dict[int, Reading]:
        if self.subjects[0] in (LAYOUT, WHOLE):
            return {self.subjects[0]: parse_layout(reply, ended, self.thinks)}
        return parse_regions(reply, self.subjects, ended, self.thinks)


@dataclass(frozen=True)
class _Answer:
    """What was last heard of one subject."""

    question: str
    raw: str
    reading: Reading
    attempts: int
    confidence: float | None = None


@dataclass
class _Case:
    """A picture as it is shown, what is to be asked about it, and the answers so far, by subject."""

    picture: Image
    prompt: str
    topics: list[_Topic]
    answers: dict[int, _Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seen = Segment("seen", image=self.picture)  # one for all questions, so that it is looked at once

    def open_topics(self) -> list[_Topic]:
        settled = {subject for subject in self.answers if self.is_settled(subject)}
        return [topic.without(settled) for topic in self.topics if not settled.issuperset(topic.subjects)]

    def is_settled(self, subject: int) -> bool:
        return subject in self.answers and self.answers[subject].reading.failure is None

    def record(self, asked: _Asked, reply: Written | NoReply, attempt: int, short: bool) -> None:
        raw = as_unicode(reply.why if isinstance(reply, NoReply) else reply.text)
        if isinstance(reply, NoReply):
            readings = dict.fromkeys(asked.subjects, Reading(failure=Failure.NO_REPLY))
        elif short and SCORE in raw and not reply.ended:
            raw = raw.partition(SCORE)[0] + SCORE
            readings = asked.read(f"{raw} 0.0", ended=True)  # a number until the likeliest takes its place
        else:
            readings = asked.read(raw, reply.ended)
        for subject, reading in readings.items():
            self.answers[subject] = _Answer(asked.text, raw, reading, attempt)


class SelfJudge:
    """Judges with ``model``, in the loop the model itself, by the ``instructions`` of a template (a name or a path).

    ``decoding`` is that of the first attempt, ``seed`` that of all that is sampled. What was not answered readably is
    asked again up to ``retries`` times, differently: sampled with temperature 0.7, only the regions that are missing,
    in the template's shorter words where it has any, and without thinking.

    ``view``: the regions are named by their ``boxes``, or also drawn into the image as ``marks``, or shown one by one
    as ``crops``; with ``whole`` they share one score of the whole image, the paper's sample-level ablation (Sec. 4.3).
    ``think``: the first attempt asks for a thought before the answer.

    ``reply``: ``free`` is what the model writes, and unreadable after the last attempt it is a failure; ``constrained``
    makes it go on with a score line whose number is one of 21 levels, so that there is always a score; a ``short`` one
    ends where the number of its own score line would stand, which is one of the levels, too: no reasons; with ``none``
    that line is all there is, one forward pass without decoding, labels and reasons. ``soft``: the score is its
    expectation over the 21 levels (``judging.soft_score``), not the number written or, of a forced line, the likeliest.

    No seed depends on the size or the order of a batch: a sampled reply has one of ``seed``, the attempt, the image and
    the question. Raises ValueError for instructions without the texts of ``view`` and ``think``, and where a model that
    gives no log-probabilities would need them.
    """

    def __init__(
        self,
        model: Writer,
        instructions: str = "compact",
        soft: bool = True,
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
        retries: int = 1,
        view: View = "boxes",
        think: bool = False,
        reply: ReplyMode = "free",
        seed: int = 0,
    ) -> None:
        self.model, self.seed = model, seed
        self.instructions = load_instructions(instructions)
        self.soft, self.decoding, self.retries = soft, decoding, retries
        self.view, self.think, self.reply = view, think, reply
        if view == "whole":
            self.instructions.about_image("")
        if think and self.instructions.think is None:
            raise InstructionsError(f"the instructions {self.instructions.version} have no text 'think'")
        if reply == "short" and self.instructions.regions_per_question > 1:
            raise InstructionsError(
                f"short replies: {self.instructions.version} asks about several regions at once; ask with compact"
            )
        if (soft or reply != "free") and not isinstance(model, Scorer):
            raise InstructionsError("soft scores and forced score lines need a model that gives log-probabilities")

    def judge(
        self, images: Sequence[Image], prompts: Sequence[str], regions: Sequence[Sequence[Region]]
    ) -> list[tuple[list[RegionJudgement], LayoutJudgement]]:
        """Per image the judgements of its ``regions`` (boxes in image pixels), in their order, and of its layout."""
        cases = [self._cases(*candidate) for candidate in zip(images, prompts, regions, strict=True)]
        every = [case for own in cases for case in own]
        with remembering(self.model):
            if self.reply == "none":
                for case in every:
                    self._leave_unanswered(case)
            else:
                for attempt in range(1, self.retries + 2):
                    self._attempt(every, attempt)
            if self.soft or self.reply != "free":
                self._score(every)
        return [self._judgements(own, proposed) for own, proposed in zip(cases, regions, strict=True)]

    # --- what is shown and asked

    def _cases(self, image: Image, prompt: str, regions: Sequence[Region]) -> list[_Case]:
        if self.view == "whole":
            return [_Case(image, prompt, [_Topic(otherwise=WHOLE), _Topic()] if regions else [_Topic()])]
        if self.view == "marks":
            marked = _Case(draw_marks(image, regions), prompt, self._topics(regions))
            return [marked, _Case(image, prompt, [_Topic()])]
        if self.view == "crops":
            crops = [(picture, moved) for picture, moved in (crop(image, r) for r in regions if r.id != 0)]
            background = self._topics([r for r in regions if r.id == 0])
            own = [_Case(picture, prompt, [_Topic((moved,))]) for picture, moved in crops]
            return [*own, _Case(image, prompt, [*background, _Topic()])]
        return [_Case(image, prompt, [*self._topics(regions), _Topic()])]

    def _topics(self, regions: Sequence[Region]) -> list[_Topic]:
        size = self.instructions.regions_per_question
        return [_Topic(tuple(regions[first : first + size])) for first in range(0, len(regions), size)]

    def _asked(self, case: _Case, topic: _Topic, again: bool) -> _Asked:
        prompt = case.prompt
        if topic.regions:
            regions = self._as_read(topic.regions, (case.picture.height, case.picture.width))
            text = self.instructions.about_regions(prompt, regions, marked=self.view == "marks", short=again)
        elif topic.otherwise == LAYOUT:
            text = self.instructions.about_layout(prompt, short=again)
        else:
            text = self.instructions.about_image(prompt)
        thinks = self.think and not again
        return _Asked(f"{self.instructions.think}\n\n{text}" if thinks else text, topic.subjects, thinks)

    def _as_read(self, regions: Sequence[Region], size: Size) -> list[Region]:
        """Regions of a picture of ``size`` (H, W) with their boxes where the model reads them."""
        frame = box_frame(self.model, size)
        return [region.model_copy(update={"box": scale_box(region.box, size, frame)}) for region in regions]

    # --- replies

    def _attempt(self, cases: Sequence[_Case], attempt: int) -> None:
        """Asks what is still open, and records the replies."""
        again = attempt > 1
        short = self.reply == "short"
        decoding = replace(self.decoding, until=SCORE if short else "")
        decoding = replace(decoding, temperature=RETRY_TEMPERATURE) if again else decoding
        asked = [(case, self._asked(case, topic, again)) for case in cases for topic in case.open_topics()]
        contexts = [Question(question.text).about(case.seen) for case, question in asked]
        seeds = [_seed(self.seed, attempt, case.picture, question.text) for case, question in asked]
        replies = self.model.write(contexts, decoding, seeds) if asked else []
        for (case, question), reply in zip(asked, replies, strict=True):
            case.record(question, reply, attempt, short)

    def _leave_unanswered(self, case: _Case) -> None:
        for topic in case.topics:
            asked = self._asked(case, topic, again=False)
            for subject in asked.subjects:
                case.answers[subject] = _Answer(asked.text, "", Reading(failure=Failure.EMPTY), attempts=0)

    # --- scores from the model's distribution

    def _score(self, cases: Sequence[_Case]) -> None:
        """Makes scores soft and forces score lines; one call for all with the same space before the number."""
        assert isinstance(self.model, Scorer)  # else the constructor had raised
        by_space: dict[str, list[tuple[_Case, int, Question]]] = defaultdict(list)
        for case in cases:
            for subject, question, space in self._score_questions(case):
                by_space[space].append((case, subject, question))
        for space, asked in by_space.items():
            logprobs = score_logprobs(self.model, [question.about(case.seen) for case, _, question in asked], space)
            values = (f(logprobs).tolist() for f in (expected_score, likeliest_score, confidence))
            for (case, subject, question), *of_subject in zip(asked, *values, strict=True):
                case.answers[subject] = self._scored(case.answers[subject], question, *of_subject)

    def _score_questions(self, case: _Case) -> Iterator[tuple[int, Question, str]]:
        """Of each subject the question whose continuation is the score, and the space before the number."""
        for subject, answer in case.answers.items():
            if answer.reading.score_start is not None:
                if self.reply == "short":
                    yield subject, Question(answer.question, answer.raw[: answer.reading.score_start].rstrip()), " "
                elif self.soft:
                    yield subject, *question_up_to(answer.question, answer.raw, answer.reading.score_start)
            elif self.reply != "free":
                region = subject if subject >= 0 else None
                yield subject, *forced_question(answer.question, answer.raw, region)

    def _scored(
        self, answer: _Answer, question: Question, expected: float, likeliest: float, confidence: float
    ) -> _Answer:
        """The answer with its score from the distribution; a forced line is an attempt, and stands in ``raw``."""
        if answer.reading.failure is not None:
            raw = f"{question.reply_prefix} {likeliest:.1f}"
            answer = replace(answer, raw=raw, attempts=answer.attempts + 1)
        elif self.reply == "short":
            answer = replace(answer, raw=f"{question.reply_prefix} {likeliest:.1f}")
        reading = replace(answer.reading, score=expected if self.soft else likeliest, failure=None)
        return replace(answer, reading=reading, confidence=confidence)

    # --- records

    def _judgements(
        self, cases: Sequence[_Case], regions: Sequence[Region]
    ) -> tuple[list[RegionJudgement], LayoutJudgement]:
        answers = {subject: answer for case in cases for subject, answer in case.answers.items()}
        of_regions = [answers[WHOLE if self.view == "whole" else region.id] for region in regions]
        judged = [
            RegionJudgement(region_id=region.id, label=answer.reading.label, **_said(answer))
            for region, answer in zip(regions, of_regions, strict=True)
        ]
        return judged, LayoutJudgement(**_said(answers[LAYOUT]))


def _seed(seed: int, attempt: int, image: Image, question: str) -> int:
    """A seed in [0, 2^63) that depends on what is asked about what, and not on its place in a batch."""
    content = repr((seed, attempt, image.mode, image.size, question)).encode()
    digest = hashlib.blake2b(content + image.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _said(answer: _Answer) -> dict[str, Any]:
    """The fields that every judgement has."""
    reading = answer.reading
    return {
        "score": reading.score,
        "reason": reading.reason,
        "failure": reading.failure,
        "raw": answer.raw,
        "attempts": answer.attempts,
        "confidence": answer.confidence,
    }
