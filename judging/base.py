"""What a judge may be made of: the protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL.Image import Image
from torch import Tensor

from srum.exchange.chat import NoReply
from srum.models.base import Decoding, Segment, Written
from srum.records import LayoutJudgement, Region, RegionJudgement


@dataclass(frozen=True)
class Question:
    """One question about an image, and the beginning of the reply where that is given."""

    text: str
    reply_prefix: str = ""

    def about(self, seen: Segment) -> list[Segment]:
        """The context in which it is asked about the image that is ``seen``."""
        begun = [Segment("text", text=self.reply_prefix, open=True)] if self.reply_prefix else []
        return [seen, Segment("text", text=self.text), *begun]


Outcome = tuple[list[RegionJudgement], LayoutJudgement]  # of the regions of an image, in their order, and of its layout


class Judge(Protocol):
    """What judges: the model itself (``judging.self_judge``), or a class of a user's own."""

    def judge(
        self, images: Sequence[Image], prompts: Sequence[str], regions: Sequence[Sequence[Region]]
    ) -> Sequence[Outcome]:
        """Per RGB image the judgements of its ``regions`` (boxes in image pixels), in their order, and of its layout.

        What cannot be judged has a failure in place of a score (``srum.records.Failure``).
        """
        ...


class Writer(Protocol):
    """What answers questions about images: a ``UnifiedModel``, or a server (``judging.remote``)."""

    def write(
        self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]
    ) -> Sequence[Written | NoReply]:
        """A reply after each context."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """What also tells how likely a reply is: a ``UnifiedModel``."""

    def score(self, contexts: Sequence[Sequence[Segment]], continuations: Sequence[str]) -> list[Tensor]:
        """Per context (continuations,): the log-probability of each."""
        ...
