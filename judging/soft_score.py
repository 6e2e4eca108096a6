"""Scores from the model's own distribution over the 21 levels, instead of the number that it wrote.

With few tokens to choose from, the written score hides how sure the model is; the expectation ranks regions better
(docs/specs/srum.md, section 7: AUROC 89 against 74).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from srum.judging.base import Question, Scorer
from srum.models.base import Segment

LEVELS = tuple(tenths / 10 for tenths in range(-10, 11))  # -1.0, -0.9, ..., 1.0


def question_up_to(text: str, reply: str, score_start: int) -> tuple[Question, str]:
    """The question with its reply up to ``Score:``, and the space that the reply has between it and the number.

    The space goes with the number, because tokenizers join it with a minus sign: split from it, all negative scores
    would be unlikely.
    """
    before = reply[:score_start]
    prefix = before.rstrip(" ")
    return Question(text, reply_prefix=prefix), before[len(prefix) :]


def forced_question(text: str, reply: str, region_id: int | None) -> tuple[Question, str]:
    """The question whose reply, readable or not, goes on with a score line up to ``Score:``; and the space after it.

    ``region_id`` is None where the line is about the whole image.
    """
    thought = "</think>" if reply.rfind("<think>") > reply.rfind("</think>") else ""
    heading = "" if region_id is None else f"Region ID: {region_id}\n"
    return Question(text, reply_prefix=f"{reply}{thought}\n\n{heading}Score:".lstrip()), " "


def score_logprobs(model: Scorer, contexts: Sequence[Sequence[Segment]], space: str) -> Tensor:
    """(contexts, 21) log-probabilities of ``LEVELS``, each written behind ``space``: one forward pass."""
    return torch.stack(model.score(contexts, [f"{space}{level:.1f}" for level in LEVELS]))


def expected_score(logprobs: Tensor) -> Tensor:
    """Expectations (...,), in [-1, 1], of log-probabilities (..., 21) of ``LEVELS``, which need not sum to one."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    return (logprobs.double().cpu().softmax(dim=-1) @ levels).clamp(-1, 1)


def likeliest_score(logprobs: Tensor) -> Tensor:
    """The likeliest level (...,) of log-probabilities (..., 21)."""
    return torch.tensor(LEVELS, dtype=torch.float64)[logprobs.cpu().argmax(dim=-1)]


def confidence(logprobs: Tensor) -> Tensor:
    """1 less the standard deviation (...,), in [0, 1], of the score under log-probabilities (..., 21) of ``LEVELS``."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    deviation = (levels - expected_score(logprobs)[..., None]).square()
    return (1 - (logprobs.double().cpu().softmax(dim=-1) * deviation).sum(dim=-1).sqrt()).clamp(0, 1)
