"""Probes: a few candidates sampled again, to see that a checkpoint is the right one and that training did something."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from srum.config import RolloutConfig
from srum.models.base import Sampling, UnifiedModel
from train.data import TrainingRecord
from train.sequences import TrainingError

FAR = 0.5  # of the latent's own norm; rounding stays far below, and latents of another model are about as far as noise


def probed(records: Sequence[TrainingRecord], count: int) -> list[TrainingRecord]:
    """The first ``count`` records that a rollout sampled, those without a plan before the others."""
    known = [record for record in records if "timesteps" in record.candidate.sampling]
    return sorted(known, key=lambda record: record.candidate.plan is not None)[:count]


def sample_again(model: UnifiedModel, records: Sequence[TrainingRecord]) -> list[Tensor]:
    """The latents (C, h, w) that the model makes of the candidates' prompts, seeds and settings."""
    latents = []
    for candidate in (record.candidate for record in records):
        sampling = Sampling(**RolloutConfig.model_validate(candidate.sampling).sampling())
        (made,) = model.generate([candidate.prompt], sampling, [candidate.seed], candidate.plan is not None)
        latents.append(made.latent.cpu())
    return latents


def check_reproduction(model: UnifiedModel, records: Sequence[TrainingRecord]) -> list[float]:
    """How far the model's latents are from those of the rollout, each as a share of its norm.

    Raises TrainingError if all of them are far off: one alone may be, where a sampled plan came out differently.
    """
    again = sample_again(model, records)
    distances = [
        ((made - record.latent).norm() / record.latent.norm()).item()
        for made, record in zip(again, records, strict=True)
    ]
    if distances and min(distances) > FAR:
        names = ", ".join(f"{r.candidate.id} ({d:.2f})" for r, d in zip(records, distances, strict=True))
        raise TrainingError(
            f"this model did not make the candidates: sampled again, the latents of {names} differ by these shares of "
            f"their norm (at most {FAR} expected); train the weights that the rollout used"
        )
    return distances
