"""Stock Qwen2.5-VL, with what it sees of an image (docs/specs/blip3o.md, 11)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from srum.geometry import Size
from srum.models.blip3o.images import patches, seen_size
from srum.models.queries.language import Language, Run


class Qwen(Language):
    """Qwen2.5-VL, frozen; positions are those of M-RoPE."""

    axes = 3

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self.vision = network.model.visual
        vision = network.config.vision_config
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.factor = self.patch * self.merge

    def images(self, images: Sequence[Image], sizes: Sequence[Size] | None = None) -> list[Run]:
        """Images as runs, at ``sizes`` (H, W) or those that they are usually seen at. Raises ModelError as
        ``seen_size`` does."""
        if not images:
            return []
        sizes = [self.seen_size((image.height, image.width)) for image in images] if sizes is None else sizes
        grids = torch.tensor([[1, height // self.patch, width // self.patch] for height, width in sizes])
        pixels = [patches(image, size, self.patch, self.merge) for image, size in zip(images, sizes, strict=True)]
        values = torch.cat(pixels).to(self.device, self.vision.dtype)
        states = self.vision(values, grid_thw=grids.to(self.device)).pooler_output
        merged = (grids[:, 1:] // self.merge).tolist()
        parts = states.split([rows * columns for rows, columns in merged])
        return [
            Run(part, _plane(rows, columns, self.device), max(rows, columns))
            for part, (rows, columns) in zip(parts, merged, strict=True)
        ]

    def seen_size(self, size: Size) -> Size:
        """(H, W) at which an image of ``size`` (H, W) is seen."""
        return seen_size(size, self.factor)


def _plane(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions (3, rows * columns) of an image: time, row, column."""
    place = torch.arange(rows * columns, device=device)
    return torch.stack([torch.zeros_like(place), place // columns, place % columns])
