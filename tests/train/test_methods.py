"""The methods' terms and credits: algebra done by hand and laws (the reference's numbers: test_bagel_golden)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srum.errors import TrainingError
from srum.models.base import FlowForward
from srum.run import find_method
from srum.train.advantages import sample_advantages, spread_by_blame
from srum.train.methods.region_nft import with_both
from srum.train.objective import Terms, Tokens
from tests.train.ranks import config_of


def terms(method: str, v: Tensor, u: Tensor, credit: Tensor, old: Tensor | None = None, **values: Any) -> Terms:
    """The method's terms of tokens with velocities v (N, D) towards u (N, D), beside those of old weights."""
    new, before = (None if x is None else predicted(x, u) for x in (v, old))
    assert new is not None
    tokens = Tokens("image", new.image_error, credit)
    if before is not None:
        tokens = Tokens("image", new.image_error, credit, before.image_error, *new.distance(before))
    config = config_of(method=method, **values)
    return find_method(method).terms(tokens, config)


def predicted(v: Tensor, u: Tensor) -> FlowForward:
    none = torch.zeros(0)
    return FlowForward(
        velocity=v, target=u, timestep=none, image_segment=none, cell=none, logits=none, labels=none, text_segment=none
    )


def total(parts: Terms) -> Tensor:
    return torch.stack(list(parts.values())).sum(dim=0)


def random_velocities(count: int) -> list[Tensor]:
    return list(torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64))


def flow_error(v: Tensor, u: Tensor) -> Tensor:
    return (v - u).square().mean(dim=-1)


def test_mixed_prompts_are_those_with_right_and_wrong_candidates() -> None:
    """Prompt a has both, b only right ones, c one that is not right by a hair: 0 is not above 0."""
    scores = [("a", 0.9), ("a", -1.0), ("b", 0.1), ("b", 1.0), ("c", 0.0), ("c", 0.5)]
    records: Any = [
        SimpleNamespace(candidate=SimpleNamespace(prompt_id=prompt), sample_score=score) for prompt, score in scores
    ]
    assert [record.candidate.prompt_id for record in with_both(records)] == ["a", "a", "c", "c"]
    with pytest.raises(TrainingError, match="mixed_prompts: no prompt has candidates on both sides of 0"):
        with_both(records[2:4])


def test_sft_two_by_two() -> None:
    """D = 2 channels, u = (1, 0); v = (1, 0), (2, 1), (1, 2), (-1, 0), so that v - u = (0, 0), (1, 1), (0, 2), (-2, 0).

    |v - u|^2 / 2 = 0, 1, 2, 2, whose mean over the four tokens is 5/4; its gradient is 2 (v - u) / (D N) = (v - u) / 4.
    Region-NFT with A = 1 (r = 1) and beta = 1 has the same value and gradient, whatever v_old.
    """
    v = torch.tensor([[1.0, 0.0], [2.0, 1.0], [1.0, 2.0], [-1.0, 0.0]], requires_grad=True)
    u = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    old = torch.tensor([[0.5, -1.0], [3.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    ones = torch.ones(4)
    for parts in (terms("sft", v, u, ones), terms("region_nft", v, u, ones, old, beta=1.0)):
        torch.testing.assert_close(total(parts), torch.tensor([0.0, 1.0, 2.0, 2.0]))
        (gradient,) = torch.autograd.grad(total(parts).mean(), v)
        torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [0.25, 0.25], [0.0, 0.5], [-0.5, 0.0]]))


def test_srum_two_by_two() -> None:
    """A 2x2 map, D = 2 channels, alpha = 1/2, so that the credit is R / 2, lambda_c = 1/2, target u = 0.

    cell   R    w = R/2 + 1/2   v        |v|^2 / 2   reward part   reference part   w |v - u|^2
    00     1        1          (1, 1)       1            1/2            1/2              1
    01    -1        0          (2, 0)       2            -1              1               0
    10     0       1/2         (0, 2)       2             0              1               1
    11    -1        0          (2, 2)       4            -2              2               0

    The mean over the four tokens is 1/2. d/dv of the mean: 2 w v / (D N) = w v / 4.
    """
    v = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]], requires_grad=True)
    reward = torch.tensor([[1.0, -1.0], [0.0, -1.0]]).flatten()
    parts = terms("srum", v, torch.zeros(4, 2), 0.5 * reward, constraint_weight=0.5)
    assert parts["reward"].tolist() == [0.5, -1.0, 0.0, -2.0]
    assert parts["reference"].tolist() == [0.5, 1.0, 1.0, 2.0]
    loss = total(parts).mean()
    loss.backward()
    assert loss.item() == 0.5
    assert v.grad is not None
    assert v.grad.tolist() == [[0.25, 0.25], [0.0, 0.0], [0.0, 0.25], [0.0, 0.0]]


def test_srum_repels_where_alpha_r_is_below_minus_lambda() -> None:
    """alpha = 1, R = -1, lambda_c = 1/2: w = -1/2, so that the gradient, 2 w (v - u), points towards the target."""
    v = torch.tensor([[3.0]], requires_grad=True)
    total(terms("srum", v, torch.tensor([[1.0]]), torch.tensor([-1.0]), constraint_weight=0.5)).sum().backward()
    assert v.grad is not None and v.grad.item() == -2.0


def test_a_map_of_ones_without_constraint_is_flow_matching() -> None:
    v, u = random_velocities(2)
    ones = torch.ones(6).double()
    parts = terms("srum", v, u, ones, constraint_weight=0.0)
    torch.testing.assert_close(total(parts), total(terms("sft", v, u, ones)))


def test_region_nft_two_by_two() -> None:
    """A 2x2 map, D = 1, beta = 1/2, u = 0, v_old = 1 (e = 1), v = 3 (d = 2), A = 1, -1, 0, 1/2.

    v+ = 1 + 1/2 * 2 = 2, v- = 0; r |v+|^2 + (1 - r) |v-|^2 = 4 r, divided by beta: 8 r = 4 (1 + A) = 8, 0, 4, 6.
    By parts: error 1 / beta = 2; push 2 A e d = 4 A; trust beta d^2 = 2: again 4 + 4 A.
    Gradient: 2 A e + 2 beta d = 2 A + 2 = 4, 0, 2, 3.
    """
    advantage = torch.tensor([[1.0, -1.0], [0.0, 0.5]]).flatten()
    v = torch.full((4, 1), 3.0, requires_grad=True)
    parts = terms("region_nft", v, torch.zeros(4, 1), advantage, torch.ones(4, 1), beta=0.5)
    assert parts["error"].tolist() == [2.0] * 4
    assert parts["push"].tolist() == [4.0, -4.0, 0.0, 2.0]
    assert parts["trust"].tolist() == [2.0] * 4
    total(parts).sum().backward()
    assert v.grad is not None
    assert v.grad.flatten().tolist() == [4.0, 0.0, 2.0, 3.0]


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_region_nft_is_its_mixture_form(beta: float) -> None:
    v, old, u = random_velocities(3)
    advantage = torch.linspace(-1, 1, 6).double()
    r, push = (1 + advantage) / 2, beta * (v - old)
    mixture = r * flow_error(old + push, u) + (1 - r) * flow_error(old - push, u)
    torch.testing.assert_close(total(terms("region_nft", v, u, advantage, old, beta=beta)), mixture / beta)


def test_region_nft_with_full_advantage_and_beta_one_is_sft() -> None:
    v, old, u = random_velocities(3)
    parts = terms("region_nft", v, u, torch.ones(6).double(), old, beta=1.0)
    torch.testing.assert_close(total(parts), flow_error(v, u))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_region_nft_starts_as_the_weighted_squared_error_whatever_beta(beta: float) -> None:
    old, u = random_velocities(2)
    advantage = torch.linspace(-1, 1, 6).double()
    v = old.clone().requires_grad_()
    (nft,) = torch.autograd.grad(total(terms("region_nft", v, u, advantage, old, beta=beta)).sum(), v)
    (weighted,) = torch.autograd.grad((advantage * flow_error(v, u)).sum(), v)
    torch.testing.assert_close(nft, weighted)
    assert (nft[advantage == 0] == 0).all()


def test_region_nft_repulsion_is_bounded() -> None:
    """D = 1, A = -1, e = 1: -2 d + beta d^2 is least at d = 1 / beta, where it is -1 / beta."""
    v = torch.linspace(-100, 100, 2001).double()[:, None]
    zero = torch.zeros_like(v)
    parts = terms("region_nft", v, zero - 1, -torch.ones(2001).double(), zero, beta=0.5)
    assert (parts["push"] + parts["trust"]).min().item() == pytest.approx(-2.0)


@pytest.mark.parametrize("method", ["sft", "srum", "region_nft"])
def test_texts_are_learned_by_cross_entropy_with_its_weight_and_credit(method: str) -> None:
    tokens = Tokens("text", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]))
    parts = find_method(method).terms(tokens, config_of(method=method, text_weight=0.25))
    assert {name: values.tolist() for name, values in parts.items()} == {"cross_entropy": [0.25, 0.25]}


def test_sample_advantages_by_hand() -> None:
    """Groups a = (1, 0), b = (0, 0): means 1/2 and 0, centred (1/2, -1/2, 0, 0); the batch has mean 1/4 and variance
    1/4 - 1/16 = 3/16, so 2 std = sqrt(3) / 2 and A = +-1 / sqrt(3). The order of the records does not matter."""
    scores, groups = [1.0, 0.0, 0.0, 0.0], ["a", "b", "a", "b"]
    a = 3**-0.5
    assert sample_advantages(scores, groups) == pytest.approx([a, 0.0, -a, 0.0])
    assert sample_advantages(scores, groups, 0.5) == pytest.approx([1.0, 0.5, 0.5 - a, 0.5])


def test_sample_advantages_of_what_does_not_differ_are_exactly_zero() -> None:
    assert sample_advantages([0.1] * 6, ["a"] * 3 + ["b"] * 3) == [0.0] * 6
    assert sample_advantages([0.1, 0.1, 0.1, -1.0, 1.0], ["a", "a", "a", "b", "b"])[:3] == [0.0] * 3
    assert sample_advantages([0.4], ["a"]) == [0.0]


def test_sample_advantages_are_clipped() -> None:
    assert sample_advantages([-1.0] + [1.0] * 19, ["a"] * 20)[0] == -1.0


def test_blame_two_by_two() -> None:
    """Signed R = (1, 0; 1, -1): blame (0, 1; 0, 2), mean 3/4, normalised (0, 4/3; 0, 8/3), with uniform in equal
    parts (1/2, 7/6; 1/2, 11/6). A = -0.6 would give (-0.3, -0.7; -0.3, -1.1): the last cell is full at -1, and the
    others share the rest of 4 * 0.6, which is 1.4, in proportion 3 : 7 : 3, as -1.4 (3/13, 7/13; 3/13)."""
    reward = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    expected = -torch.tensor([[4.2 / 13, 9.8 / 13], [4.2 / 13, 1.0]])
    torch.testing.assert_close(spread_by_blame(-0.6, reward), expected)
    torch.testing.assert_close(spread_by_blame(-0.6, (reward + 1) / 2), expected)
    torch.testing.assert_close(spread_by_blame(-0.5, reward), -torch.tensor([[0.25, 7 / 12], [0.25, 11 / 12]]))


@pytest.mark.parametrize(("advantage", "reward"), [(0.7, [[1.0, -1.0]]), (-0.7, [[1.0, 1.0]]), (-0.7, [[-0.2, -0.2]])])
def test_praise_and_undivided_blame_are_uniform(advantage: float, reward: list[list[float]]) -> None:
    spread = spread_by_blame(advantage, torch.tensor(reward))
    torch.testing.assert_close(spread, torch.full((1, 2), advantage))


@settings(deadline=None)
@given(
    st.floats(-1, 1, width=32),
    st.integers(1, 6).flatmap(
        lambda w: st.lists(st.lists(st.floats(-1, 1, width=32), min_size=w, max_size=w), min_size=1, max_size=6)
    ),
)
def test_credit_of_regions_is_as_strong_as_credit_of_the_sample(advantage: float, rewards: list[list[float]]) -> None:
    """The same mean for any map and advantage, in [-1, 1]; and a cell that is blamed more takes no less of it."""
    reward = torch.tensor(rewards)
    credit = spread_by_blame(advantage, reward)
    assert credit.shape == reward.shape and credit.abs().max() <= 1
    assert credit.double().mean().item() == pytest.approx(advantage, abs=1e-6)
    by_reward = credit.flatten()[reward.flatten().argsort()]
    assert (by_reward.diff() >= 0).all()
