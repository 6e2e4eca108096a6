"""Drawing in strokes: plans, drafts on what is there, and inspections (the grammar: ``srum.shapes.strokes``)."""

from __future__ import annotations

import numpy as np

from srum.shapes.edits import Edit, apply, difference
from srum.shapes.hard_negatives import perturb
from srum.shapes.prompts import sample_prompt
from srum.shapes.render import render
from srum.shapes.scenes import Scene, Spec, Thing, sample_scene
from srum.shapes.strokes import Plan, conflict, inspect, strokes
from srum.shapes.wording import listed
from srum.train.tasks.base import Asked, Part, Picture, Sample, composed_prompt, pictured, prompt_part, source_parts
from srum.train.tasks.editing import MOST_EDITS

CONFLICTS = 0.35  # share of the inspections with a plan that cannot lead to the prompt's scene
MISMATCHES = 0.35  # share with an image that does not show what was planned


def _chain(asked: Asked, rng: np.random.Generator) -> list[Plan]:
    return strokes(sample_scene(asked[0], rng), asked[0], rng)


def _rendered(things: tuple[Thing, ...]) -> np.ndarray:
    return render(Scene(things))


def stroke_plan(rng: np.random.Generator) -> Sample:
    """The plan of a stroke: of the first, with its image, or of a later one on what is there."""
    asked = sample_prompt(rng)
    chain = _chain(asked, rng)
    at = int(rng.integers(len(chain)))
    plan = Part(text=str(chain[at]), loss=True, droppable=True)
    if at == 0:
        return [prompt_part(asked), plan, Part(drawn=_rendered(chain[0].things), loss=True)]
    before = chain[at - 1].things
    source = source_parts(_rendered(before))
    return [prompt_part(asked, droppable=False), *source, Part(text=listed(before)), plan]


def stroke_draft(rng: np.random.Generator) -> Sample:
    """What is there, a plan or a correction with the scene that it leads to, and the image of that."""
    while True:
        chain = _chain(composed_prompt(rng), rng)
        if len(chain) > 1:
            break
    at = int(rng.integers(1, len(chain)))
    before, plan = Scene(chain[at - 1].things), chain[at]
    if rng.random() < 0.3:
        before, plan = _mistaken(plan, rng)
    instruction = Part(text=str(plan), droppable=True)
    source = source_parts(pictured(before, rng, distorted=0.1).image)
    return [*source, instruction, Part(drawn=render(apply(before, plan.edits)), loss=True)]


def _mistaken(plan: Plan, rng: np.random.Generator) -> tuple[Scene, Plan]:
    """A draft that does not show what was planned, and the edits that mend it."""
    while True:
        shown = perturb(Scene(plan.things), sample_prompt(rng)[0], rng)
        edits = difference(shown.things, plan.things)
        if 1 <= len(edits) <= MOST_EDITS:
            return shown, Plan(edits, plan.things)


def stroke_inspect(rng: np.random.Generator) -> Sample:
    """The prompt, the plan of a stroke, its draft, and what is wrong with either."""
    asked = sample_prompt(rng)
    chain = _chain(asked, rng)
    plan = chain[int(rng.integers(len(chain)))]
    fault = rng.random()
    planned = _conflicting(plan, asked[0], rng) if fault < CONFLICTS else plan
    picture = pictured(Scene(planned.things), rng, distorted=0.0)
    if CONFLICTS <= fault < CONFLICTS + MISMATCHES:
        picture = _mismatching(planned, asked[0], rng)
    reply = inspect(planned.things, picture.things, plan.things, asked[0], picture.damaged)
    return [
        prompt_part(asked, droppable=False),
        Part(text=str(planned)),
        Part(seen=picture.image),
        Part(text=str(reply), loss=True),
    ]


def _conflicting(plan: Plan, spec: Spec, rng: np.random.Generator) -> Plan:
    """The plan with an error that shows in what it plans; the plan itself where ten tries gave none."""
    for _ in range(10):
        things = perturb(Scene(plan.things), spec, rng).things
        changed = difference(plan.things, things)
        if things and conflict(things, spec) and len(changed) <= MOST_EDITS:
            return Plan(_instructions(plan, things), things)
    return plan


def _instructions(plan: Plan, things: tuple[Thing, ...]) -> tuple[Edit, ...]:
    """How the stroke would come to these things from where it began."""
    began = [thing for thing in plan.things if not any(edit.after == Edit(thing, None).before for edit in plan.edits)]
    return difference(began, things) or (Edit(None, things[0]),)


def _mismatching(plan: Plan, spec: Spec, rng: np.random.Generator) -> Picture:
    """A draft that shows something else, or the planned scene badly drawn but without blobs, which no edit removes."""
    scene = Scene(plan.things)
    while True:
        picture = pictured(scene if rng.random() < 0.4 else perturb(scene, spec, rng), rng, distorted=0.5)
        if not picture.blobs and len(difference(picture.things, plan.things)) <= MOST_EDITS:
            return picture
