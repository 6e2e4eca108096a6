"""The reward map exactly as the released SRUM code computes it (docs/specs/bagel.md, 12.2), to compare ours with.

Its defects are kept (docs/specs/srum.md, section 3): over a canvas of 0.5, the maximum loses all criticism of a region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

GLOBAL_ENTRY = "global_layout_reward"


def reference_map(entries: Sequence[Mapping[str, Any]], layout: float | None, size_wh: tuple[int, int]) -> Tensor:
    """The pixel map (H, W) float32 of ``vlm_rewards`` entries for an image of ``size_wh`` (W, H).

    ``layout`` None counts as 0. Scores are not checked, boxes index the image as they are, invalid ones are skipped.
    """
    width, height = size_wh
    values = torch.full((height, width), 0.5)
    for entry in entries:
        box = _box(entry.get("bbox"))
        if entry.get("object") == GLOBAL_ENTRY or box is None:
            continue
        x0, x1 = (min(max(x, 0), width) for x in box[::2])
        y0, y1 = (min(max(y, 0), height) for y in box[1::2])
        values[y0:y1, x0:x1] = values[y0:y1, x0:x1].clamp(min=(entry.get("score", 0.0) + 1) / 2)
    return values * ((layout or 0.0) + 1) / 2


def reference_grid(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map (h, w) on the latent grid: bilinear samples of the pixel map (H, W), not area averages."""
    return interpolate(pixels[None, None], size=grid, mode="bilinear", align_corners=False)[0, 0]


def _box(value: object) -> tuple[int, ...] | None:
    if not (isinstance(value, list | tuple) and len(value) == 4):
        return None
    try:
        box = tuple(int(number) for number in value)
    except (TypeError, ValueError):
        return None
    return box if box[0] < box[2] and box[1] < box[3] else None
