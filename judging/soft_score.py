"""Soft scores: the expectation of the score under the model's own distribution, instead of the one that it wrote.

With few tokens to choose from, the written score hides how sure the model is; the expectation ranks regions better
(docs/specs/srum.md, section 7: AUROC 89 against 74).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from srum.models.base import Question, UnifiedModel

LEVELS = tuple(tenths / 10 for tenths in range(-10, 11))  # -1.0, -0.9, ..., 1.0


def question_up_to(text: str, reply: str, score_start: int) -> tuple[Question, str]:
    """The question with its reply up to ``Score:``, and the space that the reply has between it and the number.

    The space goes with the number, because tokenizers join it with a minus sign: split from it, all negative scores
    would be unlikely.
    """
    before = reply[:score_start]
    prefix = before.rstrip(" ")
    return Question(text, reply_prefix=prefix), before[len(prefix) :]


def soft_scores(
    model: UnifiedModel, images: Sequence[Image], questions: Sequence[Sequence[Question]], space: str
) -> list[list[float]]:
    """Per image and question the expected score, in [-1, 1], over ``LEVELS``, each written behind ``space``."""
    continuations = [f"{space}{level:.1f}" for level in LEVELS]
    return [
        expected_score(logprobs).tolist() for logprobs in model.continuation_logprobs(images, questions, continuations)
    ]


def expected_score(logprobs: Tensor) -> Tensor:
    """Expectations (...,), in [-1, 1], of log-probabilities (..., 21) of ``LEVELS``, which need not sum to one."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    return (logprobs.double().cpu().softmax(dim=-1) @ levels).clamp(-1, 1)
