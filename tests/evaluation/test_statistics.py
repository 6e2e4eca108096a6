"""Intervals against values derived by hand, against Student's, and by how often they cover the truth."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from srum.evaluation import statistics
from srum.evaluation.accuracy import accuracy_of
from srum.evaluation.statistics import Estimate, crossed, difference, over_seeds, wilson

VERDICTS = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8))


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)


def simulated(rng: np.random.Generator, seeds: int, seed_effect: float) -> np.ndarray:
    """Verdicts (seeds, 200): right by chance, 50% in the mean over seeds and prompts, which are better or worse."""
    better = rng.normal(0, seed_effect, (seeds, 1)) + rng.normal(0, 0.15, (1, 200))
    return rng.random((seeds, 200)) < np.clip(0.5 + better, 0, 1)


def coverage(estimates: list[Estimate]) -> float:
    """How many of the intervals hold a half."""
    return float(np.mean([estimate.low <= 0.5 <= estimate.high for estimate in estimates]))


# --- Wilson


def test_wilson_by_hand() -> None:
    """With z^2 = 3.8415 and n = 10: 5 right, centre 1/2, half z sqrt(1/40 + z^2/400) / (1 + z^2/10) = 0.26341. None
    right: both centre and half are z^2 / 20 / (1 + z^2/10), so from 0 to z^2 / (10 + z^2) = 0.27754."""
    assert wilson([True, False] * 5).interval == pytest.approx((50 - 26.3407, 50 + 26.3407), abs=1e-3)
    assert dataclasses.astuple(wilson([False] * 10)) == (0.0, 0.0, pytest.approx(27.7533, abs=1e-3), None, 10)
    assert dataclasses.astuple(wilson([True] * 10)) == (100.0, pytest.approx(72.2467, abs=1e-3), 100.0, None, 10)
    with pytest.raises(ValueError, match="no verdicts"):
        wilson([])


def test_an_accuracy_is_wilsons() -> None:
    accuracy = accuracy_of([True, False, True, True])
    assert (accuracy.accuracy, accuracy.n) == (75.0, 4)
    assert accuracy.interval == wilson([True, False, True, True]).interval


# --- over seeds


def test_students_interval_by_hand() -> None:
    """1, 2, 3: standard deviation 1, of the mean 1 / sqrt(3), and t = 4.30265 with two degrees of freedom."""
    estimate = over_seeds([1.0, 2.0, 3.0])
    assert estimate.interval == pytest.approx((2 - 2.48413, 2 + 2.48413), abs=1e-4)
    assert estimate.covers == "3 seeds"


def test_one_seed_has_no_interval_over_seeds() -> None:
    with pytest.raises(ValueError, match="at least two"):
        over_seeds([3.0])


# --- crossed


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("seed_effect", [0.0, 0.1])
def test_the_crossed_interval_covers_the_truth_whatever_the_seeds_do(seeds: int, seed_effect: float) -> None:
    """In 92% of the cases at least, and not by being endless: without seed effects, at most 99.5%."""
    rng = np.random.default_rng(seeds)
    covered = coverage([crossed(simulated(rng, seeds, seed_effect)) for _ in range(200)])
    assert 0.92 <= covered <= 0.995


def test_an_interval_over_prompts_alone_does_not() -> None:
    """Seeds that differ by 10 points from their mean, five of them: the mean is off by 4.5, the interval says 3.5."""
    rng = np.random.default_rng(5)
    assert coverage([crossed(simulated(rng, 5, 0.1).mean(axis=0)) for _ in range(200)]) < 0.7


def test_with_many_prompts_it_is_students() -> None:
    """Six seeds in which nothing but the seed decides: what the prompts add is nothing."""
    shares = [0.40, 0.44, 0.45, 0.51, 0.52, 0.62]
    verdicts = np.arange(2000) < 2000 * np.array(shares)[:, None]
    shuffled = np.random.default_rng(0).permuted(verdicts, axis=1)
    width, student = (
        low_high[1] - low_high[0] for low_high in (crossed(shuffled).interval, over_seeds(shares).interval)
    )
    assert width == pytest.approx(student, rel=0.1)


def test_seeds_that_agree_by_chance_leave_the_noise_of_single_images() -> None:
    """Three seeds of one accuracy each, right at places of their own: the interval is that of 3 x 400 images."""
    verdicts = np.stack([np.random.default_rng(seed).permutation([1.0, 0.0] * 200) for seed in range(3)])
    low, high = crossed(verdicts).interval
    assert low < 0.5 < high and high - low == pytest.approx(2 * 1.96 * (0.25 / 1200) ** 0.5, rel=0.15)


def test_copies_of_a_prompt_in_other_seeds_tell_nothing_new() -> None:
    """Ten prompts right in all of 3 seeds, ten wrong: the interval is that of one seed, about 50 +- 22."""
    one = np.array([[1.0] * 10 + [0.0] * 10])
    alone, thrice = (crossed(np.repeat(one, times, axis=0)).times(100) for times in (1, 3))
    assert thrice.interval == pytest.approx(alone.interval) and thrice.value == alone.value == 50.0
    assert 25 <= alone.low <= 35 and 65 <= alone.high <= 75
    assert (alone.covers, thrice.covers) == ("20 prompts", "3 seeds, 20 prompts")


@given(VERDICTS)
def test_the_mean_lies_in_its_interval_and_seeds_and_prompts_have_no_order(verdicts: np.ndarray) -> None:
    estimate = crossed(verdicts)
    assert estimate.value == pytest.approx(verdicts.mean())
    assert estimate.low <= estimate.value + 1e-9 and estimate.value - 1e-9 <= estimate.high
    turned = crossed(verdicts[::-1, ::-1])
    assert turned.value == pytest.approx(estimate.value)
    assert (turned.seeds, turned.prompts) == (estimate.seeds, estimate.prompts)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_where_all_verdicts_are_the_same_there_is_no_width(right: float) -> None:
    assert crossed(np.full((3, 50), right)).interval == (right, right)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 4 values are not numbers"):
        crossed([[1.0, 0.0], [np.nan, 1.0]])
    with pytest.raises(ValueError, match=r"no verdicts .* shape \(1, 0\)"):
        crossed([])


# --- differences


def test_a_paired_difference_by_hand() -> None:
    """30 prompts gained and 10 lost of 100: 20 points, standard error sqrt(0.4 - 0.04) / 10 = 6 points."""
    a = [True] * 30 + [False] * 10 + [True] * 60
    b = [False] * 30 + [True] * 10 + [True] * 60
    gain = difference(a, b).times(100)
    assert gain.value == pytest.approx(20.0) and gain.covers == "100 prompts"
    assert gain.interval == pytest.approx((20 - 1.96 * 6, 20 + 1.96 * 6), abs=1.0)
    assert difference(a, a).interval == (0.0, 0.0)


def test_pairing_takes_out_what_both_share() -> None:
    """Seeds 20 points apart in both: neither is known to better than 10 points, their difference is exactly 5."""
    shares = np.array([0.3, 0.5, 0.7])[:, None]
    b = np.arange(100) < 100 * shares
    a = np.arange(100) < 100 * (shares + 0.05)
    assert difference(a, b).interval[0] > 0 > difference(a, b[::-1]).low
    assert crossed(a).high - crossed(a).low > 0.2


@given(VERDICTS)
def test_a_difference_is_that_of_the_means_and_turns_its_sign(verdicts: np.ndarray) -> None:
    other = np.roll(verdicts, 1, axis=1)
    assert difference(verdicts, other).value == pytest.approx(crossed(verdicts).value - crossed(other).value)
    assert difference(other, verdicts).value == pytest.approx(-difference(verdicts, other).value)


def test_verdicts_on_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\) are not on the same"):
        difference([True] * 3, [True] * 2)


def test_an_estimate_in_points_is_that_of_points() -> None:
    assert Estimate(0.5, -0.25, 0.75, seeds=3, prompts=8).times(100) == Estimate(50, -25, 75, seeds=3, prompts=8)
