"""Edits of a scene: what one says, what it does to a scene, and which ones would mend a scene for a prompt.

An edit is one thing put in the place of another, or a thing that comes or goes. Written (docs/specs are the source of
the wording), several joined by "; ", each acting on the scene that those before it have left:

    add a LABEL rR cC                       remove the LABEL rR cC
    make the LABEL rR cC WORDS              turn the LABEL rR cC into a LABEL
    move the LABEL rR cC to rR cC

WORDS are the size and the colour that change. A thing turned into what it is already is drawn again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from srum.shapes.matching import assign, completable, related
from srum.shapes.scenes import COLOURS, GRID, HELD_OUT_PAIRS, SIZES, Scene, Spec, Thing, Want, separated
from srum.shapes.wording import (
    CELL_PATTERN,
    EDIT_MARK,
    LABEL_PATTERN,
    STOP,
    analysis,
    cell_of,
    in_reading_order,
    placed,
    read_thing,
)

Kind = Literal["add", "remove", "make", "turn", "move"]
ADDED_SIZE = "large"  # of a thing whose size is free: an instruction leaves nothing to chance

_ADD = re.compile(f"add a {LABEL_PATTERN} {CELL_PATTERN}")
_REMOVE = re.compile(f"remove the {LABEL_PATTERN} {CELL_PATTERN}")
_MAKE = re.compile(
    f"make the {LABEL_PATTERN} {CELL_PATTERN} (?:({'|'.join(SIZES)})(?: ({'|'.join(COLOURS)}))?|({'|'.join(COLOURS)}))"
)
_TURN = re.compile(f"turn the {LABEL_PATTERN} {CELL_PATTERN} into a {LABEL_PATTERN}")
_MOVE = re.compile(f"move the {LABEL_PATTERN} {CELL_PATTERN} to {CELL_PATTERN}")


@dataclass(frozen=True)
class Edit:
    """``after`` in the place of ``before``; None where nothing was, or nothing shall be.

    Where in its cell a thing sits is no part of an edit.
    """

    before: Thing | None
    after: Thing | None

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            thing = getattr(self, name)
            object.__setattr__(self, name, thing and replace(thing, dx=0.0, dy=0.0))
        if self.before is None and self.after is None:
            raise ValueError("an edit needs a thing before it, or one after it")
        if self.before and self.after and self.kind != "move" and cell_of(self.before) != cell_of(self.after):
            raise ValueError(f"{placed(self.before)} cannot move and change in one edit")

    @property
    def kind(self) -> Kind:
        if self.before is None:
            return "add"
        if self.after is None:
            return "remove"
        if self.before.label == self.after.label:
            return "turn" if self.before == self.after else "move"
        return "make" if self.before.shape == self.after.shape else "turn"

    def __str__(self) -> str:
        before, after = self.before, self.after
        if before is None:
            assert after is not None
            return f"add a {placed(after)}"
        if after is None:
            return f"remove the {placed(before)}"
        if self.kind == "move":
            return f"move the {placed(before)} to {cell_of(after)}"
        if self.kind == "turn":
            return f"turn the {placed(before)} into a {after.label}"
        changed = [new for new, old in ((after.size, before.size), (after.colour, before.colour)) if new != old]
        return f"make the {placed(before)} {' '.join(changed)}"


def format_edits(edits: Sequence[Edit]) -> str:
    """The edits in words."""
    return "; ".join(map(str, edits))


def parse_edits(text: str) -> tuple[Edit, ...]:
    """What ``format_edits`` wrote. Raises ValueError that quotes what is no edit."""
    return tuple(_parse_edit(part) for part in text.split("; "))


def _parse_edit(text: str) -> Edit:
    if match := _ADD.fullmatch(text):
        return Edit(None, read_thing(match.groups()))
    for pattern in (_REMOVE, _MAKE, _TURN, _MOVE):
        if match := pattern.fullmatch(text):
            before, rest = read_thing(match.groups()[:5]), match.groups()[5:]
            return Edit(before, _changed(before, pattern, rest))
    raise ValueError(f"{text!r} is no edit, such as 'remove the small red circle r1 c3'")


def _changed(before: Thing, pattern: re.Pattern[str], rest: Sequence[str | None]) -> Thing | None:
    if pattern is _REMOVE:
        return None
    if pattern is _MOVE:
        return replace(before, row=int(rest[0] or 0) - 1, column=int(rest[1] or 0) - 1)
    if pattern is _TURN:
        size, colour, shape = (word or "" for word in rest)
        return replace(before, size=size, colour=colour, shape=shape)
    return replace(before, size=rest[0] or before.size, colour=rest[1] or rest[2] or before.colour)


def apply(scene: Scene, edits: Sequence[Edit]) -> Scene:
    """The scene after the edits, one after the other; what comes new sits in the middle of its cell.

    Raises ValueError where a thing is not there, or the cell it should come to is taken.
    """
    for edit in edits:
        scene = Scene(tuple(_applied(scene.things, edit)))
    return scene


def _applied(things: Sequence[Thing], edit: Edit) -> Iterator[Thing]:
    before, after = edit.before, edit.after
    if before is not None and placed(before) not in map(placed, things):
        raise ValueError(f"there is no {placed(before)}")
    for thing in things:
        if before is None or placed(thing) != placed(before):
            yield thing
        elif after is not None:
            yield replace(after, dx=thing.dx, dy=thing.dy)
    if before is None and after is not None:
        yield after


# --- which edits


def repair(things: Sequence[Thing], spec: Spec, damaged: Collection[int] = ()) -> tuple[Edit, ...]:
    """The edits after which the scene is what the spec asks for; none where it is so already.

    Things in reading order: those with a wrong attribute are made right, those badly drawn (``damaged``, by index)
    drawn again, those not asked for turned into what is missing, or removed. Then what is still missing is added in the
    first free cell where it can be, and a relation is mended by moving its subject, or its object, to the first that
    will do.
    Raises ValueError where no such edits are known.
    """
    assignment = assign(things, spec)
    missing = list(assignment.missing)
    edits: list[Edit] = []
    now: list[Thing] = []
    for index in sorted(range(len(things)), key=lambda i: (things[i].row, things[i].column)):
        thing, after = things[index], None
        if index in assignment.exact:
            after = thing
        elif index in assignment.wrong:
            after = fitted(thing, assignment.wrong[index])
        elif missing:
            after = fitted(thing, missing.pop(0))
        if after != thing or index in damaged:
            edits.append(Edit(thing, after))
        now += [after] if after else []
    for want in missing:
        now.append(_added(want, now, spec))
        edits.append(Edit(None, now[-1]))
    if not related(now, spec):
        edits.append(_move(now, spec))
        now = list(apply(Scene(tuple(now)), edits[-1:]).things)
    if not separated(now):
        raise ValueError("two things of one colour would touch each other")
    return tuple(edits)


def fitted(thing: Thing, want: Want) -> Thing:
    """The thing with what the want asks for, and as it is in all else, as far as no held-out pair comes of it."""
    kept = want.colour or thing.colour
    colour = kept if want.colour or (want.shape, kept) not in HELD_OUT_PAIRS else _free_colour(want.shape)
    return replace(thing, shape=want.shape, colour=colour, size=want.size or thing.size)


def _free_colour(shape: str) -> str:
    """The first colour that is not held out for the shape."""
    return next(colour for colour in COLOURS if (shape, colour) not in HELD_OUT_PAIRS)


def free_cells(things: Sequence[Thing]) -> list[tuple[int, int]]:
    """Cells (row, column) that hold no thing, in reading order."""
    taken = {(thing.row, thing.column) for thing in things}
    return [cell for cell in (divmod(i, GRID) for i in range(GRID * GRID)) if cell not in taken]


def _added(want: Want, things: Sequence[Thing], spec: Spec) -> Thing:
    """What is wanted, in the first free cell in which it does not touch its like and the spec can be met."""
    thing = Thing(want.shape, want.colour or _free_colour(want.shape), want.size or ADDED_SIZE, 0, 0)
    ways = [replace(thing, row=row, column=column) for row, column in free_cells(things)]
    ways = [way for way in ways if separated([*things, way])]
    for way in [way for way in ways if completable([*things, way], spec)] or ways:
        return way
    raise ValueError(f"no cell is left for a {want.name}")


def _move(things: Sequence[Thing], spec: Spec) -> Edit:
    """One of the related things to the first free cell in which the relation holds: the subject, else the object."""
    assert spec.relation is not None
    exact = assign(things, spec).exact
    by_want = {want.name: index for index, want in exact.items()}
    for end in (spec.relation.subject_index, spec.relation.object_index):
        index = by_want[spec.wants[end].name]
        rest = [thing for i, thing in enumerate(things) if i != index]
        for row, column in free_cells(things):
            moved = replace(things[index], row=row, column=column)
            if related([*rest, moved], spec) and separated([*rest, moved]):
                return Edit(things[index], moved)
    raise ValueError("no move mends the relation")


def difference(before: Sequence[Thing], after: Sequence[Thing]) -> tuple[Edit, ...]:
    """The edits that make one list of things, each in a cell of its own, the other, in reading order of their cells."""
    old, new = ({(t.row, t.column): t for t in in_reading_order(things)} for things in (before, after))
    edits = [Edit(old[c], new[c]) for c in old if c in new and old[c].label != new[c].label]
    gone, come = ([t for c, t in these.items() if c not in those] for these, those in ((old, new), (new, old)))
    for thing in gone:
        target = next((other for other in come if other.label == thing.label), None)
        if target is not None:
            come.remove(target)
        edits.append(Edit(thing, target))
    return (*edits, *(Edit(None, thing) for thing in come))


def same_things(one: Sequence[Thing], other: Sequence[Thing]) -> bool:
    """Whether both hold the same labels in the same cells."""
    return Counter(map(placed, one)) == Counter(map(placed, other))


# --- reflections


def reflection(things: Sequence[Thing], spec: Spec, edits: Sequence[Edit]) -> str:
    """Two lines: what is there and what was asked for; then the edits, or the stop sentence where there are none."""
    return f"{analysis(things, spec, counts_alone=False)}\n{EDIT_MARK + format_edits(edits) if edits else STOP}"


def parse_reflection(text: str) -> tuple[str, tuple[Edit, ...]]:
    """The first line of a reflection, and its edits: none where it says that none is needed.

    Raises ValueError for what is no reflection.
    """
    seen, _, verdict = text.partition("\n")
    if verdict == STOP:
        return seen, ()
    if not verdict.startswith(EDIT_MARK):
        raise ValueError(f"the second line is {verdict!r}; expected {EDIT_MARK.strip()!r} and edits, or {STOP!r}")
    return seen, parse_edits(verdict.removeprefix(EDIT_MARK))
