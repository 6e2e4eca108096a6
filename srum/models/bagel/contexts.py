"""Which contexts begin alike: in what order the rows of a cache are written, each shared beginning once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from srum.models.base import Segment


class Level(NamedTuple):
    """One pass over a cache: row r goes on from row ``parents[r]`` of the pass before with the segments ``runs[r]``."""

    parents: list[int]
    runs: list[Sequence[Segment]]


def levels(contexts: Sequence[Sequence[Segment]]) -> tuple[list[Level], list[int]]:
    """The passes that write all contexts from one empty row, and the row of the last that each context is.

    Contexts share a row for as long as their segments are the same objects.
    """
    passes: list[Level] = []
    rows, begin = [list(range(len(contexts)))], 0  # which contexts a row is the beginning of
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
