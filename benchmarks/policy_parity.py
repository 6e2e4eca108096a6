"""What ``benchmarks.parity`` compares in a folder with the layout of tests/golden/flow_grpo: functions, no network.

The README of that folder says which public code agrees with its numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import parity
from benchmarks.parity import Deviation, Facts, Tensors, equal
from srum import flow
from srum.drawing.chains import parse_reflection, template
from srum.models.bagel.sampler import guide
from srum.models.base import Sampling
from srum.train import policy
from srum.train.reinforced import PolicyConfig

RULES: tuple[flow.Rule, ...] = ("flow", "r3", "cps")
EXACT, SINGLE = 1e-12, 1e-5  # what float64 and float32 allow


def close(quantity: str, ours: Tensor | float, theirs: Any, tolerance: float, case: str = "") -> Deviation:
    """As ``parity.close``, numbers in float64."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs))
    return parity.close(quantity, a, b, tolerance, case)


def schedules(facts: Facts, _: Tensors) -> Iterator[Deviation]:
    for case in facts:
        times = flow.shift_timestep(torch.linspace(1, 0, case["points"], dtype=torch.float64), case["shift"])
        for step in case["steps"]:
            name = f"{case['points']} points, shift {case['shift']}, step {step['step']}"
            k = step["step"]
            yield close("timesteps", times[k], step["t"], EXACT, name)
            for rule in RULES:
                made = flow.transition(step["t"], step["t_next"], rule, case["noise_level"])
                for quantity, ours in (("std", made.std), ("mean_x", made.of_x), ("mean_v", made.of_v)):
                    yield close(f"{rule} {quantity}", ours, step[f"{rule}_{quantity}"], EXACT, name)


def steps(facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    for case in facts["cases"]:
        noise = numbers[f"{case['name']}/noise"]
        for step in case["steps"]:
            at = f"{case['name']}/{step['step']}"
            x, v, v_ref = (numbers[f"{at}/{name}"] for name in ("x", "v", "v_ref"))
            for row in step["rules"]:
                name = f"{at}/{row['rule']}-{row['noise_level']}"
                made = flow.transition(step["t"], step["t_next"], row["rule"], row["noise_level"])
                yield from _step(made, row, name, (x, v, v_ref, noise), numbers)


def _step(
    made: flow.Transition, row: Mapping[str, Any], name: str, given: tuple[Tensor, ...], numbers: Tensors
) -> Iterator[Deviation]:
    x, v, v_ref, noise = given
    v = v.clone().requires_grad_()
    mean = made.mean(x, v)
    yield close("mean", mean.detach(), numbers[f"{name}/mean"], EXACT, name)
    yield close("std", made.std, row["std"], EXACT, name)
    if row["logprob_mean"] is None:
        if f"{name}/next" in numbers:
            yield close("next", mean.detach(), numbers[f"{name}/next"], EXACT, name)
        return
    following = numbers[f"{name}/next"]
    yield close("next", mean.detach() + made.std * noise, following, EXACT, name)
    logprob = flow.log_density(following, mean, made.std)
    logprob.mean().backward()
    assert v.grad is not None
    yield close("gradient of the log-probability", v.grad, numbers[f"{name}/grad_v_of_logprob_mean"], 1e-10, name)
    yield close("log-probability", logprob.detach().mean(), row["logprob_mean"], EXACT, name)
    yield close("log-probability, sum", logprob.detach().sum(), row["logprob_sum"], 1e-10, name)
    quadratic = -made.precision * (v.detach() - made.velocity_to(x, following)).square().mean()
    yield close("log-probability, quadratic part", quadratic, row["logprob_mean_quadratic"], EXACT, name)
    of_ref = flow.log_density(following, made.mean(x, v_ref), made.std).mean()
    yield close("log-probability of the reference", of_ref, row["logprob_mean_of_ref"], EXACT, name)
    yield close("KL", made.kl(v.detach(), v_ref).mean(), row["kl_mean"], EXACT, name)


def law(facts: Facts, _: Tensors) -> Iterator[Deviation]:
    """Gaussian data, whose velocity is affine in x, through every step: mean and variance, exactly."""
    m, sd = facts["data_mean"], facts["data_std"]
    for case in facts["results"]:
        name = f"{case['points']} points, shift {case['shift']}, {case['rule']}, steps {case['sde_steps']}"
        times = flow.shift_timestep(torch.linspace(1, 0, case["points"], dtype=torch.float64), case["shift"]).tolist()
        mean, variance = 0.0, 1.0
        for k, (t, s) in enumerate(pairwise(times)):
            chosen = case["sde_steps"] == "all" or k in case["sde_steps"]
            random = case["rule"] != "ode" and chosen
            made = flow.transition(t, s, case["rule"] if random else "flow", case["noise_level"] if random else 0.0)
            slope = (t - (1 - t) * sd**2) / (t**2 + (1 - t) ** 2 * sd**2)  # v(x) = slope (x - (1 - t) m) - m
            factor = made.of_x + made.of_v * slope
            mean = factor * mean + made.of_v * (-slope * (1 - t) * m - m)
            variance = factor**2 * variance + made.std**2
        yield close("mean of the law", mean, case["mean"], 1e-10, name)
        yield close("variance of the law", variance, case["variance"], 1e-10, name)


def guided(facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    for case in facts:
        at = str(case["case"])
        sampling = Sampling(guidance=case["text_scale"], image_guidance=case["image_scale"], renorm=case["renorm"])
        made = flow.transition(case["t"], case["t_next"], case["rule"], case["noise_level"])
        x, noise = numbers[f"{at}/x"], numbers[f"{at}/noise"]
        branches = numbers[f"{at}/branches"].requires_grad_()
        owner = torch.zeros(branches.shape[1], dtype=torch.long)
        v = guide(branches, owner, sampling)
        mean = made.mean(x, v)
        yield close("guided velocity", v.detach(), numbers[f"{at}/velocity"], 1e-7, at)
        yield close("guided mean", mean.detach(), numbers[f"{at}/mean"], 1e-7, at)
        yield close("guided next", mean.detach() + made.std * noise, numbers[f"{at}/next"], 1e-7, at)
        logprob = flow.log_density(numbers[f"{at}/next"], mean, made.std).mean()
        yield close("guided log-probability", logprob.detach(), case["logprob_mean"], 1e-7, at)
        (gradient,) = torch.autograd.grad(logprob, branches)
        yield close("gradient in all branches", gradient, numbers[f"{at}/grad_all_branches"], 1e-6, at)
        held = torch.stack([branches[0], *(branch.detach() for branch in branches[1:])])
        logprob = flow.log_density(numbers[f"{at}/next"], made.mean(x, guide(held, owner, sampling)), made.std).mean()
        (gradient,) = torch.autograd.grad(logprob, branches)
        yield close("gradient in the condition", gradient[0], numbers[f"{at}/grad_conditional_only"], 1e-6, at)


def bagel_step(facts: Facts, numbers: Tensors, folder: Path) -> Iterator[Deviation]:
    source = load_file(folder / facts["source"])
    for row in facts["steps"]:
        name = f"{row['step']}/{row['rule']}"
        made = flow.transition(row["t"], row["t_next"], row["rule"], row["noise_level"])
        x, v = (source[f"{facts['case']}/{which}"][row["step"]] for which in ("x_t", "v_t"))
        following = made.mean(x, v) + made.std * numbers[f"{row['step']}/noise"]
        yield close("next", following, numbers[f"{name}/next"], SINGLE, name)
        yield close("std", made.std, row["std"], SINGLE, name)
        if row["logprob_mean"] is not None:
            logprob = flow.log_density(following, made.mean(x, v), made.std).mean()
            yield close("log-probability", logprob, row["logprob_mean"], SINGLE, name)


def advantages(facts: Facts, _: Tensors) -> Iterator[Deviation]:
    for case in facts:
        rewards, groups = case["rewards"], case["group"]
        for how in ("centred", "group_std", "batch_std"):
            ours = torch.tensor(policy.group_advantages(rewards, groups, how), dtype=torch.float64)
            theirs = torch.tensor(case[how], dtype=torch.float64).clamp(-5, 5)
            yield close(f"advantages, {how}", ours, theirs, EXACT, case["name"])
        yield equal(
            "groups without spread", policy.zero_spread(rewards, groups), case["zero_spread_groups"], case["name"]
        )


def guarded(log_ratios: Tensor, squared_shift: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's log-ratio: (l_new - l_old) std + |mean_new - mean_old|^2 / (2 std).

    The expected log-ratio of a moved mean is -|shift|^2 / (2 std^2), below zero, so that clipping acts on one side
    alone; this takes it away and evens the steps. ``squared_shift`` is the mean over elements.
    """
    return log_ratios * std + squared_shift / (2 * std)


def policies(facts: Facts, _: Tensors) -> Iterator[Deviation]:
    old, new, ref, advantage = (
        torch.tensor(facts[name], dtype=torch.float64)
        for name in ("old_logprob", "new_logprob", "ref_logprob", "advantage")
    )
    lengths = torch.tensor(facts["lengths"])
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    yield close("ratio", policy.log_ratio(new, old).exp(), _doubles(facts["ratio"]), EXACT)
    new.requires_grad_()
    distance = policy.k3(new, ref)
    yield close("k3", distance.detach(), _doubles(facts["k3"]), EXACT)
    yield close("gradient of k3", torch.autograd.grad(distance.sum(), new)[0], _doubles(facts["k3_grad"]), EXACT)
    for case in facts["clips"]:
        name = f"{case['low']} to {case['high']}"
        yield from _clip(case, name, (new, old, advantage), owner)
    logits, tokens = _doubles(facts["text"]["logits"]), torch.tensor(facts["text"]["tokens"])
    raw = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    yield close("log-probability of text", raw, _doubles(facts["text"]["logprob_raw"]), EXACT)
    tempered = (logits / facts["text"]["temperature"]).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    yield close("log-probability at a temperature", tempered, _doubles(facts["text"]["logprob_tempered"]), EXACT)
    for case in facts["image_guard"]:
        ratio, shift, std = (
            torch.tensor(case[key], dtype=torch.float64)
            for key in ("log_ratio", "mean_square_of_mean_difference", "std")
        )
        yield close("guarded log-ratio", guarded(ratio, shift, std), case["guarded_log_ratio"], EXACT)


def _clip(
    case: Mapping[str, Any], name: str, given: tuple[Tensor, Tensor, Tensor], owner: Tensor
) -> Iterator[Deviation]:
    new, old, advantage = given
    ratios = policy.log_ratio(new, old)
    terms = policy.clipped_terms(ratios, advantage, case["low"], case["high"])
    gradient = torch.autograd.grad(terms.sum(), new, retain_graph=True)[0]
    yield close("clipped loss", terms.detach(), _doubles(case["loss"]), EXACT, name)
    yield close("gradient of the clipped loss", gradient, _doubles(case["grad_of_sum"]), EXACT, name)
    share = policy.clipped(ratios.detach(), advantage, case["low"], case["high"]).mean()
    yield close("share clipped", share, case["clipped_fraction"], EXACT, name)
    yield close("token mean", terms.detach().mean(), case["token_mean"], EXACT, name)
    first = torch.tensor([int((owner == i).nonzero()[0]) for i in range(int(owner.max()) + 1)])
    of_sequences = policy.mean_by(terms.detach(), owner)[first]
    yield close("mean over sequences", of_sequences.mean(), case["sequence_mean_of_token_mean"], EXACT, name)
    whole = policy.mean_by(ratios, owner)
    yield close("ratio of sequences", whole.detach().exp()[first], _doubles(case["sequence_ratio"]), EXACT, name)
    terms = policy.clipped_terms(whole, advantage, case["low"], case["high"])
    yield close("loss of sequences", terms.detach()[first], _doubles(case["sequence_loss"]), EXACT, name)
    gradient = torch.autograd.grad(policy.mean_by(terms, owner)[first].mean(), new)[0]
    yield close("gradient of sequences", gradient, _doubles(case["sequence_grad"]), EXACT, name)


def stages(facts: Facts, _: Tensors) -> Iterator[Deviation]:
    for number, case in enumerate(facts["reflect_refine"]):
        for reading in ("paper", "released", "ours"):
            made = policy.stage_rewards(
                case["v_before"], case["v_after"], case["stop"], bool(case["format"]), reading, facts["format_weight"]
            )
            yield equal(
                "rewards of a refinement", made, (case[f"c_{reading}"], case[f"reflection_{reading}"]), f"{number}"
            )
    for number, case in enumerate(facts["reason"]):
        f = case["format"]
        yield close("reward of a plan, paper", case["v"] + f, case["text_paper"], EXACT, f"{number}")
        yield close("reward of a plan, released", f * (case["v"] + 1), case["text_released"], EXACT, f"{number}")


def replay(facts: Facts, _: Tensors) -> Iterator[Deviation]:
    for case in facts:
        for how in ("stratified", "gap", "spread"):
            ours = policy.state_probabilities(case["v"], case["group"], how, case["rho"])
            yield close(f"states, {how}", _doubles(ours), _doubles(case[how]), EXACT, case["name"])


def replies(facts: Facts, _: Tensors) -> Iterator[Deviation]:
    released = template("released")
    for case in facts["reflection"]:
        made = parse_reflection(case["reply"], released, ended=not case["hit_token_limit"])
        ours = {name: getattr(made, name) for name in case["ours"]}
        yield equal("reflections", ours, case["ours"], case["reply"])
    for case in facts["reason"]:
        yield equal(
            "format of plans", released.plan_is_formed(case["reply"]), bool(case["released_format"]), case["reply"]
        )


def sensitivity(facts: Facts, _: Tensors) -> Iterator[Deviation]:
    """Our clip range lies above the noise of a bfloat16 velocity."""
    noise = max(abs(case["velocity_in_bf16"]) for case in facts)
    yield Deviation("noise of a bfloat16 velocity", "", noise, PolicyConfig.model_fields["image_clip"].default)


def _doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


Check = Callable[..., Iterable[Deviation]]
JSON, BOTH = (".json",), (".json", ".safetensors")
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "schedule": (schedules, JSON),
    "sde": (steps, BOTH),
    "law": (law, JSON),
    "guided": (guided, BOTH),
    "bagel_step": (bagel_step, BOTH),
    "advantages": (advantages, JSON),
    "policy": (policies, JSON),
    "stages": (stages, JSON),
    "replay": (replay, JSON),
    "replies": (replies, JSON),
    "sensitivity": (sensitivity, JSON),
}  # fmt: skip


def compare(folder: Path, fixture: str) -> list[Deviation]:
    """All comparisons of a fixture, and a miss for each tensor of its file that none of them used."""
    check, suffixes = CHECKS[fixture]
    facts = json.loads((folder / f"{fixture}.json").read_text())
    numbers = Tensors(folder / f"{fixture}.safetensors") if ".safetensors" in suffixes else None
    deviations = list(check(facts, numbers, *([folder] if check is bagel_step else [])))
    unread = sorted(numbers.unread) if numbers is not None else []
    return deviations + [Deviation("compared with nothing", name, math.inf, 0.0) for name in unread]
