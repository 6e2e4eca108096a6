"""Policy gradients: the numbers that public code agrees with, and laws of groups, ratios and states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import policy_parity
from srum.train.policy import clipped_terms, group_advantages, k3, mean_by, state_probabilities

GOLDEN = Path(__file__).parents[1] / "golden" / "flow_grpo"
VALUES = st.lists(st.integers(0, 8).map(lambda n: n / 8), min_size=2, max_size=12)


@pytest.mark.parametrize("fixture", policy_parity.CHECKS)
def test_every_recorded_number_is_met(fixture: str) -> None:
    deviations = policy_parity.compare(GOLDEN, fixture)
    assert deviations and [d for d in deviations if not d.passed] == []


@given(VALUES, st.integers(-4, 4))
def test_a_constant_added_to_the_rewards_of_a_group_changes_nothing(rewards: list[float], constant: int) -> None:
    groups = [0] * len(rewards)
    moved = group_advantages([reward + constant for reward in rewards], groups)
    assert moved == pytest.approx(group_advantages(rewards, groups), abs=1e-12)


@given(VALUES, st.data())
def test_samples_that_swap_swap_their_advantages(rewards: list[float], data: st.DataObject) -> None:
    i, j = (data.draw(st.integers(0, len(rewards) - 1)) for _ in range(2))
    before = group_advantages(rewards, [0] * len(rewards))
    rewards[i], rewards[j] = rewards[j], rewards[i]
    before[i], before[j] = before[j], before[i]
    assert group_advantages(rewards, [0] * len(rewards)) == pytest.approx(before, abs=1e-12)


def test_a_sample_without_a_reward_is_in_no_mean() -> None:
    """Group 0: rewards 1, none, 0: the mean is 1/2. Group 1: one reward alone has nothing to be compared with."""
    assert group_advantages([1.0, None, 0.0, 1.0, None], [0, 0, 0, 1, 1]) == [0.5, 0.0, -0.5, 0.0, 0.0]


def test_at_ratio_one_the_gradient_is_the_advantage_times_that_of_the_log_probability() -> None:
    new = torch.zeros(3, requires_grad=True)
    clipped_terms(new, torch.tensor([2.0, -1.0, 0.0]), 0.2, 0.2).sum().backward()
    assert new.grad is not None and new.grad.tolist() == [-2.0, 1.0, 0.0]


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=5))
def test_k3_is_never_negative_and_zero_where_nothing_moved(moves: list[float]) -> None:
    new = torch.tensor(moves)
    assert (k3(new, torch.zeros_like(new)) >= 0).all() and torch.equal(k3(new, new), torch.zeros_like(new))


def test_the_mean_of_an_image_stands_at_each_of_its_tokens() -> None:
    means = mean_by(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]))
    assert means.tolist() == [2.0, 2.0, 5.0]


@given(VALUES)
def test_states_have_probabilities(values: list[float]) -> None:
    groups = [place % 2 for place in range(len(values))]
    for how in ("uniform", "stratified", "gap", "spread"):
        chances = state_probabilities(values, groups, how)  # type: ignore[arg-type]
        assert min(chances) >= 0 and sum(chances) == pytest.approx(1)
