"""Candidates sampled again: is the checkpoint the right one, did training do something, what does it look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from torch import Tensor

from srum.config import RolloutConfig
from srum.drawing import contexts_of
from srum.errors import TrainingError
from srum.images import save_image
from srum.models.base import Generated, Sampling, UnifiedModel
from srum.train.data import TrainingRecord

FAR = 0.5  # of a latent's norm, or ids; rounding stays far below, and latents of another model are as far as noise


def probed(records: Sequence[TrainingRecord], count: int) -> list[TrainingRecord]:
    """The first ``count`` records that a rollout sampled, those without a plan before the others."""
    return list(islice(_sampled(records), count))


def shown(records: Sequence[TrainingRecord], count: int) -> list[TrainingRecord]:
    """The first such record of each of the first ``count`` prompts that have one."""
    of_prompt: dict[str, TrainingRecord] = {}
    for record in _sampled(records) if count else ():
        of_prompt.setdefault(record.candidate.prompt_id, record)
        if len(of_prompt) == count:
            break
    return list(of_prompt.values())


def _sampled(records: Sequence[TrainingRecord]) -> Iterator[TrainingRecord]:
    for planned in (False, True):
        for record in records:
            if "timesteps" in record.candidate.sampling and (record.candidate.plan is not None) == planned:
                yield record


def sample_again(model: UnifiedModel, records: Sequence[TrainingRecord]) -> list[Generated]:
    """What the model makes of the candidates' prompts and plans with their seeds and settings."""
    made = []
    for candidate in (record.candidate for record in records):
        sampling = Sampling(**RolloutConfig.model_validate(candidate.sampling).sampling())
        contexts = contexts_of(model, [candidate.prompt], [candidate.plan])
        made += model.draw(contexts, sampling, [candidate.seed])
    return made


def save_samples(records: Sequence[TrainingRecord], made: Sequence[Generated], folder: Path) -> None:
    """What was made of the candidates, as ``ID.png``."""
    for record, generated in zip(records, made, strict=True):
        save_image(generated.image, folder / f"{record.candidate.id}.png")


def check_reproduction(records: Sequence[TrainingRecord], again: Sequence[Generated]) -> list[float]:
    """How far the latents of what a model made are from those of the rollout, each as a share of its norm; of ids, the
    share that differ.

    Raises TrainingError if all of them are far off.
    """
    distances = [_share(made.latent.cpu(), record.latent) for made, record in zip(again, records, strict=True)]
    if distances and min(distances) > FAR:
        names = ", ".join(f"{r.candidate.id} ({d:.2f})" for r, d in zip(records, distances, strict=True))
        raise TrainingError(
            f"this model did not make the candidates: sampled again, the latents of {names} differ by these shares of "
            f"their norm or ids (at most {FAR} expected); train the weights that the rollout used"
        )
    return distances


def _share(made: Tensor, latent: Tensor) -> float:
    if latent.is_floating_point():
        return ((made - latent).norm() / latent.norm()).item()
    return (made != latent).double().mean().item()
