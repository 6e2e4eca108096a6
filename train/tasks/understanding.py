"""Tasks that ask what an image shows."""

from __future__ import annotations

import numpy as np

from srum.grounding.native import QUESTION as FIND_ALL
from srum.grounding.native import format_boxes
from srum.shapes.render import render
from srum.shapes.scenes import (
    RELATIONS,
    SHAPES,
    Scene,
    pick,
    random_scene,
    random_thing,
    relation_holds,
)
from srum.shapes.wording import in_reading_order, listed
from srum.train.tasks.base import Sample, asked_questions


def question_answering(rng: np.random.Generator) -> Sample:
    """Questions about a clean scene: what is where, how many, which colour, does a relation hold."""
    scene = random_scene(int(rng.integers(1, 6)), rng)
    asked = [QUESTIONS[index](scene, rng) for index in rng.integers(len(QUESTIONS), size=3)]
    return asked_questions(render(scene), asked)


def _ask_list(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return "List the things.", listed(scene.things)


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    shape = pick(SHAPES, rng)
    return f"How many {shape}s are there?", str(sum(thing.shape == shape for thing in scene.things))


def _ask_cell(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.8:
        thing = pick(scene.things, rng)
        row, column = thing.row, thing.column
    else:
        row, column = (int(x) for x in rng.integers(0, 4, 2))
    there = [thing.label for thing in scene.things if (thing.row, thing.column) == (row, column)]
    return f"What is at r{row + 1} c{column + 1}?", there[0] if there else "nothing"


def _ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    first, second = pick(scene.things, rng), pick(scene.things, rng)
    kind = pick(RELATIONS, rng)
    subjects = [t for t in scene.things if (t.shape, t.colour) == (first.shape, first.colour)]
    objects = [t for t in scene.things if (t.shape, t.colour) == (second.shape, second.colour)]
    holds = any(relation_holds(kind, s.centre, o.centre) for s in subjects for o in objects if s is not o)
    question = f"Is a {first.colour} {first.shape} {kind} a {second.colour} {second.shape}?"
    return question, "yes" if holds else "no"


def _ask_exists(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """About a thing that is there, or about any other than a held-out pair."""
    thing = pick(scene.things, rng) if rng.random() < 0.5 else random_thing(rng)
    there = any((t.shape, t.colour) == (thing.shape, thing.colour) for t in scene.things)
    return f"Is there a {thing.colour} {thing.shape}?", "yes" if there else "no"


QUESTIONS = (_ask_list, _ask_list, _ask_count, _ask_cell, _ask_relation, _ask_exists)


def find_all(rng: np.random.Generator) -> Sample:
    """Native grounding: the boxes of all things, in reading order."""
    scene = random_scene(int(rng.integers(0, 6)), rng)
    boxes = format_boxes([(thing.label, thing.box) for thing in in_reading_order(scene.things)])
    return asked_questions(render(scene), [(FIND_ALL, boxes)])
