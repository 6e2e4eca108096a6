"""Changing an image as told, and saying how an image must be changed."""

from __future__ import annotations

import numpy as np

from srum.shapes.edits import Edit, apply, difference, format_edits, reflection, repair
from srum.shapes.hard_negatives import perturb
from srum.shapes.prompts import sample_prompt
from srum.shapes.render import render
from srum.shapes.scenes import Scene, Spec, Thing, pick, random_scene, sample_scene
from srum.shapes.wording import EDIT_MARK, REFLECT_QUESTION
from srum.train.tasks.base import (
    Asked,
    Drawing,
    Part,
    Picture,
    Sample,
    asked_questions,
    attempt,
    pictured,
    recognised,
    source_parts,
)
from srum.train.tasks.judging import compared_with

MOST_EDITS = 3
RIGHT = 1 / 3  # share of the rendered attempts that need no edit
WRONG_REPLIES = 0.15  # share of the reflections whose second line is wrong: what is left for reinforcement to learn


def edit(rng: np.random.Generator) -> Sample:
    """An image, edits of it, and the image after them: repairs of an attempt, or edits that nobody asked for."""
    if rng.random() < 0.5:
        _, scene, edits = missed_attempt(rng)
    else:
        scene, edits = _any_edits(rng)
    instruction = Part(text=EDIT_MARK + format_edits(edits), droppable=True)
    target = Part(drawn=render(apply(scene, edits)), loss=True)
    return [*source_parts(pictured(scene, rng).image), instruction, target]


def missed_attempt(rng: np.random.Generator) -> tuple[Asked, Scene, tuple[Edit, ...]]:
    """An attempt that misses its prompt, and the one to three edits that mend it."""
    while True:
        asked, scene = attempt(rng)
        edits = repaired(scene.things, asked[0])
        if edits:
            return asked, scene, edits


def repaired(things: tuple[Thing, ...], spec: Spec, damaged: frozenset[int] = frozenset()) -> tuple[Edit, ...] | None:
    """The edits that mend the scene, at most ``MOST_EDITS``; None where there are no such ones."""
    try:
        edits = repair(things, spec, damaged)
    except ValueError:
        return None
    return edits if len(edits) <= MOST_EDITS else None


def _any_edits(rng: np.random.Generator) -> tuple[Scene, tuple[Edit, ...]]:
    """A scene, and how another that is like it differs from it."""
    while True:
        scene = random_scene(int(rng.integers(1, 6)), rng)
        other, spec = scene, sample_prompt(rng)[0]
        for _ in range(rng.choice((1, 2))):
            other = perturb(other, spec, rng)
        edits = difference(scene.things, other.things)
        if 1 <= len(edits) <= MOST_EDITS:
            return scene, edits


def reflect(rng: np.random.Generator) -> Sample:
    """An attempt, its prompt, and what must change."""
    if rng.random() < RIGHT:
        asked = sample_prompt(rng)
        scene = sample_scene(asked[0], rng)
        return _reflected(Picture(render(scene), scene.things), asked, (), rng)
    while True:
        asked, scene = attempt(rng)
        picture = pictured(scene, rng)
        edits = None if picture.blobs else repaired(picture.things, asked[0], picture.damaged)
        if edits:
            return _reflected(picture, asked, edits, rng)


def reflect_own(rng: np.random.Generator, drawing: Drawing) -> Sample:
    """The same about an image that the model has drawn; where no edits can mend it, about a rendered one."""
    picture, asked = recognised(drawing.image), compared_with(drawing, rng)
    cells = {(thing.row, thing.column) for thing in picture.things}
    edits = repaired(picture.things, asked[0], picture.damaged)
    if picture.blobs or len(cells) < len(picture.things) or edits is None:
        return reflect(rng)
    return _reflected(picture, asked, edits, rng)


def _reflected(picture: Picture, asked: Asked, edits: tuple[Edit, ...], rng: np.random.Generator) -> Sample:
    if rng.random() < WRONG_REPLIES:
        edits = _wrong(picture, edits, rng)
    reply = reflection(picture.things, asked[0], edits)
    return asked_questions(picture.image, [(REFLECT_QUESTION.format(prompt=asked[1]), reply)], asked)


def _wrong(picture: Picture, edits: tuple[Edit, ...], rng: np.random.Generator) -> tuple[Edit, ...]:
    """Stopping where something must change, changing what is right, or removing something."""
    if edits and (rng.random() < 0.5 or not picture.things):
        return ()
    return (Edit(pick(picture.things, rng), None),) if picture.things else edits
