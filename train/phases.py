"""The schedule of pretraining ``srum-tiny``: its phases in one table, and how often conditions are left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from srum.config import TrainConfig

TEXT_DROPOUT = 0.1
IMAGE_DROPOUT = 0.1  # of all images a sample is conditioned on, together: the branch of image guidance
RECONSTRUCTED = 0.3  # share of the images given that went through the autoencoder, as the model's own images did
LATENT_NOISE = 0.25  # largest standard deviation of the noise on those latents
CHECKPOINT_EVERY = 500  # steps
TEXT_WEIGHT = 2.0  # of the cross-entropy beside the flow-matching loss


@dataclass(frozen=True)
class Phase:
    """A part of the network's training; ``weights`` of the tasks by name (others 0), where not those of ``TASKS``.

    ``timestep_shift`` > 1 draws more timesteps near noise, where the text decides what goes where. With
    ``trainable`` "generation" only that expert learns: understanding stays as it is, and a step costs half as much.
    Samples go in ``packs`` of similar length, whose rows are padded to the longest. Before it begins, the model draws
    ``own`` images, which the tasks about its own drawings need.
    """

    name: str
    steps: int
    batch: int = 256
    weights: Mapping[str, float] | None = None
    timestep_shift: float = 4.0
    warmup: int = 0
    schedule: Literal["constant", "linear"] = "linear"
    peak_lr: float = 2.5e-3
    trainable: Literal["all", "generation"] = "all"
    packs: int = 2
    own: int = 0

    @property
    def config(self) -> TrainConfig:
        """How the trainer trains it; dropout is the data's part."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch,
            lr=self.peak_lr,
            schedule=self.schedule,
            warmup_steps=self.warmup,
            optimizer="muon",
            betas=(0.9, 0.98),
            eps=1e-8,
            weight_decay=0.02,
            text_weight=TEXT_WEIGHT,
            timestep_shift=self.timestep_shift,
            trainable=self.trainable,
            precision="bf16",
            checkpoint_every=CHECKPOINT_EVERY,
        )


_GENERATION = {
    "caption_to_image": 0.2,
    "composed_caption_to_image": 0.32,
    "plan_then_image": 0.12,
    "edit": 0.17,
    "reconstruct": 0.04,
    "regenerate": 0.06,
    "stroke_plan": 0.02,
    "stroke_draft": 0.07,
}
_FINISHING = {
    "caption_to_image": 0.08,
    "composed_caption_to_image": 0.14,
    "plan_then_image": 0.12,
    "question_answering": 0.05,
    "find_all": 0.04,
    "judge": 0.08,
    "judge_own": 0.09,
    "edit": 0.11,
    "reflect": 0.06,
    "reflect_own": 0.08,
    "reconstruct": 0.03,
    "regenerate": 0.04,
    "stroke_plan": 0.02,
    "stroke_draft": 0.03,
    "stroke_inspect": 0.03,
}

# What bare captions ask for, above all how many things, is decided near noise and takes many captions to learn (lab
# notes 15, 20, 27): a phase of the generation expert alone, which is cheap. Reflecting on rendered scenes alone raises
# false alarms on drawn ones, so that the last phase, of all weights and all tasks, knows the model's own drawings.
PHASES = (
    Phase("learning", 2600, warmup=150, schedule="constant"),
    Phase("generation", 2800, batch=512, weights=_GENERATION, warmup=50, peak_lr=2e-3, trainable="generation"),
    Phase("finishing", 1700, weights=_FINISHING, warmup=50, peak_lr=1.5e-3, own=4096),
)


def scaled(phases: Sequence[Phase], scale: float) -> tuple[Phase, ...]:
    """The phases with ``scale`` times their steps, those of warm-up too, each with at least one step.

    A shorter phase is preceded by fewer drawings of the model's own, a longer one by as many.
    """
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected a number above 0")
    return tuple(
        replace(
            phase,
            steps=max(1, round(scale * phase.steps)),
            warmup=min(round(scale * phase.warmup), max(1, round(scale * phase.steps)) - 1),
            own=min(phase.own, math.ceil(scale * phase.own)),
        )
        for phase in phases
    )
