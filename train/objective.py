"""What the trainer asks of a method: per-token terms of what the model predicted.

A method is written over errors, credits and the distance from old weights, never over velocities, so that it does not
depend on what a model predicts (``srum.models.base.TrainingForward``). Terms are never reduced here; the objective is
their sum, reduced where the weighting is visible (``train.trainer``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Terms: TypeAlias = "dict[str, Tensor]"  # name -> (N,)


@dataclass(frozen=True)
class Draws:
    """How tokens (N,) were drawn (``srum.train.examples.Sampled``), and the number of the segment that each is of."""

    logprob: Tensor
    precision: Tensor
    owner: Tensor


@dataclass(frozen=True)
class Tokens:
    """The predicted tokens of one kind in a pack, (N,) each.

    ``error``: of image tokens what their model minimises (for flow the squared error of the velocity, its mean over
    channels; for ids minus the log-probability), of text tokens the cross-entropy. ``credit``: that of the example
    (``train.examples``). Where the objective compares with old weights: ``old_error`` of these, and of image tokens how
    far the new prediction is from theirs, ``change`` and ``drift`` (``srum.models.base.Distance``). Gradients go
    through the new prediction alone. ``draws``: of what a policy drew, how.
    """

    kind: Literal["image", "text"]
    error: Tensor
    credit: Tensor
    old_error: Tensor | None = None
    change: Tensor | None = None
    drift: Tensor | None = None
    draws: Draws | None = None


@dataclass(frozen=True)
class Objective:
    """The ``terms`` of a method with its ``settings``.

    ``old_decay``: where it compares with old weights, how these follow the trained ones after each step; at 1 they are
    those that entered. None: it does not compare. ``old_every``: before each of so many steps, from the first on, the
    old weights are taken anew, as they are at that moment; 0: never. ``figures``: what is written down beside the
    terms, per token. ``stop``: why training ends after these rows of metrics; empty where it goes on.
    """

    name: str
    terms: Callable[[Tokens], Terms]
    settings: Mapping[str, Any]
    old_decay: float | None = None
    old_every: int = 0
    figures: Callable[[Tokens], Terms] | None = None
    stop: Callable[[Sequence[Mapping[str, Any]]], str] | None = None

    def why_stop(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """The reason, or nothing."""
        return self.stop(rows) if self.stop else ""
