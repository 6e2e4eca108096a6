"""Training on what the weights of the moment draw: a source whose steps are played, then learned from.

A step draws (texts, images with random steps), asks what they are worth, and hands the trainer examples with
advantages. All else, optimiser, packs, sharding, checkpoints, metrics and resuming, is the trainer's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from srum.config import TrainConfig
from srum.models.base import Generated, Segment, UnifiedModel, Written
from srum.processes import Processes
from srum.records import Prompt
from srum.train.examples import Example, Sampled, draw_order, generator_for
from srum.train.feed import Step, own_packs, packed_step
from srum.train.packs import UNSAMPLED, Sample, draw


@dataclass(frozen=True)
class Played:
    """What a step has drawn, as examples, and what is to be known of it."""

    examples: Sequence[Example]
    facts: Mapping[str, float]


class Player(Protocol):
    """Draws the steps of a method."""

    def play(self, number: int) -> Played:
        """Step ``number``, with the weights of the moment."""
        ...


@dataclass(frozen=True)
class OnlineSource:
    """Steps played by what ``make`` makes for the model; each is learned from ``updates`` times, one of its
    ``minibatches`` at a time.

    ``prompts`` and ``settings`` are what they depend on, beside the weights.
    """

    make: Callable[[UnifiedModel], Player]
    prompts: Sequence[Prompt]
    settings: str
    updates: int = 1
    minibatches: int = 1

    def __str__(self) -> str:
        return f"what is drawn meanwhile of {len(self.prompts)} prompts"

    def digest(self) -> str:
        """Of the prompts and the settings."""
        texts = [(prompt.id, prompt.text) for prompt in self.prompts]
        return hashlib.sha256(repr((texts, self.settings, self.updates, self.minibatches)).encode()).hexdigest()

    def feed(self, model: UnifiedModel, config: TrainConfig, seed: int, processes: Processes) -> OnlineFeed:
        """The steps."""
        return OnlineFeed(model, self.make(model), config, seed, processes, self.updates, self.minibatches)


class OnlineFeed:
    """Plays a step and packs what it has drawn: what has a log-probability as it was drawn, other images noised by
    ``seed``, the step and their id, so that each update sees other noise."""

    draws = True

    def __init__(
        self,
        model: UnifiedModel,
        player: Player,
        config: TrainConfig,
        seed: int,
        processes: Processes,
        updates: int,
        minibatches: int = 1,
    ) -> None:
        self.model, self.player, self.config, self.seed = model, player, config, seed
        self.processes, self.updates, self.minibatches = processes, updates, minibatches
        self._played: tuple[int, Played] | None = None

    def step(self, number: int) -> Step:
        """Step ``number``; every ``updates``-th is played, those after it learn from the same, a minibatch each."""
        rollout = number // self.updates
        if self._played is None or self._played[0] != rollout:
            self._played = rollout, self.player.play(rollout)
        played, examples = self._played[1], self.minibatch(number)
        lengths = [self.model.length(example.segments) for example in examples]
        packs = own_packs(lengths, self.config.memory.pack_tokens, self.processes)
        own = [([self.draw(number, examples[place]) for place in members], counted) for members, counted in packs]
        return packed_step(self.model, own, examples, self.processes, played.facts)

    def minibatch(self, number: int) -> Sequence[Example]:
        """The examples of step ``number``: all in turn, shuffled anew each time round."""
        assert self._played is not None
        rollout, played = self._played
        count, part = len(played.examples), number % self.updates
        parts = min(self.minibatches, count)
        if parts < 2:
            return played.examples
        start, stop = part * count // parts, (part + 1) * count // parts
        order = draw_order(count, start, stop, self.seed, f"minibatches {rollout}")
        return [played.examples[place] for _, place in order]

    def draw(self, number: int, example: Example) -> Sample:
        """With its dropout, timesteps and noise of update ``number``."""
        return draw(self.model, example, self.config, generator_for(self.seed, number, example.id))

    def compared(self) -> Mapping[str, Iterator[Step]]:
        """Nothing."""
        return {}

    def validation(self) -> Iterator[Step]:
        """Nothing is held out: the evaluation is what tells."""
        return iter(())


# --- what was drawn, as segments of an example


@dataclass(frozen=True)
class Learned:
    """Segments with a loss, and of each its credit and how it was drawn."""

    segments: Sequence[Segment]
    credit: Sequence[Tensor]
    sampled: Sequence[Sampled]


def learned_text(written: Written, advantage: float, segment: Segment) -> Learned:
    """A text with its end, where it ended by itself; ``segment`` says what else is true of it."""
    count = len(written.ids)
    logprob, chosen = torch.zeros(count + 1), torch.zeros(count + 1)
    logprob[: len(written.logprobs)], chosen[: len(written.logprobs)] = written.logprobs, 1.0
    return Learned([segment], [advantage * chosen], [Sampled(logprob, chosen)])


def learned_steps(model: UnifiedModel, made: Generated, credit: Tensor) -> Learned:
    """The random steps to an image, each as a state and the velocity that would have led where it led: the squared
    error from that is, times the transition's precision, minus the log-probability (``srum.flow.Transition``).

    ``credit``: the advantage, (1,) or one per cell (h, w).
    """
    segments, sampled = list[Segment](), list[Sampled]()
    for step in made.steps:
        sought, precision = step.sought, step.transition.precision
        clean = step.state - step.t * sought  # the latent whose path through the state has this velocity
        segments.append(Segment("noisy", latent=clean, state=(model.tokens(step.state), step.t), loss=True))
        error = model.tokens(step.velocity - sought).square().mean(dim=-1)
        sampled.append(Sampled(-precision * error, torch.full((1,), precision)))
    return Learned(segments, [credit] * len(segments), sampled)


def learned_noised(made: Generated, credit: Tensor) -> Learned:
    """The image itself, to be noised, with its ``credit``: A in [-1, 1], (1,) or one per cell (h, w)."""
    return Learned([Segment("noisy", latent=made.latent, loss=True)], [credit], [UNSAMPLED])


def example_of(name: str, context: Sequence[Segment], *learned: Learned) -> Example:
    """An example of a context and what was drawn after it, in order. A context after which something has a
    log-probability is never dropped: it was drawn after all of it."""
    if any(bool(how.precision.any()) for one in learned for how in one.sampled):
        context = [replace(segment, droppable=False) for segment in context]
    return Example(
        id=name,
        segments=[*context, *(segment for one in learned for segment in one.segments)],
        credit=[credit for one in learned for credit in one.credit],
        sampled=[how for one in learned for how in one.sampled],
    )
