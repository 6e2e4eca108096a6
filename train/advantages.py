"""Advantages: scores compared within their group, and one advantage spread over the cells of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_advantages(scores: Sequence[float], groups: Sequence[int | str], offset: float = 0.0) -> list[float]:
    """Advantage of each candidate among those of its group: N scores -> N float32 numbers in [-1, 1].

        A_i = clip((s_i - mean of the group's scores) / (2 std of all scores) + offset, -1, 1)

    ``groups`` names the group (the prompt) of each score. The standard deviation (population) runs over the whole
    batch, so a group whose candidates hardly differ is not blown up. Scores that are all equal differ from nothing:
    offset alone.
    """
    if not scores:
        return []
    all_scores = torch.tensor(scores, dtype=torch.float64)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([numbers[group] for group in groups])
    sums, counts = torch.zeros(2, len(numbers), dtype=torch.float64).index_add_(
        1, index, torch.stack([all_scores, torch.ones_like(all_scores)])
    )
    # equal scores: zero, not the rounding error of their mean
    centred = (all_scores - (sums / counts)[index]).round(decimals=12)
    spread = (2 * all_scores.std(correction=0)).clamp(min=1e-8)
    return (centred / spread + offset).clamp(-1, 1).float().tolist()


def spread_by_blame(advantage: float, reward_map: Tensor) -> Tensor:
    """A candidate's advantage in [-1, 1] on the cells of its reward map (h, w) -> (h, w) in [-1, 1], of the same mean.

    Praise is uniform. A negative advantage goes to the cells in proportion to blame, 1 - R, so that a signed map and a
    unit one blame alike, and mixed half and half with uniform; without any blame it is uniform. A cell takes at most
    -1: what is beyond goes to the others in proportion, so that blame on regions is as strong as blame on the whole.
    """
    blame = 1 - reward_map
    if advantage >= 0 or blame.sum() == 0:
        return torch.full_like(reward_map, advantage)
    share = 0.5 + 0.5 * blame / blame.mean()
    scale = _scale_to_mean(share.flatten().double(), -advantage)
    return -(scale * share.double()).clamp(max=1).float()


def _scale_to_mean(share: Tensor, mean: float) -> Tensor:
    """The factor c with mean(min(c share, 1)) = mean, for shares (N,) > 0 and a mean in (0, 1].

    With the k largest shares at 1, c = (N mean - k) / sum of the others; k is the first for which no other exceeds 1.
    """
    ordered = share.sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)  # sum of those from place k on
    full = torch.arange(len(ordered), dtype=share.dtype)
    factors = (len(ordered) * mean - full) / rest
    return factors[(factors * ordered <= 1 + 1e-12).nonzero()[0, 0]] if mean < 1 else (1 / ordered[-1])
