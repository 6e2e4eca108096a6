"""Short questions about a scene, with their answers: what is there, how many, where, in which relation."""

from __future__ import annotations

import numpy as np

from srum.shapes.scenes import MAX_THINGS, RELATIONS, SHAPES, Scene, Spec, pick, random_thing, relation_holds
from srum.shapes.wording import listed


def ask_list(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return "List the things.", listed(scene.things)


def ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    shape = pick(SHAPES, rng)
    return f"How many {shape}s are there?", str(sum(thing.shape == shape for thing in scene.things))


def ask_cell(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.8:
        thing = pick(scene.things, rng)
        row, column = thing.row, thing.column
    else:
        row, column = (int(x) for x in rng.integers(0, 4, 2))
    there = [thing.label for thing in scene.things if (thing.row, thing.column) == (row, column)]
    return f"What is at r{row + 1} c{column + 1}?", there[0] if there else "nothing"


def ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    first, second = pick(scene.things, rng), pick(scene.things, rng)
    kind = pick(RELATIONS, rng)
    subjects = [t for t in scene.things if (t.shape, t.colour) == (first.shape, first.colour)]
    objects = [t for t in scene.things if (t.shape, t.colour) == (second.shape, second.colour)]
    holds = any(relation_holds(kind, s.centre, o.centre) for s in subjects for o in objects if s is not o)
    question = f"Is a {first.colour} {first.shape} {kind} a {second.colour} {second.shape}?"
    return question, "yes" if holds else "no"


def ask_exists(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """About a thing that is there, or about any other than a held-out pair."""
    thing = pick(scene.things, rng) if rng.random() < 0.5 else random_thing(rng)
    there = any((t.shape, t.colour) == (thing.shape, thing.colour) for t in scene.things)
    return f"Is there a {thing.colour} {thing.shape}?", "yes" if there else "no"


SHORT = (ask_count, ask_cell, ask_relation, ask_exists)  # what is answered in a few words
YES_NO = ("yes", "no")
COUNTS = tuple(str(count) for count in range(MAX_THINGS + 1))


def facts(spec: Spec) -> list[tuple[str, str, tuple[str, ...]]]:
    """What a scene must be asked to know whether it is the one that is asked for: questions, right answers, choices.

    Of every shape how many there are, of every coloured thing whether it is there, and the relation of two coloured
    ones. Sizes are not asked for: no question of these words is about them.
    """
    counts = {shape: sum(want.count for want in spec.wants if want.shape == shape) for shape in SHAPES}
    asked = [(f"How many {shape}s are there?", str(count), COUNTS) for shape, count in counts.items()]
    coloured = [want for want in spec.wants if want.colour is not None]
    asked += [(f"Is there a {want.colour} {want.shape}?", "yes", YES_NO) for want in coloured]
    if spec.relation is not None and len(coloured) == len(spec.wants):
        first, second = spec.wants[spec.relation.subject_index], spec.wants[spec.relation.object_index]
        related = f"Is a {first.colour} {first.shape} {spec.relation.kind} a {second.colour} {second.shape}?"
        asked.append((related, "yes", YES_NO))
    return asked
