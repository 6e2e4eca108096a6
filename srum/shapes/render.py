"""From a scene to an image: anti-aliased shapes on a near-white ground, and images with things badly drawn.

Images are uint8 RGB, (64, 64, 3). A thing is drawn as an opacity in [0, 1] on a ``PATCH`` x ``PATCH`` px patch,
``SUPER`` times finer than the image, and averaged down to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from srum.records import Box
from srum.shapes.scenes import (
    COLOURS,
    DIAMETER,
    HELD_OUT_PAIRS,
    IMAGE_SIZE,
    SHAPES,
    Scene,
    Thing,
    Want,
    outline,
    pick,
    random_cells,
    random_thing,
)

BACKGROUND = (240, 240, 240)
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (30, 70, 215),
    "yellow": (250, 210, 30),
    "purple": (170, 60, 200),
    "black": (25, 25, 25),
}
DAMAGES = ("merged", "bitten", "noisy outline", "blurred", "two-coloured")

PATCH = 24
SUPER = 6
_SIDE = IMAGE_SIZE + 2 * PATCH
_BLANK = np.full((_SIDE, _SIDE, 3), BACKGROUND, np.float32)
_SHIFT = 4  # binary digits after the point in OpenCV's polygon coordinates


def opacity(points: np.ndarray) -> np.ndarray:
    """Coverage of a polygon (N, 2), in px of the patch, as a fine mask (PATCH * SUPER, PATCH * SUPER) of 0 and 255."""
    fine = np.zeros((PATCH * SUPER, PATCH * SUPER), np.uint8)
    corners = np.round((points * SUPER - 0.5) * 2**_SHIFT).astype(np.int32)
    return cv2.fillPoly(fine, [corners], 255, shift=_SHIFT)


def average(fine: np.ndarray) -> np.ndarray:
    """A fine mask (0..255) as an opacity per pixel, (PATCH, PATCH) float32 in [0, 1]."""
    return cv2.resize(fine, (PATCH, PATCH), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _origin(centre: tuple[float, float]) -> tuple[int, int]:
    """The image pixel (x, y) at which the patch around a centre begins."""
    return int(np.floor(centre[0])) - PATCH // 2, int(np.floor(centre[1])) - PATCH // 2


def _points(shape: str, size: str, centre: tuple[float, float]) -> np.ndarray:
    """The outline of a thing in px of its patch."""
    return outline(shape) * DIAMETER[size] + np.subtract(centre, _origin(centre))


def thing_opacity(shape: str, size: str, centre: tuple[float, float]) -> np.ndarray:
    """The opacity (PATCH, PATCH) of a shape centred there, on a patch that begins at pixel floor(centre) - PATCH/2."""
    return average(opacity(_points(shape, size, centre)))


class _Canvas:
    """An image with a margin of one patch, so that nothing has to be cut while painting."""

    def __init__(self) -> None:
        self.pixels = _BLANK.copy()

    def paint(self, alpha: np.ndarray, colour: str, centre: tuple[float, float]) -> None:
        x, y = _origin(centre)
        patch = self.pixels[y + PATCH : y + 2 * PATCH, x + PATCH : x + 2 * PATCH]
        patch += alpha[..., None] * (np.asarray(PALETTE[colour], np.float32) - patch)

    def image(self) -> np.ndarray:
        inside = self.pixels[PATCH : PATCH + IMAGE_SIZE, PATCH : PATCH + IMAGE_SIZE]
        return (inside + 0.5).astype(np.uint8)


def render(scene: Scene) -> np.ndarray:
    """The image of a scene, uint8 (64, 64, 3), RGB."""
    canvas = _Canvas()
    for thing in scene.things:
        canvas.paint(thing_opacity(thing.shape, thing.size, thing.centre), thing.colour, thing.centre)
    return canvas.image()


# --- badly drawn


@dataclass(frozen=True)
class Distorted:
    """An image with damage: ``damage`` says how (one of DAMAGES) for the index of each damaged thing of the scene;
    ``blobs`` are the boxes of stray blobs in the background, in pixels."""

    image: np.ndarray
    damage: dict[int, str]
    blobs: tuple[Box, ...]


def render_distorted(scene: Scene, rng: np.random.Generator) -> Distorted:
    """The scene with about a third of its things badly drawn, and stray blobs in a third of the images.

    No damage makes a held-out pair of shape and colour of one that is not.
    """
    canvas = _Canvas()
    damage = {index: pick(DAMAGES, rng) for index in range(len(scene.things)) if rng.random() < 0.35}
    for index, thing in enumerate(scene.things):
        _paint_damaged(canvas, thing, damage.get(index), rng)
    taken = {(thing.row, thing.column) for thing in scene.things}
    free = [cell for cell in random_cells(16, rng) if cell not in taken]
    count = int(rng.integers(1, 3)) if rng.random() < 0.35 or not damage else 0
    blobs = tuple(_paint_blob(canvas, cell, rng) for cell in free[:count])
    return Distorted(canvas.image(), damage, blobs)


def _paint_damaged(canvas: _Canvas, thing: Thing, how: str | None, rng: np.random.Generator) -> None:
    fine = opacity(_points(thing.shape, thing.size, thing.centre))
    if how == "merged":
        fine = np.maximum(fine, opacity(_second_shape(thing, rng)))
    elif how == "bitten":
        fine = _bite(fine, thing, rng)
    elif how == "noisy outline":
        fine = opacity(_ragged(thing, rng))
    alpha = average(fine)
    if how == "blurred":
        alpha = cv2.GaussianBlur(alpha, (0, 0), rng.uniform(0.25, 0.35) * DIAMETER[thing.size])
    canvas.paint(alpha, thing.colour, thing.centre)
    if how == "two-coloured":
        other = pick([c for c in COLOURS if c != thing.colour and (thing.shape, c) not in HELD_OUT_PAIRS], rng)
        canvas.paint(alpha * _half_plane(thing.centre, rng), other, thing.centre)


def _second_shape(thing: Thing, rng: np.random.Generator) -> np.ndarray:
    """The outline of another shape of the same size, more than half a diameter away."""
    shape = pick([s for s in SHAPES if s != thing.shape and (s, thing.colour) not in HELD_OUT_PAIRS], rng)
    angle = rng.uniform(0, 2 * np.pi)
    shift = rng.uniform(0.5, 0.7) * DIAMETER[thing.size]
    return _points(shape, thing.size, thing.centre) + shift * np.array([np.cos(angle), np.sin(angle)])


def _bite(fine: np.ndarray, thing: Thing, rng: np.random.Generator) -> np.ndarray:
    """The mask without a disc of a third of its diameter, at a place on its outline."""
    points = _points(thing.shape, thing.size, thing.centre)
    middle = points.mean(axis=0)
    place = middle + 0.6 * (points[int(rng.integers(len(points)))] - middle)
    radius = rng.uniform(0.3, 0.36) * DIAMETER[thing.size]
    centre = tuple(round(value * SUPER) for value in place)
    return cv2.circle(fine, centre, round(radius * SUPER), 0, thickness=-1)


def _ragged(thing: Thing, rng: np.random.Generator) -> np.ndarray:
    """The outline in many short pieces, each corner pushed in or out by a quarter of its distance."""
    corners = _points(thing.shape, thing.size, thing.centre)
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
    closed = np.concatenate([corners, corners[:1]])
    steps = np.linspace(0, len(corners), 17)[:-1]
    points = np.stack([np.interp(steps, np.arange(len(closed)), closed[:, axis]) for axis in (0, 1)], axis=1)
    radial = 1 + rng.choice([-1.0, 1.0], (len(points), 1)) * rng.uniform(0.2, 0.45, (len(points), 1))
    return middle + (points - middle) * radial


def _half_plane(centre: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Opacity (PATCH, PATCH) of one side of a line through the centre."""
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.meshgrid(np.arange(PATCH) + 0.5, np.arange(PATCH) + 0.5)
    left, top = _origin(centre)
    side = (x + left - centre[0]) * np.cos(angle) + (y + top - centre[1]) * np.sin(angle)
    return np.clip(side + 0.5, 0, 1).astype(np.float32)


def _paint_blob(canvas: _Canvas, cell: tuple[int, int], rng: np.random.Generator) -> Box:
    """A small ellipse, of any colour that is not held out for circles, somewhere in the cell; returns its box."""
    place = random_thing(rng, Want("circle"), cell)
    a, b = rng.uniform(1.5, 3.5, size=2)
    x, y = place.centre
    points = outline("circle") * (2 * a, 2 * b) + np.subtract(place.centre, _origin(place.centre))
    canvas.paint(average(opacity(points)), place.colour, place.centre)
    return x - a, y - b, x + a, y + b
