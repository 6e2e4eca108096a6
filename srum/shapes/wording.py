"""How things, their places and what a prompt asks for are written: in plans, lists, questions and replies.

Also the instructions of ``srum-tiny``: what its pretraining and its use must spell alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from srum.shapes.prompts import NUMBERS
from srum.shapes.scenes import COLOURS, GRID, INVERSE, SHAPES, SIZES, Spec, Thing

PLAN_INSTRUCTION = "Plan, then draw."
REFLECT_QUESTION = "Compare with: {prompt}. What must change?"
STOP = "No further edit needed."
EDIT_MARK = "Edit: "
REFINE_SYSTEM = "Draw it again, as asked."
REFINE_USER = "Prompt: {prompt}"
RECONSTRUCT_TEMPLATES = (
    "Describe the image in detail.",
    "Tell me everything you see.",
    "What is in the image?",
    "What is where?",
    "Shapes, colours, sizes and places.",
    "Which things are there, and how are they arranged?",
    "Give a full account of the picture.",
    "Shape, colour, size and place of every thing, please.",
)

LABEL_PATTERN = rf"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
CELL_PATTERN = rf"r([1-{GRID}]) c([1-{GRID}])"
_PLACED = re.compile(f"{LABEL_PATTERN} {CELL_PATTERN}")


def cell_of(thing: Thing) -> str:
    """Row and column of the 4x4 grid, counted from 1, such as "r1 c3"."""
    return f"r{thing.row + 1} c{thing.column + 1}"


def placed(thing: Thing) -> str:
    """A thing and its cell, such as "small red circle r1 c3"."""
    return f"{thing.label} {cell_of(thing)}"


def plan_text(things: Sequence[Thing]) -> str:
    """What goes where."""
    return ", ".join(placed(thing) for thing in things)


def in_reading_order(things: Sequence[Thing]) -> list[Thing]:
    """The things row by row, each row from the left."""
    return sorted(things, key=lambda thing: (thing.row, thing.column))


def listed(things: Sequence[Thing]) -> str:
    """All things and their places, in reading order; "nothing" where there is none."""
    return plan_text(in_reading_order(things)) or "nothing"


def parse_things(text: str) -> list[Thing]:
    """The things of a list as ``listed`` and ``plan_text`` write it, each in the middle of its cell.

    Raises ValueError that quotes what is no thing in its place.
    """
    return [] if text == "nothing" else [_read_placed(entry) for entry in text.split(", ")]


def _read_placed(entry: str) -> Thing:
    match = _PLACED.fullmatch(entry)
    if match is None:
        raise ValueError(f"{entry!r} is no thing in its place, such as 'small red circle r1 c3'")
    return read_thing(match.groups())


def read_thing(words: Sequence[str]) -> Thing:
    """The thing of the groups that ``LABEL_PATTERN`` and ``CELL_PATTERN`` have matched."""
    size, colour, shape, row, column = words
    return Thing(shape, colour, size, int(row) - 1, int(column) - 1)


def numbered(spec: Spec) -> str:
    """What is asked for, with numbers in words, such as "one red circle, two stars"."""
    return ", ".join(f"{NUMBERS[want.count]} {want.name}" for want in spec.wants)


def analysis(things: Sequence[Thing], spec: Spec, counts_alone: bool = True) -> str:
    """What is there, and what is asked of it: the number of things (``counts_alone``) or all of them, or a relation.

    For a relation things are listed along its axis, so that the order of the names tells whether it holds: read off the
    image, not off other words of the reply (docs/lab-notes.md, 14).
    """
    if spec.relation is None:
        return f"{listed(things)}; asked for {NUMBERS[spec.total] if counts_alone else numbered(spec)}"
    subject, kind, object_ = spec.relation.subject_index, spec.relation.kind, spec.relation.object_index
    if kind in ("right of", "below"):
        subject, kind, object_ = object_, INVERSE[kind], subject
    if kind == "left of":
        side, ordered = "left", sorted(things, key=lambda thing: (thing.column, thing.row))
        places = [f"{thing.label} c{thing.column + 1}" for thing in ordered]
    else:
        side, ordered = "top", in_reading_order(things)
        places = [f"{thing.label} r{thing.row + 1}" for thing in ordered]
    asked = f"{spec.wants[subject].name} {kind} {spec.wants[object_].name}"
    return f"from the {side}: {', '.join(places) or 'nothing'}; asked for {asked}"
