"""The protocol of a method: one page per method, beside its paper.

A page says what is trained on (``examples``), what is minimised (``terms``), the fields of its own and the stages of a
round. Pages import nothing of weight at their top, so that a config is parsed at once: tensors do their own arithmetic,
and what reads records is imported where it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from srum.config import RunConfig
from srum.stages import GROUND, JUDGE, RASTERIZE, ROLLOUT, Stage
from srum.train.objective import Objective, Terms, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from srum.drawing import Draw
    from srum.models.base import TrainableModel
    from srum.run import Run
    from srum.train.data import TrainingRecord
    from srum.train.feed import Mix, Source


class Method:
    """A way to learn from a round. ``name`` is also that of its arm; ``Config`` holds the fields of its own.

    A user's method is a class like this one in a file of its own, named ``module:Name`` (docs/extending.md).
    """

    name: ClassVar[str]
    Config: ClassVar[type[RunConfig]]
    label: ClassVar[str]  # in tables and plots
    colour: ClassVar[str]  # of its curves
    stages: ClassVar[Sequence[Stage]]  # of a round, before training
    needs: ClassVar[frozenset[str]] = frozenset({"train"})  # abilities of the model

    def stages_of(self, config: Any) -> Sequence[Stage]:
        """The stages where they depend on the config."""
        return self.stages

    def needs_of(self, config: Any) -> frozenset[str]:
        """The abilities where they depend on the config."""
        return self.needs

    def examples(self, run: Run, k: int, config: Any) -> Source:
        """What is learned in round ``k``: examples (a ``Mix``), or a source that draws them as it goes."""
        raise NotImplementedError

    def terms(self, tokens: Tokens, config: Any) -> Terms:
        """The parts of the objective per token, by name; of text tokens most methods' are ``cross_entropy``."""
        raise NotImplementedError

    def old_decay(self, config: Any) -> float | None:
        """How the old weights follow (``Objective``); None where none are wanted."""
        return None

    def old_every(self, config: Any) -> int:
        """After how many steps the old weights are taken anew (``Objective``); 0: never."""
        return 0

    def figures(self, tokens: Tokens, config: Any) -> Terms:
        """What is written down beside the terms, per token: their means are in the metrics."""
        return {}

    def stop(self, rows: Sequence[Mapping[str, Any]], config: Any) -> str:
        """Why training ends after these rows of metrics, before its last step; empty: it goes on."""
        return ""

    def remark(self, losses: Mapping[str, float]) -> str:
        """What is said of the losses before the first step of what its mix compares, by its name."""
        return ", ".join(f"{name}: {loss:.3f}" for name, loss in losses.items())

    def images_drawn(self, config: Any) -> int:
        """How many images its training draws in a round, beside those of the stages."""
        return 0

    def draw(self, model: TrainableModel, config: Any, seed: int) -> Draw | None:
        """How its weights draw in an evaluation, in more than one step; None: once, which is always measured."""
        return None

    def objective(self, config: RunConfig) -> Objective:
        """What the trainer asks for."""
        own = config.model_dump(mode="json", exclude=set(RunConfig.model_fields))
        terms, figures = (partial(of, config=config) for of in (self.terms, self.figures))
        stop = partial(self.stop, config=config)
        return Objective(self.name, terms, own, self.old_decay(config), self.old_every(config), figures, stop)


class CandidateMethod(Method):
    """A method that learns from the round's judged candidates, each from its prompt, with a credit per latent cell."""

    stages = (ROLLOUT, GROUND, JUDGE, RASTERIZE)

    def credits(self, records: Sequence[TrainingRecord], config: Any) -> Sequence[Tensor]:
        """What the cells (h, w) of each candidate are weighted with."""
        raise NotImplementedError

    def chosen(self, records: Sequence[TrainingRecord], config: Any) -> Sequence[TrainingRecord]:
        """The candidates to learn from: all that have a reward map."""
        return records

    def examples(self, run: Run, k: int, config: Any) -> Mix:
        """The chosen candidates, and the judge's replies where they are wanted."""
        from srum.train.data import candidate_mix, load_replies, load_training_records

        records = self.chosen(load_training_records(run.round(k)), config)
        replies = load_replies(run.round(k), config.judge.instructions) if config.train.replies else ()
        return candidate_mix(records, self.credits(records, config), config.train, run.seed(k, "train"), replies)


def check_mix(config: RunConfig, mix: Sequence[int]) -> None:
    """ValueError where a batch cannot have these shares, the last of which is of the judge's replies."""
    train = config.train
    if train.batch_size % sum(mix):
        raise ValueError(f"mix: train.batch_size={train.batch_size} is no multiple of {sum(mix)}")
    if mix[-1] and train.trainable != "all":
        raise ValueError("mix: nothing that reads and writes text is trained unless train.trainable is all")
    if mix[-1]:
        config.judge.require_replies("mix")
    if train.replies:
        raise ValueError(f"train.replies: {config.method} learns so many replies as mix says; leave it at 0")
    if train.plan_in_context:
        raise ValueError(f"train.plan_in_context: {config.method} learns from bare prompts; leave it false")


def cross_entropy(tokens: Tokens, config: RunConfig) -> Terms:
    """The terms of text tokens that are learned as they are: replies, plans."""
    return {"cross_entropy": config.train.text_weight * tokens.credit * tokens.error}


def weighted_error(tokens: Tokens, config: RunConfig) -> Terms:
    """The terms of tokens that are learned as they are: the error of images, the cross-entropy of texts."""
    return cross_entropy(tokens, config) if tokens.kind == "text" else {"error": tokens.credit * tokens.error}
