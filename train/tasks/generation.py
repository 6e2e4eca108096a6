"""Tasks whose target is an image of a prompt, or of an image that is seen."""

from __future__ import annotations

import numpy as np

from srum.shapes.hard_negatives import corrupt_prompt
from srum.shapes.matching import assign, related
from srum.shapes.prompts import sample_prompt
from srum.shapes.render import render
from srum.shapes.scenes import Scene, Spec, pick, random_scene, sample_scene
from srum.shapes.wording import PLAN_INSTRUCTION, RECONSTRUCT_TEMPLATES, REFINE_SYSTEM, REFINE_USER, plan_text
from srum.train.tasks.base import Asked, Part, Sample, attempt, composed_prompt, pictured, prompt_part

WRONG_CAPTIONS = 0.4


def caption_to_image(rng: np.random.Generator) -> Sample:
    """A caption, often wrong in one fact, and the image."""
    return _captioned(sample_prompt(rng), rng)


def composed_caption_to_image(rng: np.random.Generator) -> Sample:
    """The same for the categories that bind several facts together."""
    return _captioned(composed_prompt(rng), rng)


def _captioned(asked: Asked, rng: np.random.Generator) -> Sample:
    scene = sample_scene(asked[0], rng)
    if rng.random() < WRONG_CAPTIONS:
        asked = corrupt_prompt(asked[0], rng)
    return [prompt_part(asked), Part(drawn=render(scene), loss=True)]


def plan_then_image(rng: np.random.Generator) -> Sample:
    """The prompt, what goes where, and the image: all true."""
    asked = sample_prompt(rng)
    scene = sample_scene(asked[0], rng)
    return [
        Part(text=PLAN_INSTRUCTION),
        prompt_part(asked),
        Part(text=plan_text(scene.things), loss=True, droppable=True),
        Part(drawn=render(scene), loss=True),
    ]


def reconstruct(rng: np.random.Generator) -> Sample:
    """An image seen, a request to describe it, and the image (RecA)."""
    scene = random_scene(int(rng.integers(1, 7)), rng)
    image = render(scene)
    template = Part(text=pick(RECONSTRUCT_TEMPLATES, rng), droppable=True)
    return [Part(seen=image, droppable=True), template, Part(drawn=image, loss=True)]


def regenerate(rng: np.random.Generator) -> Sample:
    """An image seen that misses its prompt, the prompt, and an independent image that meets it (RvR)."""
    asked, scene = attempt(rng)
    while meets(scene, asked[0]):
        asked, scene = attempt(rng)
    return [
        Part(text=REFINE_SYSTEM),
        Part(seen=pictured(scene, rng).image, droppable=True),
        Part(text=REFINE_USER.format(prompt=asked[1]), droppable=True, asks=asked),
        Part(drawn=render(sample_scene(asked[0], rng)), loss=True),
    ]


def meets(scene: Scene, spec: Spec) -> bool:
    """Whether the scene is exactly what the spec asks for."""
    exact = assign(scene.things, spec).exact
    return len(exact) == len(scene.things) == spec.total and related(scene.things, spec)
