"""Tasks that ask what an image shows."""

from __future__ import annotations

import numpy as np

from srum.grounding.native import QUESTION as FIND_ALL
from srum.grounding.native import format_boxes
from srum.shapes.questions import SHORT, ask_list
from srum.shapes.render import render
from srum.shapes.scenes import random_scene
from srum.shapes.wording import in_reading_order
from srum.train.tasks.base import Sample, asked_questions

QUESTIONS = (ask_list, ask_list, *SHORT)


def question_answering(rng: np.random.Generator) -> Sample:
    """Questions about a clean scene: what is where, how many, which colour, does a relation hold."""
    scene = random_scene(int(rng.integers(1, 6)), rng)
    asked = [QUESTIONS[index](scene, rng) for index in rng.integers(len(QUESTIONS), size=3)]
    return asked_questions(render(scene), asked)


def find_all(rng: np.random.Generator) -> Sample:
    """Native grounding: the boxes of all things, in reading order."""
    scene = random_scene(int(rng.integers(0, 6)), rng)
    boxes = format_boxes([(thing.label, thing.box) for thing in in_reading_order(scene.things)])
    return asked_questions(render(scene), [(FIND_ALL, boxes)])
