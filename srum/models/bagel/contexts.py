"""Which contexts begin alike: in what order the rows of a cache are written, each shared beginning once; and what is
remembered of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from srum.models.bagel.cache import Cache
from srum.models.base import Segment


class Level(NamedTuple):
    """One pass over a cache: row r goes on from row ``parents[r]`` of the pass before with the segments ``runs[r]``."""

    parents: list[int]
    runs: list[Sequence[Segment]]


def levels(contexts: Sequence[Sequence[Segment]], begun: Sequence[int]) -> tuple[list[Level], list[int]]:
    """The passes that write contexts from the rows where they have ``begun``, and the row of the last that each is.

    Contexts share a row for as long as their segments are the same objects.
    """
    passes: list[Level] = []
    rows: list[list[int]] = [[] for _ in range(max(begun, default=0) + 1)]  # which contexts a row is the beginning of
    for context, row in enumerate(begun):
        rows[row].append(context)
    depth = [0] * len(contexts)  # how many of its segments are written
    while any(depth[i] < len(context) for i, context in enumerate(contexts)):
        level, following = Level([], []), []
        for parent, members in enumerate(rows):
            for group in _groups(contexts, members, depth):
                begin = depth[group[0]]
                end = begin + _alike(contexts, group, begin)
                level.parents.append(parent)
                level.runs.append(contexts[group[0]][begin:end])
                following.append(group)
                for member in group:
                    depth[member] = end
        passes.append(level)
        rows = following
    row_of = {member: row for row, members in enumerate(rows) for member in members}
    return passes, [row_of[i] for i in range(len(contexts))]


def _groups(contexts: Sequence[Sequence[Segment]], members: Sequence[int], depth: Sequence[int]) -> Iterator[list[int]]:
    """The members of a row by their next segment; those that are complete stay together."""
    groups: dict[int | None, list[int]] = defaultdict(list)
    for member in members:
        left = contexts[member][depth[member] :]
        groups[id(left[0]) if left else None].append(member)
    yield from groups.values()


def _alike(contexts: Sequence[Sequence[Segment]], members: Sequence[int], begin: int) -> int:
    """How many segments from ``begin`` on all members have in common."""
    columns = zip(*(contexts[member][begin:] for member in members), strict=False)
    count = 0
    for column in columns:
        if any(segment is not column[0] for segment in column):
            break
        count += 1
    return count


@dataclass
class Remembered:
    """The beginnings of contexts, up to the last image of each, and the rows of ``cache`` that they are.

    A conversation that grows goes on from what is remembered of it. Beginnings are the same where their segments are
    the same objects, which are kept lest another one take the place.
    """

    cache: Cache | None = None
    rows: dict[tuple[int, ...], int] = field(default_factory=dict)
    beginnings: Sequence[Sequence[Segment]] = ()

    def missing(self, beginnings: Sequence[Sequence[Segment]]) -> list[Sequence[Segment]]:
        """Each of them once, unless all are known."""
        by_name = {_name(beginning): beginning for beginning in beginnings}
        return [] if by_name.keys() <= self.rows.keys() else list(by_name.values())

    def longest(
        self, beginnings: Sequence[Sequence[Segment]]
    ) -> tuple[Cache | None, list[int], list[Sequence[Segment]]]:
        """Of each beginning the row that it goes on from, and with what; no cache where none goes on from any."""
        names = [_name(beginning) for beginning in beginnings]
        known = [max((own for own in self.rows if name[: len(own)] == own), key=len, default=()) for name in names]
        rests = [beginning[len(own) :] for beginning, own in zip(beginnings, known, strict=True)]
        if not all(own in self.rows for own in known):
            return None, [0] * len(known), list(beginnings)
        return self.cache, [self.rows[own] for own in known], rests

    def keep(self, cache: Cache, beginnings: Sequence[Sequence[Segment]]) -> None:
        """Remember the rows of a cache, and nothing else."""
        self.cache, self.beginnings = cache, beginnings
        self.rows = {_name(beginning): row for row, beginning in enumerate(beginnings)}

    def recalled(self, beginnings: Sequence[Sequence[Segment]]) -> tuple[Cache, list[int]]:
        """A copy of the cache, and the row of each."""
        assert self.cache is not None  # since nothing is missing
        return self.cache.select(range(self.cache.rows)), [self.rows[_name(beginning)] for beginning in beginnings]


def parted(context: Sequence[Segment]) -> tuple[Sequence[Segment], Sequence[Segment]]:
    """A context up to its last image, and the texts after it."""
    end = max((place for place, segment in enumerate(context, 1) if segment.kind != "text"), default=0)
    return context[:end], context[end:]


def _name(beginning: Sequence[Segment]) -> tuple[int, ...]:
    return tuple(map(id, beginning))
