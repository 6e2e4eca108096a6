"""A fixed grid of boxes: what a grounder without eyes proposes, and a baseline for those that have them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image
from pydantic import validate_call

from srum.config import Count
from srum.records import Region


class GridGrounder:
    """``side`` x ``side`` equal boxes, row by row."""

    @validate_call
    def __init__(self, side: Count = 3) -> None:
        self.side = side

    def propose(self, images: Sequence[Image], prompts: Sequence[str]) -> list[list[Region]]:
        """The same grid for every image, in pixels of each."""
        return [self._cells(image.width / self.side, image.height / self.side) for image in images]

    def _cells(self, width: float, height: float) -> list[Region]:
        return [
            Region(
                id=row * self.side + column + 1,
                box=(column * width, row * height, (column + 1) * width, (row + 1) * height),
                area=width * height,
                source="grid",
            )
            for row in range(self.side)
            for column in range(self.side)
        ]
