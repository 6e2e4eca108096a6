"""Layout and detail at each denoising step (paper, Fig. 4): what does the image look like that a step heads for?

At timestep t the velocity v points to a clean latent, x_t - t v. Decoded, it is grounded, judged and checked as a
finished image would be. The judge is the same for all models that are compared; the checker only measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from PIL.Image import Image
from torch import Tensor

from srum import flow
from srum.config import EvalConfig
from srum.evaluation.accuracy import drawn, require_metadata
from srum.evaluation.judge_quality import Judge
from srum.models.base import Sampling, UnifiedModel, require
from srum.records import Name, Prompt, Record, Region, RegionJudgement, Score
from srum.run_dir import run_stage
from srum.shapes.checker import is_right

# images and prompts -> per image its regions, or none and what went wrong: ``grounding.base.ground``
Propose = Callable[[Sequence[Image], Sequence[str]], Sequence[tuple[list[Region], str | None]]]


class JudgedStep(Record):
    """The image that one step heads for.

    ``layout``: its layout score. ``detail``: the mean of its region scores, that of the background among them. Both
    None where the judge failed. ``correct``: what the exact checker says; None for a prompt of another world.
    """

    layout: Score | None
    detail: Score | None
    correct: bool | None


class JudgedSteps(Record):
    """The steps on the way to the image of one prompt, in order; a line of ``steps.jsonl``."""

    prompt_id: Name
    steps: list[JudgedStep]


@dataclass(frozen=True)
class StepScores:
    """Means over the prompts at the step that leaves timestep ``t``, in (0, 1], 1 is noise.

    ``layout`` and ``detail`` in [-1, 1], ``correct`` a share in [0, 1], each over the images that have it; None where
    none has.
    """

    t: float
    layout: float | None
    detail: float | None
    correct: float | None


def judge_steps(
    model: UnifiedModel,
    judge: Judge,
    propose: Propose,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    folder: Path,
    seed: int,
) -> list[JudgedSteps]:
    """Every step towards the image that ``evaluate`` makes of each prompt; ``steps.jsonl`` in ``folder``.

    It resumes by batches. Raises RunError for metadata or a size that the checker cannot read, and MissingAbility,
    before any image is made.
    """
    require(model, {"path"}, "looking at every step")
    require_metadata([prompt for prompt in prompts if prompt.metadata], config.size)

    def work(batch: Mapping[str, Prompt]) -> list[JudgedSteps]:
        asked = list(batch.values())
        paths = [image.path for image in drawn(model, batch, config, seed, path=True)]
        by_step = [look(step, asked) for step in zip(*(path.predictions for path in paths if path), strict=True)]
        return [JudgedSteps(prompt_id=p.id, steps=own) for p, *own in zip(asked, *by_step, strict=True)]

    def look(latents: Sequence[Tensor], asked: Sequence[Prompt]) -> list[JudgedStep]:
        images, texts = model.decode(latents), [prompt.text for prompt in asked]
        regions = [found for found, _ in propose(images, texts)]
        return [
            JudgedStep(
                layout=layout.score,
                detail=detail_score(of_regions),
                correct=is_right(image, prompt.metadata) if prompt.metadata else None,
            )
            for prompt, image, (of_regions, layout) in zip(
                asked, images, judge.judge(images, texts, regions), strict=True
            )
        ]

    by_id = {prompt.id: prompt for prompt in prompts}
    return list(run_stage(folder, "steps", JudgedSteps, by_id, config.batch_size, work))


def detail_score(regions: Sequence[RegionJudgement]) -> float | None:
    """The mean of the region scores in [-1, 1]; None without any."""
    return _mean([region.score for region in regions])


def summarize_steps(judged: Sequence[JudgedSteps], sampling: Sampling) -> list[StepScores]:
    """Step by step, the means over the prompts. Raises ValueError for other numbers of steps than the sampler's."""
    timesteps = flow.schedule(sampling.timesteps, sampling.timestep_shift)[:-1].tolist()
    return [
        StepScores(
            t, _mean([s.layout for s in steps]), _mean([s.detail for s in steps]), _mean([s.correct for s in steps])
        )
        for t, *steps in zip(timesteps, *(one.steps for one in judged), strict=True)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None
