"""Short questions about the facts of a prompt: whether an image shows them, one by one (TIIF's form).

A prompt brings its questions as ``metadata["questions"]``, each {"question", "answer": "yes", "choices": ["yes",
"no"]}; a prompt of the embedded world has those that ``srum.shapes.questions`` makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from srum.errors import SrumError, first_fault
from srum.exchange.chat import NoReply
from srum.judging.base import Scorer, Writer
from srum.models.base import Decoding, Segment
from srum.records import Failure
from srum.shapes.prompts import from_metadata
from srum.shapes.questions import facts

REPLY = Decoding(max_tokens=8)


class QuestionsError(SrumError, ValueError):
    """Questions of a prompt that cannot be read; the message is one line."""


class AskedFact(BaseModel):
    """A question, what is right, and what may be answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    answer: str = "yes"
    choices: tuple[str, ...] = ("yes", "no")

    @model_validator(mode="after")
    def _can_be_right(self) -> AskedFact:
        if self.answer not in self.choices:
            raise ValueError(f"the answer {self.answer!r} is none of the choices {list(self.choices)}")
        return self


def questions_of(metadata: Mapping[str, Any]) -> list[AskedFact]:
    """Those that a prompt brings, or that follow from what it asks for in the embedded world; else none.

    Raises QuestionsError for some that cannot be read.
    """
    if "questions" in metadata:
        try:
            return TypeAdapter(list[AskedFact]).validate_python(metadata["questions"])
        except ValidationError as error:
            raise QuestionsError(first_fault(error, "questions")) from None
    if "include" not in metadata:
        return []
    return [AskedFact(question=q, answer=a, choices=c) for q, a, c in facts(from_metadata(dict(metadata)))]


def answers(
    model: Writer, images: Sequence[Image], asked: Sequence[Sequence[AskedFact]], hard: bool = False
) -> list[list[float | Failure]]:
    """Per image and question the probability, in [0, 1], of the right answer among its choices; ``hard``: 1 where it is
    the likeliest, else 0. A server gives no probabilities: 1 or 0 by its reply, which begins with one of the choices or
    is a failure."""
    seen = [Segment("seen", image=image) for image in images]
    flat = [(shown, fact) for shown, own in zip(seen, asked, strict=True) for fact in own]
    told = _scored(model, flat, hard) if isinstance(model, Scorer) else _written(model, flat)
    rest = iter(told)
    return [[next(rest) for _ in own] for own in asked]


def _scored(model: Scorer, asked: Sequence[tuple[Segment, AskedFact]], hard: bool) -> list[float | Failure]:
    found: dict[int, float | Failure] = {}
    for choices in dict.fromkeys(fact.choices for _, fact in asked):
        places = [place for place, (_, fact) in enumerate(asked) if fact.choices == choices]
        contexts = [[asked[place][0], Segment("text", text=asked[place][1].question)] for place in places]
        for place, logprobs in zip(places, model.score(contexts, choices), strict=True):
            likely = logprobs.double().softmax(dim=-1)
            right = choices.index(asked[place][1].answer)
            value = float(likely.argmax() == right) if hard else float(likely[right])
            found[place] = value if torch.isfinite(likely).all() else Failure.NO_SCORE
    return [found[place] for place in range(len(asked))]


def _written(model: Writer, asked: Sequence[tuple[Segment, AskedFact]]) -> list[float | Failure]:
    contexts = [
        [shown, Segment("text", text=f"{fact.question} Answer with {' or '.join(fact.choices)} alone.")]
        for shown, fact in asked
    ]
    replies = model.write(contexts, REPLY, [0] * len(contexts)) if contexts else []
    return [
        Failure.NO_REPLY if isinstance(reply, NoReply) else read(reply.text, fact)
        for reply, (_, fact) in zip(replies, asked, strict=True)
    ]


def read(reply: str, fact: AskedFact) -> float | Failure:
    """1 where the reply's first word is the answer, 0 where it is another choice; else why it is neither."""
    words = reply.split()
    if not words:
        return Failure.EMPTY
    first = words[0].strip(".,;:!*\"'").casefold()
    if first not in {choice.casefold() for choice in fact.choices}:
        return Failure.NO_SCORE
    return float(first == fact.answer.casefold())
