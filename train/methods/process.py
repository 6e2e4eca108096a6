"""Process-driven generation (docs/process.md): drawing in strokes, learned from chains that are right.

    stages    none: chains of exact scenes, or of a file
    examples  short   [prompt, (clean, seen, description,) plan*, (first image*)]   [clean, seen, plan, image*]
                      [prompt, plan, seen, inspection*]                             1 : 1 : 2
              long    [prompt, plan*, image*, clean, seen, inspection*, plan*, image*, ...]        one per chain
    loss      cross-entropy of the texts + |v - u|^2 of the images

``*`` is learned. In ``long`` a draft that its inspection rejects is seen, and not learned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from srum.config import Count, RunConfig, TrainConfig
from srum.stages import Stage
from srum.train.methods.base import Method, weighted_error
from srum.train.objective import Terms, Tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from srum.drawing import Chain, Draw
    from srum.drawing.strokes import StrokeSettings
    from srum.models.base import TrainableModel, UnifiedModel
    from srum.records import Prompt
    from srum.run import Run
    from srum.train.examples import Example
    from srum.train.feed import Mix


class ProcessTrain(TrainConfig):
    """All weights, as plans and inspections are texts."""

    trainable: Literal["generation", "all"] = "all"


class ProcessConfig(RunConfig):
    """Which chains, in which layout, and how long a drawing may take."""

    method: str = "process"
    compare: tuple[str, ...] = ()
    train: ProcessTrain = ProcessTrain()
    layout: Literal["short", "long"] = "short"  # an example is a stage of a chain, or the whole chain in one row; a
    # stage of a drawing sees the newest image and texts, or all that was written and drawn before it
    chains: str = ""  # a .jsonl file of chains (train/interleaved.py), for layout=long; empty: exact scenes
    samples: Count = 2048  # chains, or stages of chains, of the exact scenes of a round
    shares: tuple[Count, Count, Count] = (1, 1, 2)  # of plan, draft and inspect in each batch of short examples
    own: Annotated[int, Field(ge=0)] = 0  # prompts that the model draws before: inspections of these are learned, too
    max_strokes: Count = 5  # of a drawing in an evaluation, at most
    max_refinements: Annotated[int, Field(ge=0)] = 1  # corrections of a stroke there, at most
    budget: Count = 4  # images of a drawing

    @model_validator(mode="after")
    def _the_layout_fits(self) -> ProcessConfig:
        if self.chains and self.layout == "short":
            raise ValueError("chains: a file of chains is learned with layout=long")
        if self.own and self.layout == "long":
            raise ValueError("own: inspections of own drawings are stages, which are learned with layout=short")
        if self.train.trainable != "all":
            raise ValueError("train.trainable: plans and inspections are texts, which are learned where it is all")
        if self.layout == "short" and self.train.batch_size % sum(self.shares):
            raise ValueError(f"shares: train.batch_size={self.train.batch_size} is no multiple of {sum(self.shares)}")
        if self.train.probes or self.train.samples.count or self.train.replies:
            raise ValueError("train: probes, samples and replies are of candidates, and there are none")
        return self


class Process(Method):
    """Strokes: plans, drafts, inspections."""

    name, label, colour = "process", "process-driven", "#009e73"
    Config = ProcessConfig
    stages: ClassVar[Sequence[Stage]] = ()
    needs = frozenset({"train", "seen", "clean"})

    def examples(self, run: Run, k: int, config: ProcessConfig) -> Mix:
        """Chains or their stages."""
        from srum.models.base import require
        from srum.run import load_model
        from srum.train.feed import Mix, Part

        model = load_model(run.config, run.newest(k), empty=not config.own)  # else its autoencoder alone is asked
        require(model, {"seen", "clean"}, "the method process")
        if config.layout == "long":
            return Mix([Part("", _whole_chains(model, run, k, config), config.train.batch_size)])
        kinds = _stages(model, run, k, config)
        if config.own:
            kinds["inspect"] += self._own(model, run, k, config)
        return Mix.of_shares(kinds, dict(zip(kinds, config.shares, strict=True)), config.train.batch_size)

    def terms(self, tokens: Tokens, config: ProcessConfig) -> Terms:
        """Both losses as they are."""
        return weighted_error(tokens, config)

    def draw(self, model: TrainableModel, config: ProcessConfig, seed: int) -> Draw:
        """In strokes; a prompt whose first plan cannot be read is drawn once, without a plan."""
        from srum.drawing import Chain, Shot
        from srum.drawing.strokes import draw_in_strokes
        from srum.evaluation.accuracy import drawn

        settings, once = _settings(config), config.eval.model_copy(update={"plan": False})

        def draw(prompts: Mapping[str, Prompt]) -> list[Chain]:
            texts = [prompt.text for prompt in prompts.values()]
            drawings = draw_in_strokes(model, texts, list(prompts), settings, seed)
            shots = {
                name: [Shot(stage.made.image, said=stage.asked) for stage in drawing.stages if stage.made is not None]
                for name, drawing in zip(prompts, drawings, strict=True)
            }
            if unread := {name: prompts[name] for name, own in shots.items() if not own}:
                made = drawn(model, unread, once, seed)
                shots |= {name: [Shot(one.image)] for name, one in zip(unread, made, strict=True)}
            return [Chain(own, len(own) - 1) for own in shots.values()]

        return draw

    def _own(self, model: UnifiedModel, run: Run, k: int, config: ProcessConfig) -> list[Example]:
        from srum.processes import Processes
        from srum.stages.rollout import choose_prompts, own_prompts
        from srum.train.inspected import own_inspections

        def chosen() -> list[Prompt]:
            held_out = {prompt.text for prompt in own_prompts(run.pinned)}
            return choose_prompts(run.pinned.prompts, config.own, run.seed(k, "process", "prompts") % 2**31, held_out)

        prompts = Processes.here().once(chosen)
        return own_inspections(model, prompts, _settings(config), config.eval.batch_size, run.seed(k, "process", "own"))


def _settings(config: ProcessConfig) -> StrokeSettings:
    """How a drawing in strokes is made in an evaluation."""
    from dataclasses import replace

    from srum.drawing.strokes import StrokeSettings
    from srum.models.base import Sampling

    drawing = Sampling(**config.eval.sampling())
    return StrokeSettings(
        drawing=drawing,
        changing=replace(drawing, guidance_interval=(0.0, 1.0)),
        layout=config.layout,
        max_strokes=config.max_strokes,
        max_refinements=config.max_refinements,
        budget=config.budget,
    )


def _stages(model: UnifiedModel, run: Run, k: int, config: ProcessConfig) -> dict[str, list[Example]]:
    """Stages of exact chains, by kind."""
    import numpy as np

    from srum.train.interleaved import SHORT, short_example

    whole = sum(config.shares)
    return {
        kind: [
            short_example(model, kind, f"{kind}-{i}", np.random.default_rng(run.seed(k, "process", kind, i)))
            for i in range(max(1, config.samples * share // whole))
        ]
        for kind, share in zip(SHORT, config.shares, strict=True)
    }


def _whole_chains(model: UnifiedModel, run: Run, k: int, config: ProcessConfig) -> list[Example]:
    """Chains of the file, or of exact scenes."""
    from pathlib import Path

    import numpy as np

    from srum.train.examples import Example
    from srum.train.interleaved import exact_chain, long_segments, read_chains

    if config.chains:
        chains = read_chains(Path(config.chains))
    else:
        seeds = [run.seed(k, "process", i) for i in range(config.samples)]
        chains = [(f"chain-{i}", *exact_chain(np.random.default_rng(seed))) for i, seed in enumerate(seeds)]
    return [Example(id=name, segments=long_segments(model, prompt, turns)) for name, prompt, turns in chains]
