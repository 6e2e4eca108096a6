"""Region-NFT (docs/specs/srum.md, 6), beyond the paper: a push away from bad regions that is bounded.

    stages    ROLLOUT GROUND JUDGE RASTERIZE
    examples  [prompt, (plan,) noisy]        credit A: the candidate's advantage in its group, spread by blame
    loss      old error / beta  +  A change  +  beta drift                  the terms error, push, trust
    of flow   (r |v+ - u|^2 + (1 - r) |v- - u|^2) / beta,    r = (1 + A) / 2,    v+- = v_old +- beta (v - v_old)
              = |e|^2 / beta  +  2 A e.d  +  beta |d|^2      with e = v_old - u, d = v - v_old
    of ids    -log p_old / beta  -  A d  +  beta d^2 / 2     with d = log p - log p_old       (docs/specs/showo.md, 13)

The first term has no gradient; ``change`` and ``drift`` are the model's (``srum.models.base.Distance``). At the old
weights with A = 0 the gradient is exactly zero. Of flow, with A = 1 and beta = 1, the sum is the squared error of SFT;
of ids the push with A = 1 has the gradient of SFT, and the probability of an id settles at e^(A / beta) of the old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from srum.config import Fraction, Positive, RunConfig, Signed
from srum.errors import TrainingError
from srum.lazy import Lazy
from srum.train.methods.base import CandidateMethod, cross_entropy
from srum.train.objective import Terms, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from srum.train.data import TrainingRecord

NAMED = 3  # prompts that an error names


class RegionNftConfig(RunConfig):
    """The trust region, and how advantages become credit."""

    method: str = "region_nft"
    beta: Positive = 0.3  # width of the trust region
    old_decay: Fraction = 1.0  # v_old follows the trained weights by this decay; 1: is what entered
    credit: Literal["region", "sample"] = "region"  # where an advantage lands: on the blamed cells, or evenly
    advantage_offset: Signed = 0.0  # added to every advantage
    mixed_prompts: bool = False  # learn only from prompts with candidates on both sides of 0, right ones and wrong ones

    @model_validator(mode="after")
    def _has_groups(self) -> RegionNftConfig:
        if self.candidates_per_prompt < 2:
            raise ValueError(
                "candidates_per_prompt: region_nft compares the candidates of a prompt; it needs at least 2"
            )
        return self


class RegionNft(CandidateMethod):
    """Towards what was judged better than its siblings, away from what was judged worse, within a trust region."""

    name, label, colour = "region_nft", "region-NFT", "#0072b2"
    Config = RegionNftConfig

    def chosen(self, records: Sequence[TrainingRecord], config: RegionNftConfig) -> Sequence[TrainingRecord]:
        """All, or those of the prompts that have right and wrong ones. Raises TrainingError where none has."""
        return with_both(records) if config.mixed_prompts else records

    def credits(self, records: Sequence[TrainingRecord], config: RegionNftConfig) -> Sequence[Tensor]:
        """Every candidate's advantage on its cells, evenly or by blame. Raises TrainingError where none has any."""
        from srum.train.advantages import spread_by_blame

        of_samples = advantages(records, config)
        if not any(of_samples):
            raise TrainingError(nothing_to_prefer(records))

        def credit(number: int) -> Tensor:
            advantage, reward_map = of_samples[number], records[number].reward_map
            if config.credit == "sample":
                return reward_map.new_full(reward_map.shape, advantage)
            return spread_by_blame(advantage, reward_map)

        return Lazy(range(len(records)), credit)

    def terms(self, tokens: Tokens, config: RegionNftConfig) -> Terms:
        """The three terms above; ``credit`` is A."""
        if tokens.kind == "text":
            return cross_entropy(tokens, config)
        return bounded_push(tokens, config.beta)

    def old_decay(self, config: RegionNftConfig) -> float:
        """v_old is wanted."""
        return config.old_decay


def bounded_push(tokens: Tokens, beta: float) -> Terms:
    """The three terms of image tokens with credit A in [-1, 1] and old weights to compare with."""
    assert tokens.old_error is not None and tokens.change is not None and tokens.drift is not None
    return {
        "error": tokens.old_error / beta,
        "push": tokens.credit * tokens.change,
        "trust": beta * tokens.drift,
    }


def nothing_to_prefer(records: Sequence[TrainingRecord]) -> str:
    """That no prompt's candidates differ in their score, with how many have which."""
    of_prompts: dict[str, list[float]] = {}
    for record in records:
        of_prompts.setdefault(record.candidate.prompt_id, []).append(record.sample_score)
    named = [f"{name}: {len(scores)} of {scores[0]:g}" for name, scores in of_prompts.items()][:NAMED]
    more = ", ..." if len(of_prompts) > NAMED else ""
    return (
        f"nothing to prefer: the candidates of each of {len(of_prompts)} prompts have one score "
        f"({', '.join(named)}{more}); judge with soft=true, or draw more candidates that differ"
    )


def with_both(records: Sequence[TrainingRecord]) -> Sequence[TrainingRecord]:
    """The candidates of prompts of which some score above 0, and some do not."""
    prompts = [record.candidate.prompt_id for record in records]
    signs: dict[str, set[bool]] = {}
    for prompt, record in zip(prompts, records, strict=True):
        signs.setdefault(prompt, set()).add(record.sample_score > 0)
    both = [number for number, prompt in enumerate(prompts) if len(signs[prompt]) == 2]
    if not both:
        raise TrainingError(
            "mixed_prompts: no prompt has candidates on both sides of 0; draw more of each, or set it false"
        )
    return Lazy(both, records.__getitem__)


def advantages(records: Sequence[TrainingRecord], config: RegionNftConfig) -> list[float]:
    """A in [-1, 1] of every candidate: of its score among those of its prompt."""
    from srum.train.advantages import sample_advantages

    groups = [record.candidate.prompt_id for record in records]
    return sample_advantages([record.sample_score for record in records], groups, config.advantage_offset)
