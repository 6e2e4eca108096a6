"""Scenes of the embedded world: coloured shapes on a 4x4 grid of cells, and what a prompt asks of them.

Coordinates are image pixels, continuous, x to the right and y downwards, the origin at the top left corner of the
64x64 image. A thing sits near the centre of its 16-px cell and at most ``JITTER`` px away from it on either axis.

Four colour-shape pairs are held out: no training scene and no prompt shows them, except in the compositional set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np

from srum.records import Box

Option = TypeVar("Option")

IMAGE_SIZE = 64
GRID = 4
CELL = IMAGE_SIZE // GRID
JITTER = 1.0
MAX_THINGS = 7

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "size")

DIAMETER = {"small": 10.0, "large": 14.5}  # pixels across
HELD_OUT_PAIRS = frozenset({("circle", "purple"), ("square", "yellow"), ("triangle", "blue"), ("star", "red")})
RELATION_MARGIN = 8.0  # pixels between two centres, along the axis of the relation
SAME_COLOUR_GAP = 1.5  # pixels of background between two things of one colour, so that they never melt into one


@cache
def outline(shape: str) -> np.ndarray:
    """The polygon of a shape, (N, 2) as (x, y), its longer side 1 and the centre of its box at the origin."""
    if shape == "circle":
        points = _polar(np.full(40, 0.5))
    elif shape == "square":
        points = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    elif shape == "triangle":
        points = np.array([(0.0, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    elif shape == "star":
        points = _polar(np.tile([0.5, 0.2], 5))
    else:
        raise ValueError(f"unknown shape {shape!r}; expected one of {SHAPES}")
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) / (high - low).max()


def _polar(radii: np.ndarray) -> np.ndarray:
    """Points at equal angles and the given distances, beginning at the top."""
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1) * radii[:, None]


@cache
def half_extent(shape: str, size: str) -> tuple[float, float]:
    """Half the width and half the height of a shape, in pixels."""
    x, y = outline(shape).max(axis=0) * DIAMETER[size]
    return float(x), float(y)


@dataclass(frozen=True)
class Thing:
    """One coloured shape; ``dx`` and ``dy`` in [-JITTER, JITTER] px move it away from the centre of its cell."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    dx: float = 0.0
    dy: float = 0.0

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the centre of the box, in pixels."""
        return CELL * (self.column + 0.5) + self.dx, CELL * (self.row + 0.5) + self.dy

    @property
    def box(self) -> Box:
        """The tight box (x0, y0, x1, y1) in pixels, cut at the border of the image."""
        (x, y), (a, b) = self.centre, half_extent(self.shape, self.size)
        return max(x - a, 0.0), max(y - b, 0.0), min(x + a, float(IMAGE_SIZE)), min(y + b, float(IMAGE_SIZE))

    @property
    def label(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What an image shows: 0 to 7 things, no two in one cell."""

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        cells = [(thing.row, thing.column) for thing in self.things]
        if len(set(cells)) < len(cells):
            raise ValueError(f"two things share a cell: {cells}")


@dataclass(frozen=True)
class Want:
    """``count`` things of one shape; a colour or size of None is free."""

    shape: str
    colour: str | None = None
    size: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}; expected one of {SHAPES}")
        if self.colour is not None and self.colour not in COLOURS:
            raise ValueError(f"colour is {self.colour!r}; expected one of {COLOURS}")
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"size is {self.size!r}; expected one of {SIZES}")
        if not 1 <= self.count <= MAX_THINGS:
            raise ValueError(f"count is {self.count}; expected 1 to {MAX_THINGS}")

    @property
    def name(self) -> str:
        """The words of the wanted thing, such as "large red square" or "circle"."""
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)

    def overlaps(self, other: Want) -> bool:
        """Whether one thing could be both."""
        return (
            self.shape == other.shape
            and (self.colour == other.colour or None in (self.colour, other.colour))
            and (self.size == other.size or None in (self.size, other.size))
        )


@dataclass(frozen=True)
class Relation:
    """``wants[subject_index]`` is ``kind`` (one of RELATIONS) ``wants[object_index]``."""

    subject_index: int
    kind: str
    object_index: int


@dataclass(frozen=True)
class Spec:
    """What a prompt asks for: these things and no other, and at most one relation between two single ones.

    No thing can satisfy two of the wants, so a thing has at most one place in the spec.
    """

    wants: tuple[Want, ...]
    category: str
    relation: Relation | None = None

    def __post_init__(self) -> None:
        if self.category not in CATEGORIES:
            raise ValueError(f"category is {self.category!r}; expected one of {CATEGORIES}")
        if not self.wants or not 1 <= self.total <= MAX_THINGS:
            raise ValueError(f"{self.total} things are asked for; expected 1 to {MAX_THINGS}")
        for index, want in enumerate(self.wants):
            for other in self.wants[:index]:
                if want.overlaps(other):
                    raise ValueError(f"one thing could be both {other.name!r} and {want.name!r}")
        if self.relation is not None:
            self._check_relation(self.relation)

    def _check_relation(self, relation: Relation) -> None:
        if relation.kind not in RELATIONS:
            raise ValueError(f"relation is {relation.kind!r}; expected one of {RELATIONS}")
        if {relation.subject_index, relation.object_index} != {0, 1} or len(self.wants) != 2 or self.total != 2:
            raise ValueError(f"a relation needs two single things, got {self.wants} and {relation}")

    @property
    def total(self) -> int:
        """The number of things asked for."""
        return sum(want.count for want in self.wants)


def canonical(spec: Spec) -> str:
    """The facts of a spec as one string: specs that mean the same (in any order, from either side) share it."""
    facts = sorted(f"{want.count} {want.name}" for want in spec.wants)
    if spec.relation is not None:
        subject, kind, object_ = spec.relation.subject_index, spec.relation.kind, spec.relation.object_index
        if kind in ("right of", "below"):
            subject, kind, object_ = object_, INVERSE[kind], subject
        facts.append(f"{spec.wants[subject].name} {kind} {spec.wants[object_].name}")
    return "; ".join(facts)


def mentions_held_out(spec: Spec) -> bool:
    """Whether the spec names a held-out pair of shape and colour."""
    return any((want.shape, want.colour) in HELD_OUT_PAIRS for want in spec.wants)


def shows_held_out(things: Sequence[Thing]) -> bool:
    """Whether one of the things is a held-out pair of shape and colour."""
    return any((thing.shape, thing.colour) in HELD_OUT_PAIRS for thing in things)


def pick(options: Sequence[Option], rng: np.random.Generator) -> Option:
    """One of the options, each equally likely."""
    return options[int(rng.integers(len(options)))]


def separated(things: Sequence[Thing]) -> bool:
    """Whether things of one colour keep ``SAME_COLOUR_GAP`` px between their boxes."""
    for index, thing in enumerate(things):
        for other in things[:index]:
            if thing.colour == other.colour and _gap(thing, other) < SAME_COLOUR_GAP:
                return False
    return True


def _gap(thing: Thing, other: Thing) -> float:
    """Pixels between two boxes, along the axis on which they are further apart."""
    (x, y), (a, b) = thing.centre, half_extent(thing.shape, thing.size)
    (u, v), (c, d) = other.centre, half_extent(other.shape, other.size)
    return max(abs(x - u) - a - c, abs(y - v) - b - d)


def relation_holds(kind: str, subject: tuple[float, float], object_: tuple[float, float]) -> bool:
    """Whether one centre (x, y) lies at least ``RELATION_MARGIN`` px on the named side of the other.

    For two things in a scene this is: in another column, or in another row.
    """
    right, down = subject[0] - object_[0], subject[1] - object_[1]
    return {"left of": -right, "right of": right, "above": -down, "below": down}[kind] >= RELATION_MARGIN


def random_thing(
    rng: np.random.Generator,
    want: Want | None = None,
    cell: tuple[int, int] = (0, 0),
    allow_held_out: bool = False,
) -> Thing:
    """A thing in the given (row, column) that satisfies the want (if any), all that is free drawn uniformly."""
    shape = want.shape if want else pick(SHAPES, rng)
    colour = want.colour if want and want.colour else _free_colour(shape, rng, allow_held_out)
    size = want.size if want and want.size else pick(SIZES, rng)
    dx, dy = rng.uniform(-JITTER, JITTER, size=2)
    return Thing(shape, colour, size, cell[0], cell[1], float(dx), float(dy))


def _free_colour(shape: str, rng: np.random.Generator, allow_held_out: bool) -> str:
    while True:
        colour = pick(COLOURS, rng)
        if allow_held_out or (shape, colour) not in HELD_OUT_PAIRS:
            return colour


def random_cells(count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """``count`` different cells (row, column)."""
    return [divmod(int(cell), GRID) for cell in rng.permutation(GRID * GRID)[:count]]


def sample_scene(spec: Spec, rng: np.random.Generator, allow_held_out: bool = False) -> Scene:
    """A scene that satisfies the spec exactly: the things asked for, nothing else, the rest drawn uniformly.

    A held-out pair is drawn for a free attribute only where ``allow_held_out`` says so.
    """
    wants = [want for want in spec.wants for _ in range(want.count)]
    while True:
        cells = random_cells(len(wants), rng)
        things = tuple(random_thing(rng, want, cell, allow_held_out) for want, cell in zip(wants, cells, strict=True))
        if _as_related(things, spec.relation) and separated(things):
            return Scene(things)


def _as_related(things: Sequence[Thing], relation: Relation | None) -> bool:
    return relation is None or relation_holds(
        relation.kind, things[relation.subject_index].centre, things[relation.object_index].centre
    )


def random_scene(count: int, rng: np.random.Generator, allow_held_out: bool = False) -> Scene:
    """``count`` things with nothing asked of them."""
    while True:
        cells = random_cells(count, rng)
        things = tuple(random_thing(rng, None, cell, allow_held_out) for cell in cells)
        if separated(things):
            return Scene(things)
