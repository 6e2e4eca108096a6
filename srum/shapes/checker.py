"""The exact checker: what an image shows, from its pixels alone, and whether that is what its prompt asks for.

Every pixel near the ray from the background to a palette colour has an opacity on that ray. Nearly opaque pixels of one
colour that hang together are the seed of a thing, the pixels around it belong to the nearest seed, and the opacities
of a thing are compared with drawings of every shape and size at the same sub-pixel place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import cv2
import numpy as np
from PIL.Image import Image

from srum.records import Box
from srum.shapes.matching import assign, faults, matches, related, relation_sentence
from srum.shapes.prompts import from_metadata
from srum.shapes.render import BACKGROUND, PALETTE, PATCH, thing_opacity
from srum.shapes.scenes import CELL, GRID, IMAGE_SIZE, SHAPES, SIZES, Thing, half_extent

SEED_OPACITY = 0.6  # a pixel at least so opaque can begin a thing
SEED_PIXELS = 6
PURE_OPACITY = 0.7  # pixels at least so opaque, and nearer than this to a ray, are no mixture of two colours
PURE_DISTANCE = 45.0  # levels (RGB distance)
PURE_PIXELS = 3
REACH = 4.0  # pixels around its seed that a thing may cover
FOREGROUND = 60.0  # levels from the background
STRAY_PIXELS = 4
WELL_FORMED = 0.95  # agreement with the best drawing, at most 1
APART = 9.0  # pixels; nearer centres are parts of one badly drawn thing

_COLOURS = tuple(PALETTE)
_RAYS = np.array([PALETTE[colour] for colour in _COLOURS], np.float32) - np.array(BACKGROUND, np.float32)
_RAY_SQUARES = (_RAYS**2).sum(axis=1)
_STEPS = 4  # drawings per pixel and axis
_BLURS = (0.0, 0.7)  # pixels


@dataclass(frozen=True)
class Found:
    """A thing found in an image: ``box`` (x0, y0, x1, y1) and ``centre`` (x, y) in pixels, ``area`` in pixels.

    ``why`` says what is wrong with one that is not ``well_formed``; its shape and size are then the nearest ones.
    A ``stray`` blob is too small or too faint to be a thing at all.
    """

    shape: str
    colour: str
    size: str
    box: Box
    centre: tuple[float, float]
    area: float
    well_formed: bool = True
    why: str = ""
    stray: bool = False

    @property
    def label(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def placed(self) -> Thing:
        """It as a thing of a scene, in the cell of its centre."""
        column, row = (min(max(int(x // CELL), 0), GRID - 1) for x in self.centre)
        dx, dy = (x - CELL * (place + 0.5) for x, place in zip(self.centre, (column, row), strict=True))
        return Thing(self.shape, self.colour, self.size, row, column, dx, dy)


@dataclass(frozen=True)
class Verdict:
    """Whether an image is what its prompt asks for; the reasons are empty iff it is."""

    correct: bool
    reasons: list[str]
    category: str


def check(image: np.ndarray, metadata: dict[str, Any]) -> Verdict:
    """Whether an image (uint8 RGB, (64, 64, 3)) shows exactly what the metadata (GenEval's layout) asks for."""
    found, spec = parse(image), from_metadata(metadata)
    things = [thing for thing in found if not thing.stray]
    assignment = assign(things, spec)
    reasons = [f"{thing.label} is badly drawn: {thing.why}" for thing in things if not thing.well_formed]
    reasons += [f"a stray {thing.colour} blob" for thing in found if thing.stray]
    reasons += [f"a {want.name} is missing" for want in assignment.missing]
    for index, thing in enumerate(things):
        if index in assignment.wrong:
            reasons.append(f"{thing.label} should be {' and '.join(faults(thing, assignment.wrong[index]))}")
        elif index not in assignment.exact:
            surplus = any(matches(thing, want) for want in spec.wants)
            reasons.append(f"{thing.label} is {'one too many' if surplus else 'not asked for'}")
    if len(assignment.exact) == spec.total and not related(things, spec):
        reasons.append(relation_sentence(spec, holds=False))
    return Verdict(not reasons, reasons, spec.category)


def is_right(image: Image, metadata: Mapping[str, Any]) -> bool:
    """The verdict on an image of any mode."""
    return check(np.asarray(image.convert("RGB")), dict(metadata)).correct


def parse(image: np.ndarray) -> list[Found]:
    """The things in an image (uint8 RGB, (64, 64, 3)), in no particular order."""
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}; expected uint8 ({IMAGE_SIZE}, {IMAGE_SIZE}, 3)")
    offset = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
    opacities, colours, off_ray = _project(offset)
    seeds, seed_colours = _seeds(opacities, colours, off_ray)
    owner, reach = _nearest_seed(seeds)
    things: list[Found] = []
    for label, colour in enumerate(seed_colours, start=1):
        own = np.where((owner == label) & (reach <= REACH), opacities[..., colour], 0.0)
        own[own < 0.1] = 0.0
        things += _things(own, _COLOURS[colour])
    left_over = (np.sqrt((offset**2).sum(axis=2)) > FOREGROUND) & (reach > REACH)
    return _parts_of_one(things) + _strays(left_over, colours)


# --- from pixels to masks


def _project(offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Opacity per colour (H, W, 6), the colour whose ray is nearest (H, W), and the levels off that ray (H, W)."""
    along = offset @ _RAYS.T
    opacity = np.clip(along / _RAY_SQUARES, 0.0, 1.0)
    squares = (offset**2).sum(axis=2)[..., None] - 2 * opacity * along + opacity**2 * _RAY_SQUARES
    return opacity, squares.argmin(axis=2), np.sqrt(np.maximum(squares.min(axis=2), 0.0))


def _seeds(opacities: np.ndarray, colours: np.ndarray, off_ray: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Numbered seeds (H, W), 0 elsewhere, and the colour of each, beginning with seed 1."""
    opacity = np.take_along_axis(opacities, colours[..., None], axis=2)[..., 0]
    opaque = opacity >= SEED_OPACITY
    pure = (opacity >= PURE_OPACITY) & (off_ray < PURE_DISTANCE)
    seeds = np.zeros(colours.shape, np.int32)
    seed_colours: list[int] = []
    for colour in np.unique(colours[opaque]):
        count, parts, stats, _ = cv2.connectedComponentsWithStats(
            (opaque & (colours == colour)).astype(np.uint8), connectivity=4
        )
        pure_pixels = np.bincount(parts[pure], minlength=count)
        for part in range(1, count):
            if stats[part, cv2.CC_STAT_AREA] >= SEED_PIXELS and pure_pixels[part] >= PURE_PIXELS:
                seed_colours.append(int(colour))
                seeds[parts == part] = len(seed_colours)
    return seeds, seed_colours


def _nearest_seed(seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the nearest seed and the distance to it in pixels, for every pixel."""
    if not seeds.any():
        return seeds, np.full(seeds.shape, np.inf, np.float32)
    reach, nearest = cv2.distanceTransformWithLabels(
        (seeds == 0).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    numbers = np.zeros(int(nearest.max()) + 1, np.int32)
    numbers[nearest[seeds > 0]] = seeds[seeds > 0]
    return numbers[nearest], reach


# --- from masks to things


def _things(opacity: np.ndarray, colour: str) -> list[Found]:
    """The one thing that an opacity (H, W) shows, or the several of one colour that touch each other."""
    whole = _recognise(opacity, colour)
    if whole.well_formed:
        return [whole]
    pieces = [_recognise(piece, colour) for piece in _split(opacity)]
    return pieces if pieces and all(piece.well_formed for piece in pieces) else [whole]


def _recognise(opacity: np.ndarray, colour: str) -> Found:
    """The shape and size whose drawing agrees best with the opacity."""
    area = float(opacity.sum())
    x, y = (float(opacity.sum(axis=axis) @ _PLACES) / area for axis in (0, 1))
    column, row = round(x * _STEPS), round(y * _STEPS)
    patch = _patch(opacity, column // _STEPS, row // _STEPS)
    drawings, squares = _drawings(column % _STEPS, row % _STEPS)
    agreement = 2 * (drawings @ patch) / (squares + patch @ patch)
    best = int(agreement.argmax())
    shape, size = _KINDS[best // len(_BLURS)]
    dx, dy = _centroid(shape, size)
    centre, (a, b) = (x - dx, y - dy), half_extent(shape, size)
    good = agreement[best] >= WELL_FORMED
    box = (centre[0] - a, centre[1] - b, centre[0] + a, centre[1] + b) if good else _bounds(opacity > 0.5)
    return Found(shape, colour, size, _inside(box), centre, area, bool(good), "" if good else "of no clear shape")


_PLACES = np.arange(IMAGE_SIZE) + 0.5
_KINDS = tuple((shape, size) for shape in SHAPES for size in SIZES)


@cache
def _centroid(shape: str, size: str) -> tuple[float, float]:
    """Where the centre of gravity lies from the centre of the box, in pixels (x, y)."""
    drawing = thing_opacity(shape, size, (0.0, 0.0))
    places = np.arange(PATCH) + 0.5 - PATCH // 2
    return tuple(float(drawing.sum(axis=axis) @ places / drawing.sum()) for axis in (0, 1))  # type: ignore[return-value]


@cache
def _drawings(column: int, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Every kind of thing, sharp and blurred, its centre of gravity at that fraction of a pixel from the middle of
    the patch: (16, PATCH * PATCH), and the sum of squares of each."""
    rows = []
    for shape, size in _KINDS:
        dx, dy = _centroid(shape, size)
        sharp = _shifted(shape, size, (column / _STEPS - dx, row / _STEPS - dy))
        rows += [cv2.GaussianBlur(sharp, (0, 0), blur) if blur else sharp for blur in _BLURS]
    drawings = np.stack([drawing.ravel() for drawing in rows])
    return drawings, (drawings**2).sum(axis=1)


def _shifted(shape: str, size: str, centre: tuple[float, float]) -> np.ndarray:
    """A drawing centred there, seen from the middle of a patch, whatever the pixel that the centre falls in."""
    drawing = thing_opacity(shape, size, centre)
    return np.roll(drawing, (int(np.floor(centre[1])), int(np.floor(centre[0]))), axis=(0, 1))


def _patch(opacity: np.ndarray, column: int, row: int) -> np.ndarray:
    """The PATCH x PATCH pixels around a corner of pixels, as one vector; zero outside of the image."""
    patch = np.zeros((PATCH, PATCH), np.float32)
    top, left = row - PATCH // 2, column - PATCH // 2
    y0, x0 = max(top, 0), max(left, 0)
    part = opacity[y0 : top + PATCH, x0 : left + PATCH]
    patch[y0 - top : y0 - top + part.shape[0], x0 - left : x0 - left + part.shape[1]] = part
    return patch.ravel()


def _split(opacity: np.ndarray) -> list[np.ndarray]:
    """The parts of an opacity around each of its thickest places, or its halves where there is only one such place."""
    depth = cv2.distanceTransform((opacity > 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    peaks = (depth >= 2.0) & (depth == cv2.dilate(depth, np.ones((9, 9), np.uint8)))
    count, _, _, middles = cv2.connectedComponentsWithStats(peaks.astype(np.uint8), connectivity=8)
    if count < 3:
        return _halves(opacity)
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    nearness = [
        np.hypot(x - middle[0], y - middle[1]) - depth[round(middle[1]), round(middle[0])] for middle in middles[1:]
    ]
    nearest = np.argmin(nearness, axis=0)
    return [np.where(nearest == index, opacity, 0.0) for index in range(count - 1)]


def _halves(opacity: np.ndarray) -> list[np.ndarray]:
    """The opacity cut in two across its longer side; empty where it has no pixel that is half opaque."""
    if not (opacity > 0.5).any():
        return []
    x0, y0, x1, y1 = _bounds(opacity > 0.5)
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5
    first = x < (x0 + x1) / 2 if x1 - x0 > y1 - y0 else y < (y0 + y1) / 2
    return [np.where(first, opacity, 0.0), np.where(first, 0.0, opacity)]


def _parts_of_one(things: list[Found]) -> list[Found]:
    """The things, with those marked that lie so close together that they can only be parts of one."""

    def torn(thing: Found) -> bool:
        return any(np.hypot(*np.subtract(thing.centre, other.centre)) < APART for other in things if other is not thing)

    return [replace(t, well_formed=False, why="part of a thing in pieces") if torn(t) else t for t in things]


def _strays(left_over: np.ndarray, colours: np.ndarray) -> list[Found]:
    """What is visible and belongs to no thing."""
    count, parts, stats, middles = cv2.connectedComponentsWithStats(left_over.astype(np.uint8), connectivity=8)
    strays = []
    for part in range(1, count):
        area = float(stats[part, cv2.CC_STAT_AREA])
        if area >= STRAY_PIXELS:
            colour = _COLOURS[int(np.bincount(colours[parts == part]).argmax())]
            centre = (float(middles[part][0]) + 0.5, float(middles[part][1]) + 0.5)
            box = _bounds(parts == part)
            strays.append(Found("circle", colour, "small", box, centre, area, False, "a stray blob", stray=True))
    return strays


def _bounds(mask: np.ndarray) -> Box:
    """The box (x0, y0, x1, y1) of a mask that is not empty."""
    ys, xs = np.nonzero(mask)
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def _inside(box: Box) -> Box:
    """The box cut at the border of the image."""
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(IMAGE_SIZE)), min(box[3], float(IMAGE_SIZE))
