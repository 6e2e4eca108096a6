"""Judging an attempt at a prompt, rendered or drawn by the model itself, in the reply format of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from srum.judging.instructions import layout_reply, load_instructions, region_reply
from srum.records import Box, Region
from srum.shapes.hard_negatives import corrupt_prompt
from srum.shapes.matching import matches
from srum.shapes.scenes import Spec, Thing, pick
from srum.shapes.truth import STRAY_BLOB, Truth, layout_truth, region_truth
from srum.shapes.wording import analysis, listed, numbered
from srum.train.tasks.base import Asked, Drawing, Picture, Sample, asked_questions, attempt, pictured, recognised

OTHER_PROMPT = 0.3  # share of the model's own drawings that are compared with a prompt that differs in one fact

_judge = load_instructions("compact")


def judge(rng: np.random.Generator) -> Sample:
    """One or two regions of an attempt, and in part of the samples the background and the layout."""
    asked, scene = attempt(rng)
    return _judged(pictured(scene, rng), asked, rng)


def judge_own(rng: np.random.Generator, drawing: Drawing) -> Sample:
    """The same about an image that the model has drawn."""
    return _judged(recognised(drawing.image), compared_with(drawing, rng), rng)


def compared_with(drawing: Drawing, rng: np.random.Generator) -> Asked:
    """The prompt of a drawing, or sometimes one that differs from it in a fact."""
    return corrupt_prompt(drawing.asked[0], rng) if rng.random() < OTHER_PROMPT else drawing.asked


def _judged(picture: Picture, asked: Asked, rng: np.random.Generator) -> Sample:
    spec, prompt = asked
    things, damaged, blobs = picture.things, picture.damaged, picture.blobs
    questions = [_about_thing(things, i, asked, i in damaged, rng) for i in _chosen(picture, spec, rng)]
    if blobs and rng.random() < 0.5:
        questions.append(_about_region(prompt, pick(blobs, rng), STRAY_BLOB, "nothing here", rng))
    if not questions or rng.random() < 0.5:
        truth = region_truth(None, things, spec, bool(blobs))
        truth = replace(truth, label=f"background around {listed(things)}")
        questions.append(_about_region(prompt, None, truth, numbered(spec), rng))
    if rng.random() < (1.0 if spec.relation else 0.5):
        truth = layout_truth(things, spec)
        questions.append(
            (_judge.about_layout(prompt), layout_reply(truth.score, truth.reason, analysis=analysis(things, spec)))
        )
    return asked_questions(picture.image, questions, asked)


def _chosen(picture: Picture, spec: Spec, rng: np.random.Generator) -> list[int]:
    """The things to judge: one that is wrong, and in half of the samples one that is right."""
    things, damaged = picture.things, picture.damaged
    other = [i for i, t in enumerate(things) if not any(matches(t, want) for want in spec.wants)]
    near = [i for i in other if i not in damaged and any(want.shape == things[i].shape for want in spec.wants)]
    right = [i for i in range(len(things)) if i not in other and i not in damaged]
    wrong = near or other or sorted(damaged)
    return [pick(pool, rng) for pool in (wrong, right if rng.random() < 0.5 else []) if pool]


def _about_thing(
    things: Sequence[Thing], index: int, asked: Asked, damaged: bool, rng: np.random.Generator
) -> tuple[str, str]:
    spec, prompt = asked
    truth = region_truth(things[index], things, spec, damaged)
    shape = things[index].shape
    wanted = ", ".join(want.name for want in spec.wants if want.shape == shape) or f"no {shape}"
    return _about_region(prompt, things[index].box, truth, wanted, rng)


def _about_region(prompt: str, box: Box | None, truth: Truth, asked: str, rng: np.random.Generator) -> tuple[str, str]:
    """Question and reply about a region, its box slightly moved, or about the background (None)."""
    number, place = 0, (0.0, 0.0, 64.0, 64.0)
    if box is not None:
        number, place = int(rng.integers(1, 7)), tuple(np.clip(np.asarray(box) + rng.uniform(-1.2, 1.2, 4), 0, 64))
    region = Region(id=number, box=place, area=1.0, source="truth")
    return _judge.about_regions(prompt, [region]), region_reply(number, truth.label, truth.score, truth.reason, asked)
