"""What a judge may be made of: the protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL.Image import Image
from torch import Tensor

from srum.models.base import Decoding, Question


@dataclass(frozen=True)
class NoReply:
    """In place of a reply that never came, and why."""

    why: str


class Answerer(Protocol):
    """What answers questions about images: a ``UnifiedModel``, or a server (``judging.remote``)."""

    def answer(
        self, images: Sequence[Image], questions: Sequence[Sequence[Question]], decoding: Decoding
    ) -> Sequence[Sequence[str | NoReply]]:
        """Replies, ``[i][j]`` to question j about image i."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """What also tells how likely a reply is: a ``UnifiedModel``."""

    def continuation_logprobs(
        self, images: Sequence[Image], questions: Sequence[Sequence[Question]], continuations: Sequence[str]
    ) -> list[Tensor]:
        """Per image a float tensor (questions, continuations): log p(continuation | image, question, reply_prefix)."""
        ...
