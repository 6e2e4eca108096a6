"""Fig. 4: images that are known at every step, judged by one who knows the truth; and means by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from srum.config import EvalConfig
from srum.evaluation.denoising import JudgedStep, JudgedSteps, StepScores, judge_steps, summarize_steps
from srum.flow import schedule
from srum.grounding.base import ground
from srum.grounding.classical import ClassicalGrounder
from srum.models.base import Generated, SampledPath, Sampling
from srum.records import Failure, LayoutJudgement, Prompt, Region, RegionJudgement
from srum.shapes.prompts import to_metadata
from srum.shapes.render import render
from srum.shapes.scenes import Scene, Spec, Thing, Want

RED, GREEN = (Thing("circle", colour, "large", 0, 0) for colour in ("red", "green"))
STEPS = [Scene(()), Scene((GREEN,)), Scene((RED,))]  # nothing yet, the wrong colour, what was asked for
ASKED = Prompt(id="a", text="a red circle", metadata=to_metadata(Spec((Want("circle", "red"),), "colors")))
ELSEWHERE = Prompt(id="b", text="a photo of a bear")
CONFIG = EvalConfig(timesteps=4, count=2)


class Painter:
    """Heads for the images of ``STEPS``, whatever the prompt; a latent is the image itself."""

    abilities = frozenset({"path"})

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def draw(self, contexts, sampling, seeds, *, sizes=None, path=False):  # type: ignore[no-untyped-def]
        assert len(STEPS) == sampling.timesteps - 1 and path
        self.calls.append([context[0].text for context in contexts])
        images = torch.stack([torch.tensor(render(scene)) for scene in STEPS])
        way = SampledPath(images, torch.ones(len(STEPS)), torch.zeros(len(STEPS), 1, 1, 1))
        return [Generated(Image.new("RGB", (1, 1)), images[-1], way) for _ in contexts]

    def decode(self, latents: Sequence[Tensor]) -> list[Image.Image]:
        return [Image.fromarray(latent.to(torch.uint8).numpy()) for latent in latents]


class Judge:
    """Finds red right (1) and all else wrong (-0.5); the background is right where there is a thing; layouts are 0.4,
    and where there is nothing a failure."""

    def judge(
        self, images: Sequence[Image.Image], prompts: Sequence[str], regions: Sequence[Sequence[Region]]
    ) -> list[tuple[list[RegionJudgement], LayoutJudgement]]:
        judged = []
        for image, own in zip(images, regions, strict=True):
            empty = all(region.id == 0 for region in own)
            failed = LayoutJudgement(score=None, failure=Failure.NO_SCORE)
            scores = [self.score(np.asarray(image), region, empty) for region in own]
            of_regions = [RegionJudgement(region_id=r.id, score=score) for r, score in zip(own, scores, strict=True)]
            judged.append((of_regions, failed if empty else LayoutJudgement(score=0.4)))
        return judged

    def score(self, pixels: np.ndarray, region: Region, empty: bool) -> float:
        if region.id == 0:
            return -1.0 if empty else 1.0
        x0, y0, x1, y1 = (int(value) for value in region.box)
        red, green, _ = pixels[(y0 + y1) // 2, (x0 + x1) // 2]
        return 1.0 if red > green else -0.5


def propose(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[tuple[list[Region], str | None]]:
    return ground(ClassicalGrounder(), images, prompts, max_regions=8)


def test_every_step_is_judged_as_the_image_that_it_heads_for(tmp_path: Path) -> None:
    """Detail is the mean over the regions and the background: -1, (-0.5 + 1) / 2, (1 + 1) / 2."""
    model = Painter()
    found = judge_steps(model, Judge(), propose, [ASKED, ELSEWHERE], CONFIG, tmp_path, seed=0)
    expected = [(None, -1.0, False), (0.4, 0.25, False), (0.4, 1.0, True)]
    assert [(step.layout, step.detail, step.correct) for step in found[0].steps] == expected
    assert [(step.layout, step.detail, step.correct) for step in found[1].steps] == [(*e[:2], None) for e in expected]
    assert found == judge_steps(model, Judge(), propose, [ASKED, ELSEWHERE], CONFIG, tmp_path, seed=0)
    assert model.calls == [["a red circle", "a photo of a bear"]]  # the second time nothing is made


def test_metadata_that_cannot_be_checked_is_named_first(tmp_path: Path) -> None:
    model, broken = Painter(), ASKED.model_copy(update={"metadata": {"include": []}})
    with pytest.raises(ValueError, match=r"prompt 'a' .* cannot be checked"):
        judge_steps(model, Judge(), propose, [broken], CONFIG, tmp_path, seed=0)
    assert model.calls == []


def steps_of(name: str, *steps: tuple[float | None, float | None, bool | None]) -> JudgedSteps:
    values = [JudgedStep(layout=layout, detail=detail, correct=correct) for layout, detail, correct in steps]
    return JudgedSteps(prompt_id=name, steps=values)


def test_means_are_over_what_has_a_score() -> None:
    """Two steps between three timesteps, which a shift of 3 puts at 1, 3/4, 0."""
    judged = [
        steps_of("a", (-1.0, None, False), (0.5, 1.0, True)),
        steps_of("b", (None, None, None), (-0.5, 0.5, None)),
        steps_of("c", (0.0, None, False), (0.6, 0.0, False)),
    ]
    sampling = Sampling(timesteps=3, timestep_shift=3.0)
    assert schedule(3, 3.0).tolist() == [1.0, 0.75, 0.0]
    assert summarize_steps(judged, sampling) == [
        StepScores(1.0, -0.5, None, 0.0),
        StepScores(0.75, pytest.approx(0.2), 0.5, 0.5),
    ]


def test_another_number_of_steps_than_the_samplers_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        summarize_steps([steps_of("a", (0.0, 0.0, None))], Sampling(timesteps=3))
