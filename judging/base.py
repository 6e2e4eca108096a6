"""What judges: the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL.Image import Image

from srum.records import LayoutJudgement, Region, RegionJudgement


class Judge(Protocol):
    """Scores regions and layouts of images. An unreadable reply is a failure in its judgement, not an exception."""

    def judge(
        self, images: Sequence[Image], prompts: Sequence[str], regions: Sequence[Sequence[Region]]
    ) -> list[tuple[list[RegionJudgement], LayoutJudgement]]:
        """Per image the judgements of its ``regions`` (boxes in image pixels), in their order, and of its layout."""
        ...
