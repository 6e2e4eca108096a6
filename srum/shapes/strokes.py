"""Scenes drawn in strokes: the plan of a stroke, the inspection of its draft, their grammar, and exact chains of them.

    plan        EDITS | LIST                  what changes now, and the whole scene as it will then be
    inspection  PLAN SIDE | IMAGE SIDE | VERDICT
                plan side: fits, or conflict, REASON; image side: fits, or what is missing, extra or badly drawn;
                verdict: continue, done, or EDITS where a side objects

The plan side asks whether the planned scene can still become what the prompt asks for, the image side whether the draft
shows the planned scene. Edits and lists are those of ``edits`` and ``wording``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from srum.shapes.edits import Edit, difference, format_edits, free_cells, parse_edits
from srum.shapes.matching import assign, completable, faults, matches, related, relation_sentence
from srum.shapes.scenes import (
    COLOURS,
    SIZES,
    Scene,
    Spec,
    Thing,
    pick,
    separated,
    shows_held_out,
)
from srum.shapes.wording import in_reading_order, listed, parse_things, placed

FITS = "fits"
CONFLICT = "conflict, "
DETOURS = 0.4  # share of the chains in which a stroke draws something that the next one changes

Verdict = Literal["continue", "done"]


@dataclass(frozen=True)
class Plan:
    """One stroke: the edits it makes, and the things there will be."""

    edits: tuple[Edit, ...]
    things: tuple[Thing, ...]

    def __str__(self) -> str:
        return f"{format_edits(self.edits)} | {listed(self.things)}"


def parse_plan(text: str) -> Plan:
    """What a plan's ``str`` is. Raises ValueError."""
    edits, separator, description = text.partition(" | ")
    if not separator:
        raise ValueError(f"the plan {text!r} has no description after ' | '")
    return Plan(parse_edits(edits), tuple(parse_things(description)))


@dataclass(frozen=True)
class Inspection:
    """What is wrong with the plan and with the image ("" where nothing is), and what to do: edits where one is."""

    plan_fault: str
    image_fault: str
    verdict: Verdict | tuple[Edit, ...]

    def __post_init__(self) -> None:
        if bool(self.plan_fault or self.image_fault) != isinstance(self.verdict, tuple):
            raise ValueError(f"the verdict {self.verdict!r} contradicts the two sides {self!s}")

    def __str__(self) -> str:
        verdict = self.verdict if isinstance(self.verdict, str) else format_edits(self.verdict)
        plan_side = CONFLICT + self.plan_fault if self.plan_fault else FITS
        return f"{plan_side} | {self.image_fault or FITS} | {verdict}"


def parse_inspection(text: str) -> Inspection:
    """What an inspection's ``str`` is. Raises ValueError, for a verdict that its two sides forbid, too."""
    sides = text.split(" | ")
    if len(sides) != 3:
        raise ValueError(f"the inspection {text!r} has {len(sides)} parts; expected plan, image and verdict")
    plan_side, image_side, verdict = sides
    if plan_side != FITS and not plan_side.startswith(CONFLICT):
        raise ValueError(f"the plan side is {plan_side!r}; expected {FITS!r} or {CONFLICT!r} and a reason")
    plan_fault = "" if plan_side == FITS else plan_side.removeprefix(CONFLICT)
    image_fault = "" if image_side == FITS else image_side
    if verdict == "continue":
        return Inspection(plan_fault, image_fault, "continue")
    return Inspection(plan_fault, image_fault, "done" if verdict == "done" else parse_edits(verdict))


# --- the truth about a draft


def inspect(
    planned: Sequence[Thing], shown: Sequence[Thing], mended: Sequence[Thing], spec: Spec, damaged: Collection[int] = ()
) -> Inspection:
    """The true inspection of a draft that shows the things ``shown``, of which ``damaged`` (by index) are badly drawn.

    Where a side objects, the edits make of what is shown the scene ``mended``.
    """
    plan_fault, image_fault = conflict(planned, spec), mismatch(planned, shown, damaged)
    if not plan_fault and not image_fault:
        return Inspection("", "", "done" if len(planned) == spec.total else "continue")
    changed = difference(shown, mended)
    kept = {placed(edit.before) for edit in changed if edit.before}
    again = [Edit(shown[i], shown[i]) for i in sorted(damaged) if placed(shown[i]) not in kept]
    return Inspection(plan_fault, image_fault, (*again, *changed))


def conflict(things: Sequence[Thing], spec: Spec) -> str:
    """Why the scene can no longer become what the spec asks for; "" where it can. What is missing is no conflict."""
    assignment = assign(things, spec)
    for index, thing in sorted(enumerate(things), key=lambda pair: (pair[1].row, pair[1].column)):
        if index in assignment.wrong:
            return f"{placed(thing)} should be {' and '.join(faults(thing, assignment.wrong[index]))}"
        if index not in assignment.exact:
            surplus = any(matches(thing, want) for want in spec.wants)
            return f"{placed(thing)} is {'one too many' if surplus else 'not asked for'}"
    if completable(things, spec):
        return ""
    if len(things) == 2 and not related(things, spec):
        return relation_sentence(spec, holds=False)
    return f"no place is left for the {assignment.missing[0].name}"


def mismatch(planned: Sequence[Thing], shown: Sequence[Thing], damaged: Collection[int] = ()) -> str:
    """The first thing, in reading order, that is extra, badly drawn or missing in what is shown; "" where none is."""
    wanted, there = (set(map(placed, things)) for things in (planned, shown))
    wrong = [(thing, "extra") for thing in shown if placed(thing) not in wanted]
    wrong += [(shown[i], "badly drawn") for i in damaged if placed(shown[i]) in wanted]
    wrong += [(thing, "missing") for thing in planned if placed(thing) not in there]
    first = min(wrong, key=lambda pair: (pair[0].row, pair[0].column), default=None)
    return "" if first is None else f"{first[1]} {placed(first[0])}"


# --- chains


def strokes(scene: Scene, spec: Spec, rng: np.random.Generator) -> list[Plan]:
    """A chain of strokes that ends in the scene, one that meets the spec: the first draws one thing, others one or two.

    Every planned scene is completable. In a share ``DETOURS`` of the chains one thing first comes in another place, or
    with a free attribute that it does not keep.
    """
    things = _ordered(scene.things, rng)
    ends = np.cumsum([1, *rng.integers(1, 3, size=len(things))])
    states = [things[: int(end)] for end in ends[ends < len(things)]]
    if states and rng.random() < DETOURS:
        at = int(rng.integers(len(states)))
        states[at] = _detour(states[at], things, spec, rng)
    states.append(things)
    plans, before = list[Plan](), list[Thing]()
    for state in states:
        plans.append(Plan(difference(before, state), tuple(state)))
        before = state
    return plans


def _ordered(things: Sequence[Thing], rng: np.random.Generator) -> list[Thing]:
    """In reading order, as asked for, or at random."""
    order = rng.random()
    if order < 0.3:
        return in_reading_order(things)
    return list(things) if order < 0.6 else [things[i] for i in rng.permutation(len(things))]


def _detour(state: list[Thing], scene: Sequence[Thing], spec: Spec, rng: np.random.Generator) -> list[Thing]:
    """The state, its last thing elsewhere or otherwise; as it was where no such scene is completable."""
    thing, rest = state[-1], state[:-1]
    row, column = pick(free_cells(scene), rng)
    ways = [replace(thing, row=row, column=column), replace(thing, size=pick(SIZES, rng))]
    ways.append(replace(thing, colour=pick(COLOURS, rng)))
    for index in rng.permutation(len(ways)):
        other = [*rest, ways[index]]
        if ways[index] != thing and completable(other, spec) and separated(other) and not shows_held_out(other):
            return other
    return state
