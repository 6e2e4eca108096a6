"""R3 (docs/r3.md): reason, reflect, refine, and learn each of it by what it was worth, in a tree.

    stages    none: each step draws with the weights of the moment
    step      of a cycle of 1 + ``refinements`` steps
      first   Reason, as Flow-GRPO: prompts, of each a group of plans and images; V of each; the images are kept
      others  one kept image per group, drawn by its value; of each a group of replies, and of edits a refined image
    examples  [instruction, prompt, plan*, x_t -> x_s*]   [seen, question, reply*]   [clean, seen, edit, x_t -> x_s*]
    reward    image V; plan f (V + w f);  edit C = V - V before; stop C = 1 if that was right, else 0; reply f (C + w)
    loss      max(-A rho, -A clip(rho)) + kl KL(new || entered)
              images_by=forward: an image is noised anew, A change + beta drift (``train.reinforced``)

A stopped or unreadable reply draws no image, and an unreadable one has f = 0. With ``tree: false`` a group has whole
chains, and each of their turns has the advantage of the last image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from srum.config import Count, Fraction, Positive
from srum.train.reinforced import PolicyConfig, PolicyMethod

if TYPE_CHECKING:
    from srum.drawing import Draw
    from srum.models.base import TrainableModel
    from srum.run import Run
    from srum.train.online import OnlineSource


class R3Config(PolicyConfig):
    """How a chain goes on after its first image."""

    method: str = "r3"
    template: str = "compact"  # the words of a chain: compact, released (BAGEL), or a .yaml file
    refinements: Count = 1  # steps of a cycle that reflect and refine
    tree: bool = True  # steps of one turn each; false: whole chains, by their last image
    states: Literal["gap", "stratified", "spread", "uniform"] = "gap"  # how the images to reflect on are drawn
    right_share: Fraction = 0.15  # of right images among them
    reading: Literal["ours", "released", "paper"] = "ours"  # of what a refinement is worth
    reply_limit: Count = 96  # tokens of a reply
    eval_refinements: Count = 4  # of an image in an evaluation, at most; replies are greedy there
    refine_timesteps: Annotated[int, Field(ge=2)] = 16  # as timesteps, of a refined image
    refine_level: Positive = 0.7  # as noise_level, of a refined image
    refine_range: tuple[Fraction, Fraction] = (0.0, 0.5)  # as random_range, of a refined image

    @model_validator(mode="after")
    def _a_cycle_is_kept_together(self) -> R3Config:
        cycle = (1 + self.refinements) * self.updates
        if self.tree and self.train.checkpoint_every % cycle:
            raise ValueError(f"train.checkpoint_every: a multiple of {cycle}, the steps of a cycle that share images")
        return self

    @model_validator(mode="after")
    def _refining_has_its_random_steps(self) -> R3Config:
        self.require_random_steps("refine_range", self.refine_range, self.refine_timesteps)
        return self


class R3(PolicyMethod):
    """Groups of plans and images, then of replies and refined images, compared."""

    name, label, colour = "r3", "R3", "#d55e00"
    Config = R3Config
    needs = frozenset({"train", "seen", "edit"})

    def examples(self, run: Run, k: int, config: R3Config) -> OnlineSource:
        """Steps that are drawn as training goes on."""
        from srum.train.reason import source_of
        from srum.train.reflect import Trajectories, Tree

        return source_of(run, k, config, Tree if config.tree else Trajectories)

    def draw(self, model: TrainableModel, config: R3Config, seed: int) -> Draw:
        """As a chain: the first images are those that are drawn once, then at most ``eval_refinements`` more."""
        from srum.train.reflect import drawn_in_chains

        return drawn_in_chains(model, config, seed)
