"""What goes wrong: scenes with a generator's errors, and captions that are wrong in one fact, as web captions are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from srum.shapes.prompts import phrase, split_of
from srum.shapes.scenes import (
    COLOURS,
    GRID,
    INVERSE,
    MAX_THINGS,
    RELATIONS,
    SHAPES,
    SIZES,
    Relation,
    Scene,
    Spec,
    Thing,
    Want,
    canonical,
    mentions_held_out,
    pick,
    random_scene,
    random_thing,
    separated,
    shows_held_out,
)

Things = tuple[Thing, ...]
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}


# --- scenes


def perturb(scene: Scene, spec: Spec, rng: np.random.Generator) -> Scene:
    """The scene with one error of a generator, or (one in seven) with 0 to 7 things that nobody asked for.

    The errors: colours swapped, an attribute changed, a thing added, removed or doubled, two things that have changed
    places. With a relation in the spec, half of the errors are the two things in each other's place. No held-out pair
    appears, unless the scene already shows one.
    """
    while True:
        error = _trade_places if spec.relation and rng.random() < 0.5 else pick(_ERRORS, rng)
        things = error(scene.things, spec, rng)
        held_out = shows_held_out(things) and not shows_held_out(scene.things)
        if things != scene.things and separated(things) and not held_out:
            return Scene(things)


def flip_relation(scene: Scene, spec: Spec) -> Scene:
    """The scene with the related things in each other's place; unchanged where the spec asks for no relation."""
    return Scene(_trade_places(scene.things, spec, np.random.default_rng(0)))


def _swap_colours(things: Things, spec: Spec, rng: np.random.Generator) -> Things:
    if len(things) < 2:
        return things
    i, j = rng.permutation(len(things))[:2]
    return _replaced(things, {i: {"colour": things[j].colour}, j: {"colour": things[i].colour}})


def _change_attribute(things: Things, spec: Spec, rng: np.random.Generator) -> Things:
    """Another shape, or another colour or size where the spec names one."""
    if not things:
        return things
    named = [name for name in ATTRIBUTES if any(getattr(want, name) for want in spec.wants)]
    name, index = pick(named, rng), int(rng.integers(len(things)))
    return _replaced(things, {index: {name: pick(ATTRIBUTES[name], rng)}})


def _add(things: Things, spec: Spec, rng: np.random.Generator) -> Things:
    return _joined(things, random_thing(rng), rng)


def _duplicate(things: Things, spec: Spec, rng: np.random.Generator) -> Things:
    return _joined(things, pick(things, rng), rng) if things else things


def _remove(things: Things, spec: Spec, rng: np.random.Generator) -> Things:
    return _without(things, int(rng.integers(len(things)))) if things else things


def _trade_places(things: Things, spec: Spec, rng: np.random.Generator) -> Things:
    """The related things in each other's place; without a relation, nothing."""
    if spec.relation is None or len(things) < 2:
        return things
    places = [{"row": t.row, "column": t.column, "dx": t.dx, "dy": t.dy} for t in things[:2]]
    return _replaced(things, {0: places[1], 1: places[0]})


def _any_things(things: Things, spec: Spec, rng: np.random.Generator) -> Things:
    return random_scene(int(rng.integers(MAX_THINGS + 1)), rng).things


_ERRORS: tuple[Callable[[Things, Spec, np.random.Generator], Things], ...] = (
    _swap_colours,
    _change_attribute,
    _add,
    _duplicate,
    _remove,
    _trade_places,
    _any_things,
)


def _replaced(things: Things, changes: dict[int, dict[str, Any]]) -> Things:
    return tuple(replace(thing, **changes.get(index, {})) for index, thing in enumerate(things))


def _without(things: Things, index: int) -> Things:
    return things[:index] + things[index + 1 :]


def _joined(things: Things, thing: Thing, rng: np.random.Generator) -> Things:
    """The things and one more, moved to a free cell."""
    taken = {(other.row, other.column) for other in things}
    free = [(row, column) for row in range(GRID) for column in range(GRID) if (row, column) not in taken]
    if len(things) >= MAX_THINGS:
        return things
    row, column = pick(free, rng)
    return (*things, replace(thing, row=row, column=column))


# --- captions


def corrupt_spec(spec: Spec, rng: np.random.Generator) -> Spec:
    """The spec with one fact changed: a colour, a size, a shape, a count or the relation, among those it states.

    No held-out pair appears, unless the spec already names one.
    """
    facts = ["shape", *(name for name in ("colour", "size") if any(getattr(want, name) for want in spec.wants))]
    facts.append("count" if spec.relation is None else "relation")
    while True:
        try:
            changed = _with_fact_changed(spec, pick(facts, rng), rng)
        except ValueError:  # the change makes two wants overlap, or asks for too many things
            continue
        held_out = mentions_held_out(changed) and not mentions_held_out(spec)
        if canonical(changed) != canonical(spec) and not held_out:
            return changed


def corrupt_prompt(spec: Spec, rng: np.random.Generator, split: str = "train") -> tuple[Spec, str]:
    """A prompt of the split that differs from the spec in one fact: without asking the split again, a training prompt
    becomes one of another split in one of eight cases."""
    while True:
        changed = corrupt_spec(spec, rng)
        text = phrase(changed, rng)
        if split_of(changed, text) == split:
            return changed, text


def _with_fact_changed(spec: Spec, fact: str, rng: np.random.Generator) -> Spec:
    if fact == "relation" and spec.relation is not None:
        return replace(spec, relation=_other_relation(spec.relation, rng))
    index = int(rng.integers(len(spec.wants)))
    wants = list(spec.wants)
    wants[index] = _other_want(wants[index], fact, rng)
    return replace(spec, wants=tuple(wants))


def _other_want(want: Want, fact: str, rng: np.random.Generator) -> Want:
    if fact == "count":
        return replace(want, count=want.count + pick((-1, 1), rng))
    if getattr(want, fact) is None:
        return want
    change: dict[str, Any] = {fact: pick(ATTRIBUTES[fact], rng)}
    return replace(want, **change)


def _other_relation(relation: Relation, rng: np.random.Generator) -> Relation:
    """Half of the time the opposite side, as captions have it; otherwise any."""
    return replace(relation, kind=INVERSE[relation.kind] if rng.random() < 0.5 else pick(RELATIONS, rng))
