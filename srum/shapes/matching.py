"""Which thing of an image is which thing of a prompt, and whether a relation between two of them holds.

Things claim their places in reading order (rows first), so that which of three circles is "one too many" can be seen
in the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from srum.shapes.scenes import CELL, GRID, Spec, Want, relation_holds


class Seen(Protocol):
    """What the truth needs to know of a thing, drawn (``scenes.Thing``) or found (``checker.Found``)."""

    @property
    def shape(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def size(self) -> str: ...
    @property
    def centre(self) -> tuple[float, float]: ...
    @property
    def label(self) -> str: ...


def matches(thing: Seen, want: Want) -> bool:
    """Whether the thing has all that the want names."""
    return thing.shape == want.shape and want.colour in (None, thing.colour) and want.size in (None, thing.size)


@dataclass(frozen=True)
class Assignment:
    """Which want each thing fills: ``exact`` with all its attributes, ``wrong`` with its shape only, by thing index;
    ``missing`` are the wants (count 1) that no thing fills, not even wrongly."""

    exact: dict[int, Want]
    wrong: dict[int, Want]
    missing: tuple[Want, ...]


def assign(things: Sequence[Seen], spec: Spec) -> Assignment:
    """The assignment that fills most wants.

    No thing matches two wants (``Spec``), so it is enough that each thing, in reading order, takes a place that is
    left. Places still free then go to things that match no want but have the right shape, those with one wrong
    attribute first; as each of them can take every place of its shape, this fills as many as any other order.
    """
    order = sorted(range(len(things)), key=lambda i: (things[i].centre[1] // CELL, things[i].centre[0]))
    places = [want for want in spec.wants for _ in range(want.count)]
    exact: dict[int, Want] = {}
    wrong: dict[int, Want] = {}
    for index in order:
        _claim(index, places, (want for want in places if matches(things[index], want)), exact)
    for allowed in (1, 2):
        for index in [i for i in order if i not in wrong and not any(matches(things[i], want) for want in spec.wants)]:
            near = (w for w in places if w.shape == things[index].shape and len(faults(things[index], w)) <= allowed)
            _claim(index, places, near, wrong)
    return Assignment(exact, wrong, tuple(places))


def _claim(index: int, places: list[Want], candidates: Iterable[Want], filled: dict[int, Want]) -> None:
    want = next(iter(candidates), None)
    if want is not None:
        places.remove(want)
        filled[index] = want


def faults(thing: Seen, want: Want) -> list[str]:
    """The size and colour that the thing should have and has not."""
    pairs = ((want.size, thing.size), (want.colour, thing.colour))
    return [wanted for wanted, seen in pairs if wanted is not None and wanted != seen]


def related(things: Sequence[Seen], spec: Spec) -> bool:
    """Whether the relation of the spec holds between two things with all their attributes; True where it has none."""
    if spec.relation is None:
        return True
    subject, object_ = spec.wants[spec.relation.subject_index], spec.wants[spec.relation.object_index]
    return any(
        relation_holds(spec.relation.kind, one.centre, other.centre)
        for one in things
        for other in things
        if matches(one, subject) and matches(other, object_)
    )


def relation_sentence(spec: Spec, holds: bool) -> str:
    """The relation of the spec in words, such as "red circle is not left of blue square"."""
    if spec.relation is None:
        raise ValueError(f"no relation is asked for in {spec}")
    subject, object_ = spec.wants[spec.relation.subject_index], spec.wants[spec.relation.object_index]
    return f"{subject.name} is {'' if holds else 'not '}{spec.relation.kind} {object_.name}"


def completable(things: Sequence[Seen], spec: Spec) -> bool:
    """Whether more things could make the scene what the spec asks for, those that are there staying as they are.

    Each fills a place of its own with all its attributes; the relation holds, or a free cell would make it hold.
    """
    exact = assign(things, spec).exact
    if len(exact) < len(things):
        return False
    if spec.relation is None or len(things) != 1:
        return related(things, spec) or not things
    centre, taken = things[0].centre, _cell(things[0].centre)
    cells = [(column, row) for row in range(GRID) for column in range(GRID) if (column, row) != taken]
    places = [(CELL * (column + 0.5), CELL * (row + 0.5)) for column, row in cells]
    is_subject = exact[0] == spec.wants[spec.relation.subject_index]
    ends = [(centre, place) if is_subject else (place, centre) for place in places]
    return any(relation_holds(spec.relation.kind, subject, object_) for subject, object_ in ends)


def _cell(centre: tuple[float, float]) -> tuple[int, int]:
    return int(centre[0] // CELL), int(centre[1] // CELL)
