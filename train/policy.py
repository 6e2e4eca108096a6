"""Policy gradients: advantages within groups, clipped ratios, distances from a reference (docs/r3.md).

Texts and images alike: of a token a log-probability, of a group a comparison. Nothing is reduced here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Normalisation = Literal["centred", "group_std", "batch_std"]
MOST_ADVANTAGE = 5.0
MOST_LOG_RATIO = 20.0
STD_FLOOR = 1e-4


def group_advantages(
    rewards: Sequence[float | None], groups: Sequence[int | str], how: Normalisation = "centred"
) -> list[float]:
    """A = r - mean of the group, in [-5, 5]; 0 where there is no reward, or none beside it in the group.

    ``group_std`` divides by the group's population std + 1e-4, ``batch_std`` by that over all groups; without either
    a group whose samples hardly differ teaches hardly anything (Dr. GRPO). Equal rewards give exactly 0.
    """
    known = [i for i, reward in enumerate(rewards) if reward is not None]
    values = {i: float(reward) for i, reward in enumerate(rewards) if reward is not None}
    of_group = {name: [values[i] for i in known if groups[i] == name] for name in dict.fromkeys(groups)}
    whole = _std(list(values.values()))
    advantages = [0.0] * len(rewards)
    for i in known:
        siblings = of_group[groups[i]]
        if len(siblings) < 2 or min(siblings) == max(siblings):
            continue
        scale = {"centred": 1.0, "group_std": _std(siblings) + STD_FLOOR, "batch_std": whole + STD_FLOOR}[how]
        centred = values[i] - sum(siblings) / len(siblings)
        advantages[i] = min(max(centred / scale, -MOST_ADVANTAGE), MOST_ADVANTAGE)
    return advantages


def _std(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).std(correction=0).item() if values else 0.0


def zero_spread(rewards: Sequence[float | None], groups: Sequence[int | str]) -> int:
    """How many groups teach nothing: equal rewards, or fewer than two."""
    by_group = {name: {r for r, g in zip(rewards, groups, strict=True) if g == name} for name in set(groups)}
    return sum(len(own - {None}) < 2 for own in by_group.values())


def log_ratio(new: Tensor, old: Tensor) -> Tensor:
    """log(p_new / p_old), within [-20, 20]."""
    return (new - old).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)


def clipped_terms(log_ratios: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)) of ratios rho = exp(``log_ratios``) (N,) and A (N,)."""
    ratio = log_ratios.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def clipped(log_ratios: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """1 where the clipped ratio is taken and there is no gradient, else 0; (N,)."""
    ratio = log_ratios.exp()
    return (((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))).to(log_ratios)


def k3(new: Tensor, reference: Tensor) -> Tensor:
    """An estimate, never negative, of KL(new || reference) from samples of new: exp(r) - r - 1, r = ref - new."""
    difference = log_ratio(reference, new)
    return difference.exp() - difference - 1


def mean_by(values: Tensor, owner: Tensor) -> Tensor:
    """``values`` (N,) replaced by their mean over those of one ``owner`` (N,): one ratio for an image, or of GSPO."""
    if not len(owner):
        return values
    zeros = values.new_zeros(int(owner.max()) + 1)
    sums = zeros.index_add(0, owner, values)
    return (sums / zeros.index_add(0, owner, torch.ones_like(values)).clamp(min=1))[owner]


Drawing = Literal["uniform", "stratified", "gap", "spread"]


def state_probabilities(
    values: Sequence[float], groups: Sequence[int | str], how: Drawing, right_share: float = 0.15
) -> list[float]:
    """How likely each stored image, of value V in [0, 1], is the state from which a group refines.

    ``stratified`` (R3 as released): one of V = 1 with probability ``right_share``, else any other; where one kind is
    missing, the other. ``gap``: the others in proportion to 1 - V. ``spread``: all in proportion to
    |V - mean of its prompt's group| + 0.001.
    """
    if how == "spread":
        means = {g: _mean([v for v, h in zip(values, groups, strict=True) if h == g]) for g in set(groups)}
        return _normalised([abs(v - means[g]) + 0.001 for v, g in zip(values, groups, strict=True)])
    right = [float(v >= 1) for v in values]
    if how == "uniform" or all(right):
        return _normalised([1.0] * len(values))
    others = _normalised([(1 - v) if how == "gap" else float(v < 1) for v in values])
    if not any(right):
        return others
    return [right_share * r + (1 - right_share) * o for r, o in zip(_normalised(right), others, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _normalised(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


Reading = Literal["paper", "released", "ours"]


def stage_rewards(
    before: float, after: float, stop: bool, formatted: bool, reading: Reading = "ours", format_weight: float = 1.0
) -> tuple[float, float]:
    """(C, reward of the reflection): what a refinement is worth that finds an image of value ``before`` in [0, 1] and
    leaves one of value ``after``, both 1 where right, and what its reply is worth (docs/r3.md has the table).

    ``after`` of a stopped chain, whose image is the same, does not count in ``ours``.
    """
    f = float(formatted)
    if before >= 1:
        worth = 1.0 if stop else {"paper": 0.0, "released": after - 1, "ours": min(0.0, after - 1)}[reading]
    else:
        worth = 0.0 if stop and reading == "ours" else after - before
    if reading == "paper":
        return worth, worth + f
    return worth, f * (worth + format_weight)
