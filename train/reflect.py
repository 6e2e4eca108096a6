"""The stages of R3 after the first: replies about an image and what is drawn after them, compared in groups or by the
last image of a whole chain (docs/r3.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from srum.drawing import Chain, Draw, Shot
from srum.drawing.chains import (
    ChainSettings,
    ChainState,
    Reflection,
    looked_at,
    parse_reflection,
    run_chains,
    template,
    to_change,
)
from srum.evaluation.accuracy import drawn
from srum.models.base import Decoding, Generated, Sampling, Segment, UnifiedModel, Written, require
from srum.records import Prompt
from srum.train.examples import Example, generator_for
from srum.train.methods.r3 import R3Config
from srum.train.online import Played, example_of, learned_text
from srum.train.policy import group_advantages, stage_rewards, state_probabilities
from srum.train.reason import Drawn, Reason, figures, image_advantages, mean, spread
from srum.train.rewards import Reward, Value


@dataclass(frozen=True)
class State:
    """An image to reflect on: its prompt, its value, and the group that it was drawn in."""

    prompt: Prompt
    made: Generated
    value: float
    group: int


@dataclass(frozen=True)
class Refined:
    """What was said of states, and what was drawn after it: an image and its value where an edit was asked for."""

    states: Sequence[State]
    contexts: Sequence[Sequence[Segment]]
    written: Sequence[Written]
    replies: Sequence[Reflection]
    images: dict[int, Generated]
    values: dict[int, Value]

    def after(self, place: int) -> float | None:
        """The value of the image that a reply leaves: the new one, or the one that there was."""
        return self.values[place].value if place in self.images else self.states[place].value


class Refine(Reason):
    """Reflects on states and refines them; what is played is its children's to say."""

    config: R3Config

    def __init__(
        self,
        model: UnifiedModel,
        reward: Reward,
        prompts: Sequence[Prompt],
        config: R3Config,
        seed: int,
        second: Reward | None = None,
    ) -> None:
        super().__init__(model, reward, prompts, config, seed, second)
        require(model, {"edit", "seen"}, "the method r3")
        self.form = template(config.template)
        self.changing = replace(self.sampling, timesteps=config.refine_timesteps)
        self.cycle = 1 + config.refinements if config.tree else 1

    def refined(self, number: int, turn: str, states: Sequence[State], places: Sequence[int] | None = None) -> Refined:
        """A reply to each state, and the image after it; ``places`` of the states in their groups."""
        config = self.config
        places = range(len(states)) if places is None else places
        shared = {id(state): looked_at(self.form, state.prompt.text, state.made) for state in states}
        contexts = [shared[id(state)] for state in states]
        decoding = Decoding(max_tokens=config.reply_limit, temperature=1.0)
        written = self.groups.texts(number, f"reflect {turn}", contexts, decoding)
        replies = [parse_reflection(text.text, self.form, text.ended) for text in written]
        edits = [place for place, reply in enumerate(replies) if reply.kind == "edit"]
        images = dict(zip(edits, self.drawn_after(number, turn, edits, states, replies, places), strict=True))
        values = self.reward([images[i].image for i in edits], [states[i].prompt for i in edits]) if edits else []
        return Refined(states, contexts, written, replies, images, dict(zip(edits, values, strict=True)))

    def drawn_after(
        self,
        number: int,
        turn: str,
        edits: Sequence[int],
        states: Sequence[State],
        replies: Sequence[Reflection],
        places: Sequence[int],
    ) -> list[Generated]:
        """The images of the replies that are edits."""
        if not edits:
            return []
        contexts = [to_change(states[i].made, replies[i].instruction or "") for i in edits]
        config, its = self.config, [places[i] for i in edits]
        return self.groups.images(
            number, f"refine {turn}", contexts, self.changing, config.refine_level, config.refine_range, its
        )

    def learned(self, name: str, refined: Refined, place: int, of_text: float, of_image: float) -> list[Example]:
        """A reply and the image after it, each after its own context, with their advantages."""
        examples = []
        if self.config.train.trainable == "all":
            written = refined.written[place]
            text = learned_text(written, of_text, Segment("text", ids=written.ids, loss=True))
            examples.append(example_of(f"{name}-reply", refined.contexts[place], text))
        if place in refined.images:
            context = to_change(refined.states[place].made, refined.replies[place].instruction or "")
            image = self.learned_image(refined.images[place], refined.values[place], of_image)
            examples.append(example_of(f"{name}-image", context, image))
        return examples


class Tree(Refine):
    """A cycle: a step that reasons, and steps that reflect on and refine what the steps before them drew."""

    kept: list[State]

    def play(self, number: int) -> Played:
        """What step ``number`` has drawn, compared."""
        if number % self.cycle == 0:
            drawn = self.draw(number)
            self.kept = states_of(drawn, self.groups.size)
            return self.compared(number, drawn)
        states = self.drawn_states(number)
        if not states:  # no image has a value: its judgements failed
            return self.compared(number, self.draw(number))
        refined = self.refined(number, "", [state for state in states for _ in range(self.groups.size)])
        self.kept += [
            State(refined.states[i].prompt, made, value, refined.states[i].group)
            for i, made in refined.images.items()
            if (value := refined.values[i].value) is not None
        ]
        played = self.rewarded(number, refined)
        if not played.examples:  # texts are not trained, and no reply asked for an image
            return self.compared(number, self.draw(number))
        return played

    def drawn_states(self, number: int) -> list[State]:
        """An image per group of those that are kept, by their values."""
        if not self.kept:
            return []
        config, kept = self.config, self.kept
        values, owners = [state.value for state in kept], [state.group for state in kept]
        chances = torch.tensor(state_probabilities(values, owners, config.states, config.right_share))
        again = int((chances > 0).sum()) < config.groups
        generator = generator_for(self.groups.seed, number, "states")
        return [kept[int(i)] for i in torch.multinomial(chances, config.groups, again, generator=generator)]

    def rewarded(self, number: int, refined: Refined) -> Played:
        """The examples of replies and refined images with their advantages, and the step's figures."""
        config, count = self.config, len(refined.states)
        owners = [place // self.groups.size for place in range(count)]
        of_texts, of_images = list[float | None](), list[float | None]()
        for place, (state, reply) in enumerate(zip(refined.states, refined.replies, strict=True)):
            after = refined.after(place)
            formed, stop = reply.kind != "failure", reply.kind == "stop"
            worth = after is not None and stage_rewards(
                state.value, after, stop, formed, config.reading, config.format_weight
            )
            of_texts.append(worth[1] if worth else None)
            of_images.append(worth[0] if worth and place in refined.images else None)
        texts = group_advantages(of_texts, owners, config.advantage)
        images = image_advantages(of_images, owners, config)
        examples = [
            example
            for place in range(count)
            for example in self.learned(f"{number}-{place}", refined, place, texts[place], images[place])
        ]
        return Played(examples, spread(of_texts, owners) | chain_figures(refined))


class Trajectories(Refine):
    """Groups of whole chains, each of whose turns has the advantage of the chain's last image."""

    def play(self, number: int) -> Played:
        """What step ``number`` has drawn, compared."""
        drawn, config = self.draw(number), self.config
        last = [value.value for value in drawn.values]
        going = {
            i: State(drawn.prompts[i], drawn.images[i], value, i // self.groups.size)
            for i, value in enumerate(last)
            if value is not None
        }
        turns = list[tuple[list[int], Refined]]()
        while going and len(turns) < config.refinements:
            chains = list(going)
            refined = self.refined(number, str(len(turns)), list(going.values()), chains)
            turns.append((chains, refined))
            for place, i in enumerate(chains):
                state, value = going.pop(i), refined.after(place)
                last[i] = value
                if place in refined.images and value is not None:
                    going[i] = replace(state, made=refined.images[place], value=value)
        owners = [place // self.groups.size for place in range(len(last))]
        texts, images = group_advantages(last, owners, config.advantage), image_advantages(last, owners, config)
        examples = [self.example(f"{number}-{i}", drawn, i, images[i], texts[i]) for i in range(len(last))]
        for turn, (chains, refined) in enumerate(turns):
            for place, i in enumerate(chains):
                examples += self.learned(f"{number}-{i}-{turn}", refined, place, texts[i], images[i])
        facts = chain_figures(turns[-1][1]) if turns else {}
        facts |= figures([Value(value) for value in last], owners) | self.looked_again(number, drawn)
        return Played(examples, facts)


def states_of(drawn: Drawn, size: int) -> list[State]:
    """The images that have a value."""
    return [
        State(prompt, made, value.value, place // size)
        for place, (prompt, made, value) in enumerate(zip(drawn.prompts, drawn.images, drawn.values, strict=True))
        if value.value is not None
    ]


def chain_figures(refined: Refined) -> dict[str, float]:
    """What is to be known of replies: their form, and why it failed, stops, right ones, and what refining did to
    values; a share of nothing, as of stops where there are none, is left out."""
    before = [state.value for state in refined.states]
    stops = [reply.kind == "stop" for reply in refined.replies]
    edited = [(before[i], value.value) for i, value in refined.values.items() if value.value is not None]
    told: Mapping[str, Sequence[float]] = {
        "formed": [reply.kind != "failure" for reply in refined.replies],
        "stops": stops,
        "right_stops": [value >= 1 for value, stop in zip(before, stops, strict=True) if stop],
        "right_stopped": [stop for value, stop in zip(before, stops, strict=True) if value >= 1],
        "value_before": before,
        "mended": [after >= 1 for value, after in edited if value < 1],
        "broken": [after < 1 for value, after in edited if value >= 1],
    }
    kinds = Counter(reply.failure for reply in refined.replies if reply.failure is not None)
    failures = {f"reply_{kind}": count / len(stops) for kind, count in kinds.items()}
    return {name: mean(values) for name, values in told.items() if values} | failures


def drawn_in_chains(model: UnifiedModel, config: R3Config, seed: int) -> Draw:
    """Images of prompts as the evaluation draws them, then refined while the model says that something must change."""
    drawing = Sampling(**config.eval.sampling())
    settings = ChainSettings(
        drawing=drawing,
        changing=replace(drawing, timesteps=config.refine_timesteps, guidance=1.0),
        form=template(config.template),
        max_refinements=config.eval_refinements,
        decoding=Decoding(max_tokens=config.reply_limit),
    )

    def draw(prompts: Mapping[str, Prompt]) -> list[Chain]:
        firsts = drawn(model, prompts, config.eval, seed)
        texts = [prompt.text for prompt in prompts.values()]
        chains = run_chains(model, texts, list(prompts), settings, seed, firsts)
        return [
            Chain(
                [Shot(made.image, said=said) for made, said in zip(chain.images, [None, *_edits(chain)], strict=True)],
                len(chain.images) - 1,
                chain.replies[-1].raw if chain.replies and chain.replies[-1].kind != "edit" else None,
            )
            for chain in chains
        ]

    return draw


def _edits(chain: ChainState) -> list[str]:
    """What was said before each refined image."""
    return [reply.raw for reply in chain.replies if reply.kind == "edit"]
