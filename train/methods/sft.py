"""SFT: plain flow matching on the candidates of the round, every one with weight one.

    stages    ROLLOUT GROUND JUDGE RASTERIZE
    examples  [prompt, (plan,) noisy]        of every candidate that has a reward map, as the methods beside it
    loss      |v - u|^2

The control of every method that judges: the same candidates, the same steps, no judgement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srum.config import RunConfig
from train.methods.base import Method, cross_entropy
from train.objective import Tokens

if TYPE_CHECKING:
    from srum.run import Run
    from train.examples import Mix
    from train.objective import Terms


class SftConfig(RunConfig):
    """SFT has no fields of its own."""

    method: str = "sft"


class Sft(Method):
    """Supervised finetuning on the model's own candidates."""

    name, label, colour = "sft", "SFT", "#e69f00"
    Config = SftConfig

    def examples(self, run: Run, k: int, config: SftConfig) -> Mix:
        """Every candidate, with weight one."""
        from train.data import candidate_mix, load_training_records

        records = load_training_records(run.round(k))
        return candidate_mix(records, None, run, k, config)

    def terms(self, tokens: Tokens, config: SftConfig) -> Terms:
        """The error itself."""
        if tokens.kind == "text":
            return cross_entropy(tokens, config)
        return {"flow": tokens.credit * tokens.error}
