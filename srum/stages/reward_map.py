"""The rasterizer: regions, their scores and the layout score become a reward map on the latent grid.

The image is cut along every edge of every region; in each of the rectangles the regions are composed, and the
rectangles are averaged exactly over the area of each latent cell, so that thin regions count by their area
(docs/specs/srum.md, 3: each choice beside the paper's and the released code's).

By hand, an image of 4x4 px on a grid of 2x2, background 0: a box (0, 0, 2, 2) of score 1 fills the first cell, and a
box (1, 0, 3, 2) of score -1 covers half of the first and half of the second. Of equal area, the later one wins:

    [[(1 - 1) / 2, -1 / 2], [0, 0]] = [[0.0, -0.5], [0.0, 0.0]]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from statistics import fmean
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from srum.geometry import area_average, rle_decode
from srum.records import Box, Candidate, Grounding, Judgement, Region, Size

Mapping = Literal["signed", "unit", "reference"]
Overlap = Literal["smallest", "mean", "max", "min"]
Shape = Literal["mask", "box"]
Background = Literal["judged", "neutral"]
OnFailure = Literal["skip", "keep"]

Place = tuple[slice, slice] | np.ndarray  # an index: the rectangles of a box, or a bool array

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
    shape: Shape = "mask",
    background: Background = "judged",
) -> tuple[Tensor, float] | Skipped:
    """The reward map (h, w) float32 on the latent ``grid``, and alpha = (layout + 1) / 2 in [0, 1] (Eq. 1).

    ``mapping``: ``signed`` is the score itself, in [-1, 1]; ``unit`` is (score + 1) / 2, in [0, 1]; ``reference`` is
    the released code's map, in [0.5, 1], whose rules take the place of ``overlap``, ``shape`` and ``background``. The
    map is not yet multiplied by alpha. ``shape``: a region is its ``mask``, where it has one, or always its ``box``.
    ``background``: outside the regions stands its score, where it was ``judged``, or always the ``neutral`` one.

    ``on_failure``: with ``skip`` one failed region skips the candidate; with ``keep`` the map is that of the regions
    that have a score, as if no other had been proposed, and the place of a failed background is neutral. Without a
    layout score, or without any region's, the candidate is skipped either way.
    """
    if (reason := reason_to_skip(grounding, judgement, on_failure)) is not None:
        return reason
    assert judgement.layout.score is not None  # else there was a reason to skip
    alpha = (judgement.layout.score + 1) / 2
    known = {said.region_id: said.score for said in judgement.regions if said.score is not None}
    things = [region for region in grounding.regions if region.id != 0 and region.id in known]
    scores = [known[region.id] for region in things]
    if mapping == "reference":
        return reference_grid(reference_pixels([r.box for r in things], scores, candidate.size), grid), alpha
    rows, columns, places, areas = cut(things, candidate.size, shape)
    below = known.get(0, NEUTRAL) if background == "judged" else NEUTRAL
    values = compose(places, np.array(scores), areas, below, (len(rows) - 1, len(columns) - 1), overlap)
    rewards = torch.from_numpy(area_average(values, grid, rows, columns).astype(np.float32))
    return rewards if mapping == "signed" else (rewards + 1) / 2, alpha


def cut(
    regions: Sequence[Region], size: Size, shape: Shape = "mask"
) -> tuple[np.ndarray, np.ndarray, list[Place], np.ndarray]:
    """An image of ``size`` (H, W) cut along the edges of N regions into R x C rectangles, each in or out of a region.

    Returns the borders of the rows (R + 1,) and of the columns (C + 1,) in image pixels; for every region the index of
    its rectangles in an array (R, C); and the areas (N,) in pixels. Where there is a mask, every pixel is a rectangle.
    """
    boxes = np.array([region.box for region in regions], dtype=float).reshape(-1, 4)
    masks = {n: r.mask for n, r in enumerate(regions) if r.mask is not None} if shape == "mask" else {}
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    rows, first_row, last_row = _cut_side(boxes[:, 1::2], size[0], pixels=bool(masks))
    columns, first_column, last_column = _cut_side(boxes[:, 0::2], size[1], pixels=bool(masks))
    places: list[Place] = [
        (slice(y0, y1), slice(x0, x1))
        for y0, y1, x0, x1 in zip(first_row, last_row, first_column, last_column, strict=True)
    ]
    for index, mask in masks.items():
        places[index] = rle_decode(mask)[np.ix_(rows[:-1].astype(int), columns[:-1].astype(int))]
        areas[index] = regions[index].area
    return rows, columns, places, areas


def compose(
    places: Sequence[Place],
    scores: np.ndarray,
    areas: np.ndarray,
    background: float,
    shape: tuple[int, int],
    overlap: Overlap,
) -> np.ndarray:
    """The score, in [-1, 1], of every rectangle of an array of ``shape``; ``places`` index N regions in it.

    Where regions overlap, the one that wins is the ``smallest``, that of the ``max`` or of the ``min`` score, among
    equals the last; ``mean`` is the mean of their scores. The background is where no region is.
    """
    if overlap == "mean":
        total, count = np.zeros((2, *shape))
        for place, score in zip(places, scores, strict=True):
            total[place] += score
            count[place] += 1
        return np.where(count > 0, total / np.maximum(count, 1), background)
    values = np.full(shape, background)
    priority = {"smallest": -areas, "max": scores, "min": -scores}[overlap]
    for index in np.argsort(priority, kind="stable").tolist():  # painting beats an array over all
        values[places[index]] = scores[index]
    return values


def reference_pixels(boxes: Sequence[Box], scores: Sequence[float], size: Size) -> Tensor:
    """The released code's map (H, W) float32 before alpha: the maximum of (score + 1) / 2 over a canvas of 0.5.

    Its defects are kept: corners are cut to whole pixels, and no score below 0 can be seen (docs/specs/bagel.md, 12.2).
    """
    values = torch.full(size, 0.5)
    for box, score in zip(boxes, scores, strict=True):
        x0, y0, x1, y1 = (max(int(corner), 0) for corner in box)
        values[y0:y1, x0:x1] = values[y0:y1, x0:x1].clamp(min=(score + 1) / 2)
    return values


def reference_grid(pixels: Tensor, grid: Size) -> Tensor:
    """The released code's map (h, w) on the latent grid: bilinear samples of the pixels (H, W), not area averages."""
    return interpolate(pixels[None, None], size=grid, mode="bilinear", align_corners=False)[0, 0]


def usual_scores(judgements: Iterable[Judgement], prompts: Iterable[str]) -> dict[str, float]:
    """By prompt what its candidates score on average: each the mean of its regions and its background, as far as they
    were judged. ``prompts`` names the prompt of each of the ``judgements``."""
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for judgement, prompt in zip(judgements, prompts, strict=True):
        if scores := [region.score for region in judgement.regions if region.score is not None]:
            by_prompt[prompt].append(fmean(scores))
    return {prompt: fmean(scores) for prompt, scores in by_prompt.items()}


def centred(judgement: Judgement, usual: float) -> Judgement:
    """The judgement with every region score less the ``usual`` one of its prompt, in [-1, 1]: how much better or worse
    than usual a region is."""
    return _rescored(judgement, lambda score: min(max(score - usual, -1.0), 1.0))


def binarized(judgement: Judgement) -> Judgement:
    """The judgement with region scores as 1 where they are above neutral and -1 elsewhere: a 0/1 reward (Sec. 4.3)."""
    return _rescored(judgement, lambda score: 1.0 if score > NEUTRAL else -1.0)


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


def reason_to_skip(grounding: Grounding, judgement: Judgement, on_failure: OnFailure) -> Skipped | None:
    """Why a candidate has neither map nor score; None where it has."""
    failed = [region.score is None for region in judgement.regions]
    if grounding.error is not None:
        return Skipped.GROUNDING_FAILED
    if judgement.layout.score is None:
        return Skipped.LAYOUT_FAILED
    if all(failed):
        return Skipped.NOTHING_JUDGED
    return Skipped.REGION_FAILED if any(failed) and on_failure == "skip" else None


def _cut_side(edges: np.ndarray, length: int, pixels: bool) -> tuple[np.ndarray, list[int], list[int]]:
    """A side of ``length`` cut at its ends, at the ``edges`` (N, 2) of the regions, perhaps at every pixel.

    Returns the borders of the pieces, and for every region its first piece and the one after its last.
    """
    inside = edges.clip(0, length)
    borders = np.unique(np.concatenate([inside.ravel(), np.arange(length + 1) if pixels else (0, length)]))
    first, last = np.searchsorted(borders, inside.T).tolist()
    return borders, first, last


def _rescored(judgement: Judgement, change: Callable[[float], float]) -> Judgement:
    """The judgement with ``change`` made to every region score that there is."""
    regions = [
        region if region.score is None else region.model_copy(update={"score": change(region.score)})
        for region in judgement.regions
    ]
    return judgement.model_copy(update={"regions": regions})
