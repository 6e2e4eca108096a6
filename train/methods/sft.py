"""SFT: what the model is pretrained with, on the candidates of the round, every one with weight one.

    stages    ROLLOUT GROUND JUDGE RASTERIZE
    examples  [prompt, (plan,) noisy]        of every candidate that has a reward map, as the methods beside it
    loss      error, such as |v - u|^2

The control of every method that judges: the same candidates, the same steps, no judgement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from srum.config import RunConfig
from srum.lazy import Lazy
from srum.train.methods.base import CandidateMethod, weighted_error
from srum.train.objective import Terms, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from srum.train.data import TrainingRecord


class SftConfig(RunConfig):
    """SFT has no fields of its own."""

    method: str = "sft"


class Sft(CandidateMethod):
    """Supervised finetuning on the model's own candidates."""

    name, label, colour = "sft", "SFT", "#e69f00"
    Config = SftConfig

    def credits(self, records: Sequence[TrainingRecord], config: SftConfig) -> Sequence[Tensor]:
        """Ones."""
        return Lazy(records, lambda record: record.reward_map.new_ones(record.reward_map.shape))

    def terms(self, tokens: Tokens, config: SftConfig) -> Terms:
        """The error itself."""
        return weighted_error(tokens, config)
