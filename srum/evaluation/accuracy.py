"""Accuracy on the embedded world: images of prompts, the exact checker, intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from srum.config import EvalConfig
from srum.evaluation.statistics import wilson
from srum.models.base import Sampling, UnifiedModel
from srum.records import Name, Prompt, Record
from srum.run_dir import RunError, run_stage, save_image
from srum.seeding import seed_for
from srum.shapes.checker import check
from srum.shapes.prompts import from_metadata


class CheckedImage(Record):
    """The checker's verdict on the image of one prompt, ``images/<prompt id>.png``; a line of ``verdicts.jsonl``."""

    prompt_id: Name
    prompt: str
    category: str
    correct: bool
    reasons: list[str]

    def files(self) -> list[str]:
        """The image."""
        return [f"images/{self.prompt_id}.png"]


@dataclass(frozen=True)
class Accuracy:
    """Share of correct images in percent, its 95% Wilson interval in percent, and the number of images."""

    accuracy: float
    interval: tuple[float, float]
    n: int


@dataclass(frozen=True)
class EvalResult:
    """Accuracy over all prompts and per category, with the verdicts in the order of the prompts."""

    overall: Accuracy
    per_category: dict[str, Accuracy]
    seed: int
    correct: list[bool]


def evaluate(model: UnifiedModel, prompts: Sequence[Prompt], config: EvalConfig, folder: Path, seed: int) -> EvalResult:
    """One image per prompt, checked; ``verdicts.jsonl`` and ``images/`` in ``folder``, which resumes by batches.

    The noise of an image depends on ``seed`` and the prompt's id alone, so that models compare image by image. Raises
    RunError for a prompt without the embedded world's metadata, before any image is made.
    """
    require_metadata(prompts)

    def work(batch: Mapping[str, Prompt]) -> list[CheckedImage]:
        seeds = [seed_for(seed, prompt_id, "eval") for prompt_id in batch]
        texts = [prompt.text for prompt in batch.values()]
        generated = model.generate(texts, Sampling(**config.sampling()), seeds, config.plan)
        checked = []
        for prompt, result in zip(batch.values(), generated, strict=True):
            save_image(result.image, folder / "images" / f"{prompt.id}.png")
            verdict = check(np.asarray(result.image.convert("RGB")), prompt.metadata)
            checked.append(
                CheckedImage(
                    prompt_id=prompt.id,
                    prompt=prompt.text,
                    category=verdict.category,
                    correct=verdict.correct,
                    reasons=verdict.reasons,
                )
            )
        return checked

    by_id = {prompt.id: prompt for prompt in prompts}
    return summarize(run_stage(folder, "verdicts", CheckedImage, by_id, config.batch_size, work), seed)


def require_metadata(prompts: Sequence[Prompt]) -> None:
    """Raises RunError, naming the prompt, where the exact checker could not read what is asked for."""
    for prompt in prompts:
        try:
            from_metadata(prompt.metadata)
        except ValueError as error:
            raise RunError(
                f"prompt {prompt.id!r} ({prompt.text!r}) cannot be checked, it is not of the embedded world: {error}"
            ) from None


def summarize(verdicts: Sequence[CheckedImage], seed: int) -> EvalResult:
    """Accuracies of verdicts; categories in alphabetical order."""
    by_category: dict[str, list[bool]] = {name: [] for name in sorted({verdict.category for verdict in verdicts})}
    for verdict in verdicts:
        by_category[verdict.category].append(verdict.correct)
    correct = [verdict.correct for verdict in verdicts]
    per_category = {name: accuracy_of(values) for name, values in by_category.items()}
    return EvalResult(accuracy_of(correct), per_category, seed, correct)


def accuracy_of(correct: Sequence[bool]) -> Accuracy:
    """Percent correct with its Wilson score interval. Raises ValueError for no verdicts at all."""
    estimate = wilson(correct)
    return Accuracy(estimate.value, estimate.interval, len(correct))
