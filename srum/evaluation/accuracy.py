"""Accuracy on the embedded world: images of prompts, the exact checker, intervals.

``srum bench shapes`` is this evaluation for any weights: the same images by the same seeds, the same verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from srum.config import EvalConfig
from srum.disk import require_room_for_images
from srum.drawing import Chain, Draw, Shot, draw_planned
from srum.evaluation.statistics import wilson
from srum.images import save_image
from srum.models.base import Generated, Sampling, UnifiedModel
from srum.processes import Processes
from srum.records import Name, Prompt, Record, RunPath, Score
from srum.run_dir import RunError, run_stage
from srum.seeding import seed_for
from srum.shapes.checker import check, is_right
from srum.shapes.prompts import from_metadata
from srum.shapes.scenes import IMAGE_SIZE


class CheckedShot(Record):
    """One image of a chain: what the checker says of it, and the judge's score; what the model wrote before it."""

    image: RunPath
    correct: bool
    score: Score | None = None
    seed: int | None = None
    said: str | None = None


class CheckedImage(Record):
    """The checker's verdict on the image of one prompt, ``images/<prompt id>.png``; a line of ``verdicts.jsonl``.

    ``shots``: of a chain of images the verdicts on all, the first as it was drawn once; ``kept`` is the number of the
    one that counts, ``end`` what the model said of the last.
    """

    prompt_id: Name
    prompt: str
    category: str
    correct: bool
    reasons: list[str]
    shots: list[CheckedShot] = Field(default_factory=list)
    kept: int | None = None
    end: str | None = None

    def files(self) -> list[str]:
        """The image, and those of the chain."""
        return [f"images/{self.prompt_id}.png", *(shot.image for shot in self.shots)]


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


def evaluate(
    model: UnifiedModel,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    folder: Path,
    seed: int,
    draw: Draw | None = None,
) -> EvalResult:
    """One image per prompt, checked; ``verdicts.jsonl`` and ``images/`` in ``folder``, which resumes by batches.

    ``draw``: how, where it is not once; the images on the way are then kept in ``shots/`` and checked, too.

    The noise of an image depends on ``seed`` and the prompt's id alone, so that models compare image by image. Raises
    RunError as ``require_metadata``, before any image is made.
    """
    require_metadata(prompts, config.size)

    def once(batch: Mapping[str, Prompt]) -> list[Chain]:
        return [Chain([Shot(made.image)], 0) for made in drawn(model, batch, config, seed)]

    def work(batch: Mapping[str, Prompt]) -> list[CheckedImage]:
        chains = zip(batch.values(), (draw or once)(batch), strict=True)
        return [_checked(folder, prompt, chain, whole=draw is not None) for prompt, chain in chains]

    by_id = {prompt.id: prompt for prompt in prompts}
    images = [f"images/{name}.png" for name in by_id]
    Processes.here().once(lambda: require_room_for_images(folder, config.size, images))
    return summarize(run_stage(folder, "verdicts", CheckedImage, by_id, config.batch_size, work), seed)


def _checked(folder: Path, prompt: Prompt, chain: Chain, whole: bool) -> CheckedImage:
    """The verdict on the image that counts, which is saved; with the ``whole`` chain beside it."""
    save_image(chain.image, folder / "images" / f"{prompt.id}.png")
    verdict = check(np.asarray(chain.image.convert("RGB")), prompt.metadata)
    return CheckedImage(
        prompt_id=prompt.id,
        prompt=prompt.text,
        category=verdict.category,
        correct=verdict.correct,
        reasons=verdict.reasons,
        shots=[_checked_shot(folder, prompt, shot, n) for n, shot in enumerate(chain.shots)] if whole else [],
        kept=chain.kept if whole else None,
        end=chain.end if whole else None,
    )


def _checked_shot(folder: Path, prompt: Prompt, shot: Shot, number: int) -> CheckedShot:
    name = f"shots/{prompt.id}-{number}.png"
    save_image(shot.image, folder / name)
    correct = is_right(shot.image, prompt.metadata)
    return CheckedShot(image=name, correct=correct, score=shot.score, seed=shot.seed, said=shot.said)


def drawn(
    model: UnifiedModel, prompts: Mapping[str, Prompt], config: EvalConfig, seed: int, path: bool = False
) -> list[Generated]:
    """An image of each prompt, by id, as ``config`` says; noise and plan have a seed each, of ``seed`` and the id."""
    return [made for made, _ in drawn_planned(model, prompts, config, seed, path)]


def drawn_planned(
    model: UnifiedModel, prompts: Mapping[str, Prompt], config: EvalConfig, seed: int, path: bool = False
) -> list[tuple[Generated, str | None]]:
    """The same with the plans, None where ``config`` has none."""
    noise, plan = ([seed_for(seed, name, purpose) for name in prompts] for purpose in ("eval", "plan"))
    plans = plan if config.plan else [None] * len(prompts)
    texts = [prompt.text for prompt in prompts.values()]
    return draw_planned(model, texts, Sampling(**config.sampling()), noise, plans, path)


def require_metadata(prompts: Sequence[Prompt], size: tuple[int, int]) -> None:
    """Raises RunError, naming the prompt, where the exact checker could not read what is asked for, and where it could
    not read images of ``size`` (H, W)."""
    if prompts and size != (IMAGE_SIZE, IMAGE_SIZE):
        height, width = size
        raise RunError(f"eval.size: the exact checker reads images of {IMAGE_SIZE}x{IMAGE_SIZE}, not {height}x{width}")
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
