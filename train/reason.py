"""The Reason stage of a policy's step: groups of plans and images, what they are worth, and what is learned of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srum.config import fixed_fields
from srum.drawing.chains import asked, planned
from srum.models.base import (
    Ability,
    Decoding,
    Exploration,
    Generated,
    Sampling,
    Segment,
    UnifiedModel,
    Written,
    require,
)
from srum.records import Prompt
from srum.run import Run
from srum.seeding import seed_for
from srum.stages.rollout import round_prompts
from srum.train.advantages import sample_advantages, spread_by_blame
from srum.train.examples import Example, draw_order, generator_for
from srum.train.online import (
    Learned,
    OnlineSource,
    Played,
    Player,
    example_of,
    learned_noised,
    learned_steps,
    learned_text,
)
from srum.train.policy import group_advantages, zero_spread
from srum.train.reinforced import PolicyConfig, steps_in
from srum.train.rewards import Reward, Value, reward_of


def source_of(run: Run, k: int, config: PolicyConfig, player: Callable[..., Player]) -> OnlineSource:
    """The steps that ``player`` (made as ``Reason`` is) plays, of the prompts of round ``k``.

    Raises MissingAbility for a model that cannot do what it takes.
    """
    prompts = round_prompts(run.config, k)

    def make(model: UnifiedModel) -> Player:
        needs = {"explore"} if config.images_by == "steps" else set[Ability]()
        require(model, needs | ({"plan"} if config.rollout.plan else set()), f"the method {config.method}")
        reward = reward_of(config.value, run, k, config)
        second = None if config.second == "none" else reward_of(config.second, run, k, config)
        return player(model, reward, prompts, config, run.seed(k, "online"), second)

    return OnlineSource(make, prompts, json.dumps(fixed_fields(config)), config.updates, config.minibatches)


@dataclass(frozen=True)
class Drawn:
    """What a step has drawn, by groups."""

    prompts: Sequence[Prompt]
    plans: Sequence[Written | None]
    images: Sequence[Generated]
    values: Sequence[Value]


class Groups:
    """Draws the groups of a policy's steps: ``candidates_per_prompt`` texts or images after one state, side by side.

    What a group shares: the noise that its images begin with, and which of their steps are random; with
    ``images_by: forward`` neither, or its images were all the same. Everything has a seed of ``seed``, the step, the
    purpose and its place.
    """

    def __init__(self, model: UnifiedModel, config: PolicyConfig, seed: int) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.size = config.candidates_per_prompt

    def texts(
        self, number: int, purpose: str, contexts: Sequence[Sequence[Segment]], decoding: Decoding
    ) -> list[Written]:
        """A text after each context, at temperature 1 and with all of its log-probabilities."""
        seeds = self.seeds(number, purpose, len(contexts))
        return [
            text
            for some in self.batches(len(contexts))
            for text in self.model.write(contexts[some], decoding, seeds[some])
        ]

    def images(
        self,
        number: int,
        purpose: str,
        contexts: Sequence[Sequence[Segment]],
        sampling: Sampling,
        level: float,
        span: tuple[float, float],
        places: Sequence[int] | None = None,
    ) -> list[Generated]:
        """An image after each context, with random steps of ``level`` in the ``span`` of its steps, as fractions; with
        ``images_by: forward`` without.

        ``places`` of the contexts in their groups, where there is not one for each.
        """
        places = range(len(contexts)) if places is None else places
        if self.config.images_by == "forward":
            own = self.seeds(number, purpose, max(places) + 1)
            seeds = [own[place] for place in places]
            batches = self.batches(len(contexts))
            return [made for some in batches for made in self.model.draw(contexts[some], sampling, seeds[some])]
        noise, of_steps = (self.seeds(number, name, max(places) + 1) for name in (purpose, f"{purpose} steps"))
        first = [place - place % self.size if self.config.same_noise else place for place in places]
        made = list[Generated]()
        for some in self.batches(len(contexts)):
            explore = Exploration(
                self.config.noise_rule,
                level,
                [self.random_steps(number, purpose, place // self.size, sampling, span) for place in places[some]],
                [of_steps[place] for place in places[some]],
            )
            seeds = [noise[place] for place in first[some]]
            made += self.model.draw(contexts[some], sampling, seeds, explore=explore)
        return made

    def random_steps(
        self, number: int, purpose: str, group: int, sampling: Sampling, span: tuple[float, float]
    ) -> set[int]:
        """The numbers of a group's random steps."""
        steps = steps_in(span, sampling.timesteps)
        order = torch.randperm(len(steps), generator=generator_for(self.seed, number, purpose, group, "steps"))
        return {steps[int(place)] for place in order[: self.config.random_steps]}

    def seeds(self, number: int, purpose: str, count: int) -> list[int]:
        """Of what is drawn for ``purpose`` in a step, one by one."""
        return [seed_for(self.seed, number, purpose, place) for place in range(count)]

    def batches(self, count: int) -> list[slice]:
        """Slices of what one call draws; no result depends on them."""
        size = self.config.rollout.batch_size
        return [slice(start, start + size) for start in range(0, count, size)]


class Reason:
    """Plays steps of groups: of each prompt plans and images, and what they are worth.

    ``second``: what else is asked now and then what images are worth, and never rewarded.
    """

    cycle = 1  # steps, of which the first draws from prompts

    def __init__(
        self,
        model: UnifiedModel,
        reward: Reward,
        prompts: Sequence[Prompt],
        config: PolicyConfig,
        seed: int,
        second: Reward | None = None,
    ) -> None:
        self.model, self.reward, self.prompts, self.config, self.second = model, reward, prompts, config, second
        self.groups = Groups(model, config, seed)
        self.sampling = Sampling(**config.rollout.sampling())

    def play(self, number: int) -> Played:
        """What step ``number`` has drawn, compared."""
        return self.compared(number, self.draw(number))

    def draw(self, number: int) -> Drawn:
        """Plans and images of the step's prompts, by groups, and their values."""
        config, groups = self.config, self.groups
        chosen = draw_order(len(self.prompts), number * config.groups, (number + 1) * config.groups, groups.seed)
        prompts = [self.prompts[place] for _, place in chosen for _ in range(groups.size)]
        plans: list[Written | None] = [None] * len(prompts)
        if planning := config.rollout.planned(config.groups) * groups.size:
            decoding = Decoding(max_tokens=config.text_limit, temperature=1.0)
            after = [asked(self.model, prompt.text) for prompt in prompts[:planning]]
            plans[:planning] = groups.texts(number, "plan", after, decoding)
        contexts = [planned(self.model, prompt.text, plan) for prompt, plan in zip(prompts, plans, strict=True)]
        images = groups.images(number, "draw", contexts, self.sampling, config.noise_level, config.random_range)
        return Drawn(prompts, plans, images, self.reward([made.image for made in images], prompts))

    def compared(self, number: int, drawn: Drawn) -> Played:
        """The examples with their advantages, and the step's figures."""
        config = self.config
        owners = [place // self.groups.size for place in range(len(drawn.prompts))]
        values = [value.value for value in drawn.values]
        formed = [plan is None or (plan.ended and bool(plan.text.strip())) for plan in drawn.plans]
        worth = [None if v is None else f * (v + config.format_weight) for v, f in zip(values, formed, strict=True)]
        of_images = image_advantages(values, owners, config)
        of_texts = group_advantages(worth, owners, config.advantage)
        examples = [
            self.example(f"{number}-{place}", drawn, place, of_images[place], of_texts[place])
            for place in range(len(drawn.prompts))
        ]
        facts = figures(drawn.values, owners) | {"formed": mean(formed)} | self.looked_again(number, drawn)
        return Played(examples, facts)

    def looked_again(self, number: int, drawn: Drawn) -> dict[str, float]:
        """What the second opinion says of a step's images, every so many of these steps."""
        if self.second is None or number // self.cycle % self.config.second_every:
            return {}
        others = self.second([made.image for made in drawn.images], drawn.prompts)
        both = [
            (one.value, other.value)
            for one, other in zip(drawn.values, others, strict=True)
            if one.value is not None and other.value is not None
        ]
        if not both:
            return {"second_failed": 1.0}
        return {
            "second_failed": 1 - len(both) / len(others),
            "second_value": mean(other for _, other in both),
            "second_gap": mean(one - other for one, other in both),
            "second_agreement": mean((one >= 0.5) == (other >= 0.5) for one, other in both),
        }

    def example(self, name: str, drawn: Drawn, place: int, of_image: float, of_text: float) -> Example:
        """One plan and image, with their advantages."""
        prompt, plan = drawn.prompts[place].text, drawn.plans[place]
        image = self.learned_image(drawn.images[place], drawn.values[place], of_image)
        if plan is None or not self.config.learns_text:
            return example_of(name, planned(self.model, prompt, plan), image)
        text = learned_text(plan, of_text, Segment("text", ids=plan.ids, loss=True))
        return example_of(name, asked(self.model, prompt), text, image)

    def learned_image(self, made: Generated, value: Value, advantage: float) -> Learned:
        """What is learned of an image, as the config has it."""
        credit = cells(advantage, value, self.config)
        if self.config.images_by == "steps":
            return learned_steps(self.model, made, credit)
        return learned_noised(made, credit)


def image_advantages(rewards: Sequence[float | None], owners: Sequence[int], config: PolicyConfig) -> list[float]:
    """Of images in groups, as they are learned from: ``group_advantages``, or with ``images_by: forward`` those of
    region-NFT in [-1, 1]; 0 where there is no reward."""
    if config.images_by == "steps":
        return group_advantages(rewards, owners, config.advantage)
    known = {place: reward for place, reward in enumerate(rewards) if reward is not None}
    scaled = sample_advantages(list(known.values()), [owners[place] for place in known])
    of_places = dict(zip(known, scaled, strict=True))
    return [of_places.get(place, 0.0) for place in range(len(rewards))]


def cells(advantage: float, value: Value, config: PolicyConfig) -> Tensor:
    """An image's advantage, one for all of its cells, or spread over them (h, w) by blame."""
    if config.credit == "sample" or value.reward_map is None:
        return torch.tensor([advantage])
    return spread_by_blame(max(-1.0, min(1.0, advantage)), value.reward_map)


def figures(values: Sequence[Value], owners: Sequence[int]) -> dict[str, float]:
    """What is to be known of the values of a step, and of how many failed in which way."""
    known = [one.value for one in values if one.value is not None]
    kinds = Counter(one.failure for one in values if one.failure is not None)
    failures = {f"failed_{kind}": count / len(values) for kind, count in kinds.items()}
    of_values = {"value": mean(known), "right": mean(value >= 1 for value in known)}
    return of_values | spread([one.value for one in values], owners) | failures


def spread(rewards: Sequence[float | None], owners: Sequence[int]) -> dict[str, float]:
    """How many rewards failed, and how many groups have nothing to compare."""
    failed = mean(reward is None for reward in rewards)
    return {"failed_values": failed, "zero_spread_groups": zero_spread(rewards, owners) / len(set(owners))}


def mean(values: Iterable[float]) -> float:
    """Their mean; 0 of none."""
    known = list(values)
    return sum(known) / max(1, len(known))
