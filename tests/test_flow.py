"""Laws of the path and the sampler's schedule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from srum.flow import (
    Rule,
    euler_step,
    interpolate,
    log_density,
    sample_timesteps,
    schedule,
    shift_timestep,
    transition,
    velocity_target,
)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    return clean, noise


def test_path_runs_from_clean_to_noise() -> None:
    clean, noise = pair()
    assert torch.equal(interpolate(clean, noise, 0.0), clean)
    assert torch.equal(interpolate(clean, noise, 1.0), noise)
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)[:, None]
    assert torch.equal(interpolate(clean, noise, t)[2], (clean[2] + noise[2]) / 2)


def test_velocity_is_the_derivative_of_the_path() -> None:
    clean, noise = pair()
    _, slope = torch.func.jvp(
        lambda t: interpolate(clean, noise, t), (torch.tensor(0.3).double(),), (torch.tensor(1.0).double(),)
    )
    torch.testing.assert_close(slope, velocity_target(clean, noise))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_along_the_true_velocity_gives_the_clean_latent(shift: float) -> None:
    """The path is straight, so that any schedule from 1 to 0 integrates it exactly."""
    clean, noise = pair()
    times = schedule(7, shift).double()
    x = noise
    for now, following in pairwise(times):
        x = euler_step(x, velocity_target(clean, noise), following - now)
    torch.testing.assert_close(x, clean)


def test_shift_and_schedule() -> None:
    """s = 3: t = 1/2 -> 3/2 / (1 + 1) = 3/4."""
    assert schedule(3, 1.0).tolist() == [1.0, 0.5, 0.0]
    assert schedule(3, 3.0).tolist() == [1.0, 0.75, 0.0]
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_timestep(shift_timestep(t, 4.0), 0.25), t)


def test_sampled_timesteps() -> None:
    """The median of sigmoid(z) is 1/2, and a monotone shift moves it to s / (1 + s): 3/4 at s = 3."""
    draws = sample_timesteps(4001, 3.0, torch.Generator().manual_seed(1))
    assert ((draws > 0) & (draws < 1)).all()
    assert draws.median().item() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(draws, sample_timesteps(4001, 3.0, torch.Generator().manual_seed(1)))


RULES: tuple[Rule, ...] = ("flow", "r3", "constant", "cps")


@pytest.mark.parametrize("rule", RULES[:3])
def test_without_noise_a_random_step_is_the_euler_step_bit_for_bit(rule: Rule) -> None:
    x, v = (tensor.float() for tensor in pair())
    for t, s in pairwise(schedule(16, 5.0).tolist()):
        step = transition(t, s, rule, 0.0)
        assert step.std == 0 and torch.equal(step.mean(x, v), euler_step(x, v, s - t))


@pytest.mark.parametrize("rule", RULES)
def test_the_log_density_of_a_step_is_a_squared_error_of_the_velocity(rule: Rule) -> None:
    """log N(x_s; mean(v), std^2) - log N(x_s; x_s, std^2) = -precision |v - u|^2, u the velocity that leads to x_s."""
    x, v = pair()
    step = transition(0.9, 0.8, rule, 0.5)
    reached = step.mean(x, v) + step.std * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    difference = log_density(reached, step.mean(x, v), step.std) - log_density(reached, reached, step.std)
    torch.testing.assert_close(difference, -step.precision * (v - step.velocity_to(x, reached)).square())
    assert torch.equal(step.kl(v, v), torch.zeros_like(v))


def test_the_velocity_that_leads_there_leads_there() -> None:
    x, there = pair()
    step = transition(1.0, 0.95, "flow", 0.7)
    torch.testing.assert_close(step.mean(x, step.velocity_to(x, there)), there)


def test_the_noise_level_at_which_a_step_would_turn_around_is_refused() -> None:
    """At t = 1 of rule flow the pull is a^2 / 2: 1 at a = sqrt(2)."""
    assert transition(1.0, 0.95, "flow", 1.41).of_x > 0
    with pytest.raises(ValueError, match="too high"):
        transition(1.0, 0.95, "flow", 1.42)
