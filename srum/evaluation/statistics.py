"""Intervals of 95%: of a share, over training seeds, and over seeds and prompts together.

An accuracy has two sources of chance: which prompts were asked, and which seed the training had. An interval says of
each whether it covers it (``Estimate.covers``); one training has no spread that could be covered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Z_95 = 1.959963984540054
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval, in the unit of what it is of (``wilson``: in percent).

    ``seeds`` and ``prompts`` are how many of them the interval treats as drawn; None: it takes them as they are, and
    says nothing about others.
    """

    value: float
    low: float
    high: float
    seeds: int | None = None
    prompts: int | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    def times(self, factor: float) -> Estimate:
        """In another unit: 100 times a share is in percent, and a difference of shares in points."""
        return replace(self, value=factor * self.value, low=factor * self.low, high=factor * self.high)

    @property
    def covers(self) -> str:
        """What the interval treats as drawn, such as ``5 seeds, 600 prompts``."""
        counts = {"seeds": self.seeds, "prompts": self.prompts}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count is not None)


def wilson(correct: Sequence[bool]) -> Estimate:
    """Percent correct with Wilson's score interval, over prompts. Raises ValueError for no verdicts at all."""
    if not len(correct):
        raise ValueError("there are no verdicts to average")
    n, share = len(correct), sum(correct) / len(correct)
    centre = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n)) / (1 + Z_95**2 / n)
    low, high = min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)  # no rounding past the ends
    return Estimate(100 * share, 100 * low, 100 * high, prompts=n)


def over_seeds(per_seed: Sequence[float]) -> Estimate:
    """The mean of one number per training seed with Student's interval; the prompts are taken as they are.

    For a difference, ``per_seed`` holds the differences within a seed. Raises ValueError for fewer than two seeds.
    """
    values = _finite(per_seed)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least two of them, got {per_seed}")
    half = _t_95(len(values)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half, seeds=len(values))


def crossed(values: ArrayLike, seed: int = 0) -> Estimate:
    """The mean of ``values`` (seeds, prompts), or (prompts,) of one seed, with a crossed bootstrap interval.

    Seeds and prompts are drawn again independently of one another, and the mean moves by what those drawn deviate by;
    the percentiles of all such means are the interval. It is corrected three times. Few seeds understate their spread:
    their deviation is widened by t / z sqrt(S / (S - 1)), so that with many prompts the interval is Student's over
    seeds (Hesterberg, "What teachers should know about the bootstrap", 2015). The noise of single images is in both
    deviations (Owen, "The pigeonhole bootstrap", 2007) but must count once: it is taken out of that of the prompts.
    And seeds that agree by chance better than that noise allows deviate by the noise.
    The interval of one seed covers the prompts alone, and ``seeds`` is None. Raises ValueError for NaN and no values.
    """
    table = np.atleast_2d(_finite(values))
    if table.ndim != 2 or not table.size:
        raise ValueError(f"there are no verdicts to average: expected (seeds, prompts), got shape {table.shape}")
    (seeds, prompts), mean, rng = table.shape, float(table.mean()), np.random.default_rng(seed)
    by_seed, by_prompt = table.mean(axis=1) - mean, table.mean(axis=0) - mean
    noise = table - mean - by_seed[:, None] - by_prompt
    through_prompts = _kept(noise, by_prompt) * _resampled(rng, by_prompt)
    through_seeds = _widening(seeds) * _resampled(rng, by_seed)
    if (floor := _noise_of_mean(noise)) > through_seeds.std():
        through_seeds = rng.normal(0.0, floor, RESAMPLES)
    low, high = np.percentile(mean + through_prompts + through_seeds, [2.5, 97.5])
    return Estimate(mean, float(low), float(high), seeds if seeds > 1 else None, prompts)


def difference(a: ArrayLike, b: ArrayLike, seed: int = 0) -> Estimate:
    """``a`` less ``b``, paired: verdicts (seeds, prompts) or (prompts,), on the same prompts in one order.

    It is ``crossed`` of the differences. Raises ValueError where the shapes differ, and as ``crossed`` does.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"verdicts of shapes {first.shape} and {second.shape} are not on the same seeds and prompts")
    return crossed(first - second, seed)


def stratified(
    sums: NDArray[np.float64],
    counts: NDArray[np.float64],
    strata: Sequence[str],
    weights: NDArray[np.float64],
    seed: int = 0,
) -> list[Estimate]:
    """Weighted sums of means with bootstrap intervals, in the unit of the values; prompts are drawn again in strata.

    ``sums`` and ``counts`` (prompts, columns) are of each prompt's values, ``strata`` (prompts,), ``weights`` (figures,
    columns). The mean of a column is over all values in it. An interval's ``prompts`` are those of the columns that its
    figure weights. Raises ValueError for a column without values.
    """
    if not (counts.sum(axis=0) > 0).all():
        raise ValueError("a column has no values to average")
    values = (sums.sum(axis=0) / counts.sum(axis=0)) @ weights.T
    low, high = np.nanpercentile(_replicates(sums, counts, strata, weights, seed), [2.5, 97.5], axis=0)
    prompts = [int(((counts > 0) @ (row != 0) > 0).sum()) for row in weights]
    ends = zip(values, low, high, prompts, strict=True)
    return [Estimate(float(value), float(down), float(up), prompts=n) for value, down, up, n in ends]


def stratified_difference(
    a: tuple[NDArray[np.float64], NDArray[np.float64]],
    b: tuple[NDArray[np.float64], NDArray[np.float64]],
    strata: Sequence[str],
    weights: NDArray[np.float64],
    seed: int = 0,
) -> list[Estimate]:
    """``a`` less ``b``, each sums and counts as in ``stratified``, paired: the same prompts are drawn for both."""
    first, second = (stratified(*one, strata, weights, seed) for one in (a, b))
    moved = _replicates(*a, strata, weights, seed) - _replicates(*b, strata, weights, seed)
    low, high = np.nanpercentile(moved, [2.5, 97.5], axis=0)
    values = [x.value - y.value for x, y in zip(first, second, strict=True)]
    prompts = [min(x.prompts or 0, y.prompts or 0) for x, y in zip(first, second, strict=True)]
    return [
        Estimate(v, float(lo), float(hi), prompts=n) for v, lo, hi, n in zip(values, low, high, prompts, strict=True)
    ]


def _replicates(
    sums: NDArray[np.float64],
    counts: NDArray[np.float64],
    strata: Sequence[str],
    weights: NDArray[np.float64],
    seed: int,
) -> NDArray[np.float64]:
    """The figures (RESAMPLES, figures) of prompts drawn with replacement; NaN where none drawn has a needed column."""
    rng, names = np.random.default_rng(seed), np.asarray(strata)
    total, number = np.zeros((2, RESAMPLES, sums.shape[1]))
    for name in dict.fromkeys(strata):
        here = names == name
        times = rng.multinomial(int(here.sum()), np.full(int(here.sum()), 1 / here.sum()), size=RESAMPLES)
        total += times @ sums[here]
        number += times @ counts[here]
    with np.errstate(invalid="ignore"):
        means = total / number
    used = weights != 0
    return np.stack([means[:, on] @ row[on] for row, on in zip(weights, used, strict=True)], axis=1)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=float)
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {array.size} values are not numbers; leave them out")
    return array


def _resampled(rng: np.random.Generator, deviations: NDArray[np.float64]) -> NDArray[np.float64]:
    """The means (RESAMPLES,) of as many of the deviations, drawn with replacement."""
    return rng.choice(deviations, (RESAMPLES, len(deviations))).mean(axis=1)


def _kept(noise: NDArray[np.float64], by_prompt: NDArray[np.float64]) -> float:
    """Which part of the prompts' deviations (prompts,) is their own: of the variance, all but that of the mean over the
    seeds of what neither seed nor prompt explains, ``noise`` (seeds, prompts)."""
    seeds, spread = len(noise), float((by_prompt**2).sum())
    if seeds == 1 or not spread:
        return 1.0
    return math.sqrt(max(0.0, 1 - float((noise**2).sum()) / (seeds * (seeds - 1) * spread)))


def _noise_of_mean(noise: NDArray[np.float64]) -> float:
    """The standard deviation that single images alone give the mean; of one seed it is in that of the prompts."""
    seeds, prompts = noise.shape
    freedom = (seeds - 1) * (prompts - 1)
    return math.sqrt(float((noise**2).sum()) / freedom / (seeds * prompts)) if freedom else 0.0


def _widening(seeds: int) -> float:
    return _t_95(seeds) / Z_95 * math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0


def _t_95(count: int) -> float:
    """The 97.5th percentile of Student's t over so many values."""
    return float(stdtrit(count - 1, 0.975))
