"""How much of a policy's gradient is signal: what is learned from some prompts' images, held against those of others.

    python -m benchmarks.signal --out runs/signal --draw random_steps=3 --rule train.lr=1e-5 --rule train.lr=1e-4 ...

Plans and images of ``srum-tiny`` with random steps are drawn once, in groups of eight as Flow-GRPO draws them, judged,
and kept in OUT. Each ``--rule`` is a way to learn from them (fields of the method's config; ``only=0,2``: from these
random steps alone): it is trained on the images of every other prompt, held against those of the others, and the other
way round. Nothing is drawn again: of an image with advantage A and a log-ratio l, the sum over all that was drawn of it

    gain = mean of A l n / (n - 1)        what the reward gains to first order
    KL                                    nats of an image (w |v - v_entered|^2), or of its plan (k3), their mean
    efficiency = gain / sqrt(2 KL)        at most the reward's deviation within groups, and 0 for a step at random

once of its random steps and once of its plan. Points of reward (V times 100); ±: standard error, over prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.table import Table

from benchmarks.reinforce import GROUP, SMALL
from srum.config import EvalConfig, load_config
from srum.evaluation import accuracy
from srum.flow import Transition
from srum.models.base import Generated, RandomStep, Written
from srum.processes import Processes
from srum.run import Run, console, load_model
from srum.shapes.checker import is_right
from srum.shapes.prompts import prompt_set
from srum.stages.rollout import round_prompts
from srum.train import lora
from srum.train.examples import Example
from srum.train.methods.flow_grpo import FlowGrpo, FlowGrpoConfig
from srum.train.online import OnlineFeed, Played
from srum.train.packs import Sample, make_pack
from srum.train.policy import group_advantages, k3, zero_spread
from srum.train.reason import Drawn, Reason
from srum.train.rewards import Value, reward_of
from srum.train.trainer import Trainer
from srum.train.weights import trainable_parameters

DRAWN = {"unguided": {"guidance": 1.0, "timesteps": 10}, "guided": {}}  # as policies draw, as the evaluation does
BATCH = 64  # images that are drawn at a time, and that a pack of the held-out half has
START = ("method=flow_grpo", *SMALL, "train.batch_size=32", "train.trainable=generation", "kl=0", "image_clip=1")
# nothing is clipped: what is stored is of the weights that entered, not of the moment as in a training


@dataclass(frozen=True)
class Made:
    """What was drawn of a prompt, named by its place among the run's: a plan, random steps; and what it is worth."""

    prompt: int
    plan: Written | None
    steps: tuple[RandomStep, ...]
    value: Value


KEPT: list[Any] = [Made, RandomStep, Transition, Value, Written]


def config_of(overrides: Sequence[str], prompts: int, steps: int = 1) -> FlowGrpoConfig:
    """Flow-GRPO's."""
    config = load_config(None, [*START, *overrides, f"prompt_count={prompts}", f"train.steps={steps}"])
    assert isinstance(config, FlowGrpoConfig)
    return config


def bank(folder: Path, overrides: Sequence[str], prompts: int) -> list[Made]:
    """Groups of images one after the other, drawn or read."""
    path = folder / f"{hashlib.sha256(repr((overrides, prompts)).encode()).hexdigest()[:12]}.pt"
    if path.exists():
        with torch.serialization.safe_globals(KEPT):
            return list(torch.load(path, weights_only=True))
    config = config_of([*overrides, f"train.batch_size={BATCH}"], prompts)
    reward = reward_of(config.value, Run(folder, config), 0, config)
    player = Reason(load_model(config, config.model), reward, round_prompts(config, 0), config, 0)
    places, made = {prompt.id: place for place, prompt in enumerate(player.prompts)}, list[Made]()
    for number in range(prompts * GROUP // BATCH):
        some = player.draw(number)
        made += [
            Made(places[prompt.id], plan, image.steps, value)
            for prompt, plan, image, value in zip(some.prompts, some.plans, some.images, some.values, strict=True)
        ]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(made, path)
    return made


class Stored(Reason):
    """Plays what was drawn, ``train.batch_size`` images at a time; of the random steps ``only`` these, if any."""

    def __init__(self, model: Any, config: FlowGrpoConfig, made: Sequence[Made], only: Sequence[int]) -> None:
        none: Any = None  # nothing is judged
        super().__init__(model, none, round_prompts(config, 0), config, 0)
        self.made, self.only = made, only

    def play(self, number: int) -> Played:
        """The batches in turn."""
        size = self.config.train.batch_size
        start = number * size % len(self.made)
        return Played(self.examples(self.made[start : start + size]), {})

    def examples(self, made: Sequence[Made]) -> Sequence[Example]:
        """With their advantages."""
        steps = [tuple(s for n, s in enumerate(one.steps) if not self.only or n in self.only) for one in made]
        none: Any = None
        images = [Generated(none, none, steps=own) for own in steps]
        drawn = Drawn([self.prompts[m.prompt] for m in made], [m.plan for m in made], images, [m.value for m in made])
        return self.compared(0, drawn).examples


def advantages(made: Sequence[Made]) -> list[float]:
    """Centred, whatever the rule learns by."""
    return group_advantages([one.value.value for one in made], owners(made))


def owners(made: Sequence[Made]) -> list[int]:
    """The group of each."""
    return [place // GROUP for place in range(len(made))]


# --- a rule


@dataclass(frozen=True)
class Found:
    """What a rule has given on prompts that it was not trained on: the gain of each in points, their KL in nats."""

    gains: list[float]
    kl: list[float]

    def cells(self) -> tuple[str, ...]:
        """The gain, KL and efficiency, with standard errors."""
        gain, error = fmean(self.gains), stdev(self.gains) / math.sqrt(len(self.gains))
        length = math.sqrt(2 * fmean(self.kl)) or math.inf
        kl = f"{fmean(self.kl):.4f}"
        return f"{gain:+.2f}", f"{error:.2f}", kl, f"{gain / length:+.2f}", f"{error / length:.2f}"


def found(made: Sequence[Made], overrides: Sequence[str]) -> dict[str, Found]:
    """A rule, trained on one half of the prompts and held against the other, both ways: of images and of plans."""
    halves = [[one for place, one in enumerate(made) if place // GROUP % 2 == half] for half in (0, 1)]
    results: dict[str, Found] = {}
    for ours, others in (halves, halves[::-1]):
        learned, player = learn(ours, overrides, len(made) // GROUP)
        entered, player.only = load_model(player.config, player.config.model), ()
        for name, pairs in moved(learned, entered, player.examples(others)).items():
            worth = [100 * a * ratio / (GROUP - 1) for a, (ratio, _) in zip(advantages(others), pairs, strict=True)]
            gains = [sum(worth[place : place + GROUP]) for place in range(0, len(worth), GROUP)]
            before = results.get(name, Found([], []))
            results[name] = Found(before.gains + gains, before.kl + [kl for _, kl in pairs])
    return results


def learn(made: Sequence[Made], overrides: Sequence[str], prompts: int) -> tuple[Any, Stored]:
    """The model after one pass over what was made, and what laid it out."""
    only = [int(n) for o in overrides if o.startswith("only=") for n in o.removeprefix("only=").split(",")]
    fields = [override for override in overrides if not override.startswith("only=")]
    first = config_of(fields, prompts)
    config = config_of(fields, prompts, len(made) // first.train.batch_size * first.updates)
    model: Any = load_model(config, config.model)
    player = Stored(model, config, made, only)
    with ExitStack() as stack:
        names = list(stack.enter_context(trainable_parameters(model, config.train.trainable)))
        if config.train.lora.rank:
            names = stack.enter_context(lora.adapted(model, names, config.train.lora))
        feed = OnlineFeed(model, player, config.train, config.seed, Processes(), config.updates)
        trainer = Trainer(model, feed, FlowGrpo().objective(config), config.train, 0, names)
        for number in range(config.train.steps):
            trainer.step(number)
        trainer.settle()
    return model, player


@torch.no_grad()
def moved(learned: Any, entered: Any, examples: Sequence[Example]) -> dict[str, list[tuple[float, float]]]:
    """Of each example its log-ratio and its KL, sums over all elements of its random steps and tokens of its plan."""
    found: dict[str, list[tuple[float, float]]] = {"images": [], "plans": []}
    for start in range(0, len(examples), BATCH):
        some = [Sample(example, example.segments, []) for example in examples[start : start + BATCH]]
        pack = make_pack(learned, some)
        new, old = learned.forward(pack.packed), entered.forward(pack.packed)
        images, texts = pack.image_draws(new), pack.text_draws(new)
        assert images is not None and texts is not None
        weight = images.precision * new.velocity.shape[-1]
        of_images = weight * (old.image_error - new.image_error), weight * new.distance(old).drift
        of_texts = (
            texts.precision * (old.text_error - new.text_error),
            texts.precision * k3(-new.text_error, -old.text_error),
        )
        for name, values, owner in (
            ("images", of_images, pack.image.sample[new.image_segment]),
            ("plans", of_texts, pack.text.sample[new.text_segment]),
        ):
            sums = [torch.zeros(len(some)).index_add(0, owner, value).tolist() for value in values]
            found[name] += zip(*sums, strict=True)
    return {name: pairs for name, pairs in found.items() if any(kl for _, kl in pairs)}


# --- what comes of it


def verdicts(model: Any, count: int, settings: Mapping[str, Any]) -> list[bool]:
    """Of so many development prompts which are right."""
    prompts, right = prompt_set("development", count), list[bool]()
    for start in range(0, count, BATCH):
        some = {prompt.id: prompt for prompt in prompts[start : start + BATCH]}
        made = accuracy.drawn(model, some, EvalConfig(**settings), 0)
        right += [is_right(m.image, p.metadata) for m, p in zip(made, some.values(), strict=True)]
    return right


def tell_outcomes(made: Sequence[Made], rules: Sequence[Sequence[str]], count: int) -> None:
    """Of development prompts what is right before and after learning from all images, and the difference."""
    entered: Any = load_model(config_of([], 1), "srum-tiny")
    before = {name: verdicts(entered, count, settings) for name, settings in DRAWN.items()}
    table = Table("rule", "drawn", "before, %", "after", "difference, points", "±")
    for rule in rules:
        model, _ = learn(made, rule, len(made) // GROUP)
        for name, settings in DRAWN.items():
            after = verdicts(model, count, settings)
            change = [100 * (a - b) for a, b in zip(after, before[name], strict=True)]
            error = stdev(change) / math.sqrt(count)
            shares = (f"{100 * fmean(own):.1f}" for own in (before[name], after))
            table.add_row(" ".join(rule), name, *shares, f"{fmean(change):+.1f}", f"{error:.1f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what is not there yet, learn, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/signal"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--draw", nargs="*", default=[], metavar="A=VALUE", help="of how the images are drawn")
    parser.add_argument("--rule", nargs="*", action="append", default=[], metavar="A=VALUE", help="to learn by")
    parser.add_argument("--outcome", type=int, default=0, help="instead: development prompts to draw after learning")
    options = parser.parse_args(arguments)
    if options.prompts % (BATCH // GROUP):
        parser.error(
            f"--prompts: {options.prompts} is no multiple of {BATCH // GROUP}, the groups that are drawn at a time"
        )
    made = bank(options.out, options.draw, options.prompts)
    if options.outcome:
        tell_outcomes(made, options.rule, options.outcome)
        return
    values = [one.value.value for one in made]
    known, equal = [v for v in values if v is not None], zero_spread(values, owners(made)) / options.prompts
    title = f"{len(made)} images, V {fmean(known):.3f}, {100 * stdev(advantages(made)):.1f} within groups"
    table = Table(
        "rule", "of", "gain", "±", "KL", "efficiency", "±", "s", title=f"{title}, {equal:.0%} of these without spread"
    )
    for rule in options.rule:
        start = time.process_time()
        for name, one in found(made, rule).items():
            table.add_row(" ".join(rule), name, *one.cells(), f"{time.process_time() - start:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
