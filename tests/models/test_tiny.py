"""The weights that ship with the package: their size, and that the model draws, judges and grounds at all."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srum import models
from srum.drawing import draw_prompts, write_plans
from srum.grounding.base import ground, load_grounder
from srum.judging.self_judge import SelfJudge
from srum.models.bagel import Bagel
from srum.models.base import Sampling
from srum.shapes.prompts import sample_prompt
from srum.shapes.render import render
from srum.shapes.scenes import sample_scene

FOLDER = models.EMBEDDED["srum-tiny"]

pytestmark = pytest.mark.skipif(
    not (FOLDER / "ema.safetensors").is_file(), reason="srum/models/tiny has no weights yet: srum pretrain makes them"
)


@pytest.fixture(scope="module")
def model() -> Bagel:
    return models.load("srum-tiny", "cpu")


@pytest.fixture(scope="module")
def scenes() -> tuple[list[Image.Image], list[str]]:
    """Eight rendered scenes that meet their prompts."""
    rng = np.random.default_rng(0)
    drawn = [sample_prompt(rng) for _ in range(8)]
    return [Image.fromarray(render(sample_scene(spec, rng))) for spec, _ in drawn], [text for _, text in drawn]


def test_the_files_fit_into_a_package() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 25e6


def test_the_files_are_those_of_the_model_card() -> None:
    card = (Path(__file__).parents[2] / "docs" / "model-card.md").read_text()
    listed = dict(re.findall(r"^\| `([\w.]+)` \| `([0-9a-f]{64})` \|$", card, flags=re.MULTILINE))
    assert listed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.iterdir()}


def test_an_image_is_a_function_of_prompt_and_seed(model: Bagel) -> None:
    prompts = ["a red circle", "a small blue square", "a red circle"]
    sampling = Sampling(size=(64, 64), timesteps=4)
    first, second, third = draw_prompts(model, prompts, sampling, [1, 2, 3])
    (again,) = draw_prompts(model, prompts[:1], sampling, [1])
    assert first.image.size == (64, 64) and model.latent_grid((64, 64)) == (8, 8)
    rounding, other_seed = ((first.latent - x.latent).abs().mean() for x in (again, third))
    assert rounding < 0.15 * other_seed  # bfloat16 rounds differently in batches of different sizes
    assert second.image.size == (64, 64) and write_plans(model, prompts[:1], sampling, [1])[0]


def test_it_judges_and_grounds_in_the_formats_of_the_loop(
    model: Bagel, scenes: tuple[list[Image.Image], list[str]]
) -> None:
    images, prompts = scenes
    grounded = ground(load_grounder("native", model), images, prompts, max_regions=8)
    assert sum(error is None for _, error in grounded) >= 7
    regions = [found for found, _ in ground(load_grounder("classical", model), images, prompts, max_regions=8)]
    judged = SelfJudge(model).judge(images, prompts, regions)
    failed = [region.failure for found, layout in judged for region in (*found, layout) if region.failure]
    assert len(failed) <= 2
