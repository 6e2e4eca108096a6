"""SRUM as published: the reward map weights the flow-matching loss, a reference term anchors it (Eq. 1-3).

    stages    ROLLOUT GROUND JUDGE RASTERIZE
    examples  [prompt, (plan,) noisy]        credit c = alpha R on the latent grid
    loss      alpha R error  +  lambda_c error,    error = |v - u|^2 of flow                      (Eq. 1, Eq. 2, Eq. 3)

R in [-1, 1] (``reward.mapping`` signed) is the reward map, alpha = (layout score + 1) / 2 the layout's factor. A token
whose weight alpha R + lambda_c is positive is preserved, one below zero is repelled. One clean latent serves both
terms, as in the paper; the released code encodes the image twice and compares each with its own encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from srum.config import NotNegative, RunConfig
from srum.lazy import Lazy
from srum.train.methods.base import CandidateMethod, cross_entropy
from srum.train.objective import Terms, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from srum.train.data import TrainingRecord


class SrumConfig(RunConfig):
    """The fields of Eq. 1-3."""

    method: str = "srum"
    constraint_weight: NotNegative = 0.5  # lambda_c of Eq. 3
    use_layout: bool = True  # the factor alpha of Eq. 1; False makes it 1
    credit: Literal["region", "sample"] = "region"  # R is the map, or the candidate's one score in every cell


class Srum(CandidateMethod):
    """Self-rewarding by regions and layout."""

    name, label, colour = "srum", "SRUM, Eq. 1-3", "#56b4e9"
    Config = SrumConfig

    def credits(self, records: Sequence[TrainingRecord], config: SrumConfig) -> Sequence[Tensor]:
        """alpha R on the cells of every candidate."""
        return Lazy(records, lambda record: reward(record, config))

    def terms(self, tokens: Tokens, config: SrumConfig) -> Terms:
        """Eq. 3 in its two parts; ``credit`` is alpha R."""
        if tokens.kind == "text":
            return cross_entropy(tokens, config)
        return {
            "reward": tokens.credit * tokens.error,
            "reference": config.constraint_weight * tokens.error,
        }


def reward(record: TrainingRecord, config: SrumConfig) -> Tensor:
    """alpha R (h, w) of Eq. 1 on the latent grid."""
    alpha = record.alpha if config.use_layout else 1.0
    if config.credit == "sample":
        return alpha * record.reward_map.new_full(record.reward_map.shape, record.mapped_score)
    return alpha * record.reward_map
