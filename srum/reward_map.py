"""The rasterizer: regions, their scores and the layout score become a reward map on the latent grid.

The map is composed on the pixel grid of the image, then averaged exactly over the area of each latent cell, so that
thin regions count by their area (docs/specs/srum.md, 3: each choice beside the paper's and the released code's).

By hand, an image of 4x4 px on a grid of 2x2, background 0: a box (0, 0, 2, 2) of score 1 fills the first cell, and a
box (1, 0, 3, 2) of score -1 covers half of the first and half of the second. Of equal area, the later one wins:

    [[(1 - 1) / 2, -1 / 2], [0, 0]] = [[0.0, -0.5], [0.0, 0.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor

from srum.geometry import area_average, coverage, rle_decode
from srum.records import Candidate, Grounding, Judgement, Region, Size

Mapping = Literal["signed", "unit"]
Overlap = Literal["smallest", "mean", "max", "min"]
OnFailure = Literal["skip", "keep"]

NEUTRAL = 0.0  # the score of a place that nobody judged
NEUTRAL_LAYOUT = 0.4  # the best layout score of a prompt that asks for no arrangement


class Skipped(StrEnum):
    """Why a candidate has no reward map; the caller counts them."""

    GROUNDING_FAILED = "grounding_failed"
    LAYOUT_FAILED = "layout_failed"
    REGION_FAILED = "region_failed"
    NOTHING_JUDGED = "nothing_judged"


def rasterize(
    candidate: Candidate,
    grounding: Grounding,
    judgement: Judgement,
    grid: Size,
    mapping: Mapping = "signed",
    overlap: Overlap = "smallest",
    on_failure: OnFailure = "skip",
) -> tuple[Tensor, float] | Skipped:
    """The reward map (h, w) float32 on the latent ``grid``, and alpha = (layout + 1) / 2 in [0, 1] (Eq. 1).

    ``mapping``: ``signed`` is the score itself, in [-1, 1]; ``unit`` is (score + 1) / 2, in [0, 1]. The map is not yet
    multiplied by alpha. ``on_failure``: with ``skip`` one failed region skips the candidate; with ``keep`` its place is
    neutral. Without a layout score, or without any region's, the candidate is skipped either way.
    """
    scores = {region.region_id: region.score for region in judgement.regions}
    if (reason := _reason_to_skip(grounding, judgement, on_failure)) is not None:
        return reason
    things = [region for region in grounding.regions if region.id != 0]
    values = compose(
        [region_pixels(region, candidate.size) for region in things],
        [_known(scores.get(region.id)) for region in things],
        [region.area for region in things],
        background=_known(scores.get(0)),
        size=candidate.size,
        overlap=overlap,
    )
    rewards = area_average(values, grid).clamp(-1, 1).float()
    assert judgement.layout.score is not None  # else there was a reason to skip
    return rewards if mapping == "signed" else (rewards + 1) / 2, (judgement.layout.score + 1) / 2


def compose(
    pixels: Sequence[Tensor],
    scores: Sequence[float],
    areas: Sequence[float],
    background: float,
    size: Size,
    overlap: Overlap,
) -> Tensor:
    """The score (H, W) of every pixel, in [-1, 1]; ``pixels`` are the shares (H, W) of each pixel that a region covers.

    Where regions overlap: ``smallest``, ``max`` and ``min`` lay them over the background and one another, the one that
    wins last; ``mean`` takes the mean of their scores. A pixel that is covered in part keeps a part of what is below.
    """
    if overlap == "mean":
        return _mean(pixels, scores, background, size)
    priority = {"smallest": [-area for area in areas], "max": scores, "min": [-score for score in scores]}[overlap]
    values = torch.full(size, background, dtype=torch.float64)
    for index in sorted(range(len(scores)), key=lambda index: priority[index]):
        values += pixels[index] * (scores[index] - values)
    return values


def region_pixels(region: Region, size: Size) -> Tensor:
    """Share (H, W) float64, in [0, 1], of each pixel of an image of ``size`` inside the region's mask, else its box."""
    if region.mask is not None:
        return torch.from_numpy(rle_decode(region.mask)).double()
    return coverage(torch.tensor([region.box], dtype=torch.float64), size, size)[0]


def sample_score(judgement: Judgement) -> float:
    """The candidate's one score, in [-1, 1]: the lowest among its regions, its background and its layout.

    A layout that nobody asked for is at best neutral and must not count against the candidate: layout scores from -1 to
    ``NEUTRAL_LAYOUT`` are stretched to [-1, 1], higher ones are 1. Failed regions are left out. Raises ValueError
    without a layout score or without any region's.
    """
    regions = [region.score for region in judgement.regions if region.score is not None]
    if judgement.layout.score is None or not regions:
        raise ValueError(f"candidate {judgement.candidate_id}: no layout score or no region score")
    layout = 2 * (judgement.layout.score + 1) / (NEUTRAL_LAYOUT + 1) - 1
    return min(*regions, layout, 1.0)


def _reason_to_skip(grounding: Grounding, judgement: Judgement, on_failure: OnFailure) -> Skipped | None:
    failed = [region.score is None for region in judgement.regions]
    if grounding.error is not None:
        return Skipped.GROUNDING_FAILED
    if judgement.layout.score is None:
        return Skipped.LAYOUT_FAILED
    if all(failed):
        return Skipped.NOTHING_JUDGED
    return Skipped.REGION_FAILED if any(failed) and on_failure == "skip" else None


def _known(score: float | None) -> float:
    return NEUTRAL if score is None else score


def _mean(pixels: Sequence[Tensor], scores: Sequence[float], background: float, size: Size) -> Tensor:
    shares = torch.zeros(size, dtype=torch.float64)
    total = torch.zeros(size, dtype=torch.float64)
    for share, score in zip(pixels, scores, strict=True):
        shares += share
        total += share * score
    return (total + (1 - shares).clamp(min=0) * background) / shares.clamp(min=1)
