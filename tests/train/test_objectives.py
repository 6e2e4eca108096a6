"""The objectives against algebra done by hand and their own laws (the reference's numbers: test_bagel_golden)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.objectives import (
    flow_error,
    region_nft_terms,
    sample_advantages,
    sft_terms,
    spread_by_blame,
    srum_terms,
    srum_weight,
)


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum(dim=0)


def random_velocities(count: int) -> list[Tensor]:
    return list(torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64))


def test_sft_two_by_two() -> None:
    """D = 2 channels, u = (1, 0); v = (1, 0), (2, 1), (1, 2), (-1, 0), so that v - u = (0, 0), (1, 1), (0, 2), (-2, 0).

    |v - u|^2 / 2 = 0, 1, 2, 2, whose mean over the four tokens is 5/4; its gradient is 2 (v - u) / (D N) = (v - u) / 4.
    Region-NFT with A = 1 (r = 1) and beta = 1 has the same value and gradient, whatever v_old.
    """
    v = torch.tensor([[1.0, 0.0], [2.0, 1.0], [1.0, 2.0], [-1.0, 0.0]], requires_grad=True)
    u = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    old = torch.tensor([[0.5, -1.0], [3.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    for parts in (sft_terms(v, u), region_nft_terms(v, old, u, torch.ones(4), beta=1.0)):
        terms = total(parts)
        torch.testing.assert_close(terms, torch.tensor([0.0, 1.0, 2.0, 2.0]))
        (gradient,) = torch.autograd.grad(terms.mean(), v)
        torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [0.25, 0.25], [0.0, 0.5], [-0.5, 0.0]]))


def test_srum_two_by_two() -> None:
    """A 2x2 map, D = 2 channels, alpha = 1/2, lambda_c = 1/2, target u = 0.

    cell   R    w = R/2 + 1/2   v        |v|^2 / 2   reward part   reference part   w |v - u|^2
    00     1        1          (1, 1)       1            1/2            1/2              1
    01    -1        0          (2, 0)       2            -1              1               0
    10     0       1/2         (0, 2)       2             0              1               1
    11    -1        0          (2, 2)       4            -2              2               0

    The mean over the four tokens is 1/2. d/dv of the mean: 2 w v / (D N) = w v / 4.
    """
    v = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]], requires_grad=True)
    reward = torch.tensor([[1.0, -1.0], [0.0, -1.0]]).flatten()
    parts = srum_terms(v, torch.zeros(4, 2), reward, alpha=0.5, constraint_weight=0.5)
    assert parts["reward"].tolist() == [0.5, -1.0, 0.0, -2.0]
    assert parts["reference"].tolist() == [0.5, 1.0, 1.0, 2.0]
    assert srum_weight(reward, 0.5, 0.5).tolist() == [1.0, 0.0, 0.5, 0.0]
    loss = total(parts).mean()
    loss.backward()
    assert loss.item() == 0.5
    assert v.grad is not None
    assert v.grad.tolist() == [[0.25, 0.25], [0.0, 0.0], [0.0, 0.25], [0.0, 0.0]]


def test_srum_repels_where_alpha_r_is_below_minus_lambda() -> None:
    """alpha = 1, R = -1, lambda_c = 1/2: w = -1/2, so that the gradient, 2 w (v - u), points towards the target."""
    v = torch.tensor([[3.0]], requires_grad=True)
    total(srum_terms(v, torch.tensor([[1.0]]), torch.tensor([-1.0]), 1.0, 0.5)).sum().backward()
    assert v.grad is not None and v.grad.item() == -2.0


def test_a_map_of_ones_without_constraint_is_flow_matching() -> None:
    v, u = random_velocities(2)
    parts = srum_terms(v, u, torch.ones(6).double(), 1.0, 0.0)
    torch.testing.assert_close(total(parts), total(sft_terms(v, u)))


def test_region_nft_two_by_two() -> None:
    """A 2x2 map, D = 1, beta = 1/2, u = 0, v_old = 1 (e = 1), v = 3 (d = 2), A = 1, -1, 0, 1/2.

    v+ = 1 + 1/2 * 2 = 2, v- = 0; r |v+|^2 + (1 - r) |v-|^2 = 4 r, divided by beta: 8 r = 4 (1 + A) = 8, 0, 4, 6.
    By parts: error 1 / beta = 2; push 2 A e d = 4 A; trust beta d^2 = 2: again 4 + 4 A.
    Gradient: 2 A e + 2 beta d = 2 A + 2 = 4, 0, 2, 3.
    """
    advantage = torch.tensor([[1.0, -1.0], [0.0, 0.5]]).flatten()
    v = torch.full((4, 1), 3.0, requires_grad=True)
    parts = region_nft_terms(v, torch.ones(4, 1), torch.zeros(4, 1), advantage, beta=0.5)
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
    torch.testing.assert_close(total(region_nft_terms(v, old, u, advantage, beta)), mixture / beta)


def test_region_nft_with_full_advantage_and_beta_one_is_sft() -> None:
    v, old, u = random_velocities(3)
    torch.testing.assert_close(total(region_nft_terms(v, old, u, torch.ones(6).double(), 1.0)), flow_error(v, u))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_region_nft_starts_as_the_weighted_squared_error_whatever_beta(beta: float) -> None:
    old, u = random_velocities(2)
    advantage = torch.linspace(-1, 1, 6).double()
    v = old.clone().requires_grad_()
    (nft,) = torch.autograd.grad(total(region_nft_terms(v, old, u, advantage, beta)).sum(), v)
    (weighted,) = torch.autograd.grad((advantage * flow_error(v, u)).sum(), v)
    torch.testing.assert_close(nft, weighted)
    assert (nft[advantage == 0] == 0).all()


def test_region_nft_repulsion_is_bounded() -> None:
    """D = 1, A = -1, e = 1: -2 d + beta d^2 is least at d = 1 / beta, where it is -1 / beta."""
    v = torch.linspace(-100, 100, 2001).double()[:, None]
    zero = torch.zeros_like(v)
    parts = region_nft_terms(v, zero, zero - 1, -torch.ones(2001).double(), beta=0.5)
    assert (parts["push"] + parts["trust"]).min().item() == pytest.approx(-2.0)


def test_sample_advantages_by_hand() -> None:
    """Groups a = (1, 0), b = (0, 0): means 1/2 and 0, centred (1/2, -1/2, 0, 0); the batch has mean 1/4 and variance
    1/4 - 1/16 = 3/16, so 2 std = sqrt(3) / 2 and A = +-1 / sqrt(3). The order of the records does not matter."""
    scores, groups = torch.tensor([1.0, 0.0, 0.0, 0.0]), ["a", "b", "a", "b"]
    expected = torch.tensor([3**-0.5, 0.0, -(3**-0.5), 0.0])
    torch.testing.assert_close(sample_advantages(scores, groups), expected)
    torch.testing.assert_close(sample_advantages(scores, groups, 0.5), (expected + 0.5).clamp(-1, 1))


def test_sample_advantages_of_what_does_not_differ_are_exactly_zero() -> None:
    same = sample_advantages(torch.full((6,), 0.1), ["a"] * 3 + ["b"] * 3)
    assert same.tolist() == [0.0] * 6
    one_group = sample_advantages(torch.tensor([0.1, 0.1, 0.1, -1.0, 1.0]), ["a", "a", "a", "b", "b"])
    assert one_group[:3].tolist() == [0.0] * 3
    assert sample_advantages(torch.tensor([0.4]), ["a"]).tolist() == [0.0]


def test_sample_advantages_are_clipped() -> None:
    scores = torch.tensor([-1.0] + [1.0] * 19)
    assert sample_advantages(scores, ["a"] * 20)[0].item() == -1.0


def test_blame_two_by_two() -> None:
    """Signed R = (1, 0; 1, -1): blame (0, 1; 0, 2), mean 3/4, normalised (0, 4/3; 0, 8/3), with uniform in equal
    parts (1/2, 7/6; 1/2, 11/6). A = -0.6 gives (-0.3, -0.7; -0.3, -1.1 -> -1)."""
    reward = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    expected = torch.tensor([[-0.3, -0.7], [-0.3, -1.0]])
    torch.testing.assert_close(spread_by_blame(-0.6, reward), expected)
    torch.testing.assert_close(spread_by_blame(-0.6, (reward + 1) / 2), expected)


@pytest.mark.parametrize(("advantage", "reward"), [(0.7, [[1.0, -1.0]]), (-0.7, [[1.0, 1.0]]), (-0.7, [[-0.2, -0.2]])])
def test_praise_and_undivided_blame_are_uniform(advantage: float, reward: list[list[float]]) -> None:
    spread = spread_by_blame(advantage, torch.tensor(reward))
    torch.testing.assert_close(spread, torch.full((1, 2), advantage))


def test_spreading_keeps_the_mean_where_nothing_is_clipped() -> None:
    reward = torch.tensor([[0.9, -0.5], [0.1, 0.4]])
    assert spread_by_blame(-0.3, reward).mean().item() == pytest.approx(-0.3)
