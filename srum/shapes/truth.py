"""The truth about a region or a layout: labels for the understanding branch, and a measure of the judge.

Never part of the reward. A thing badly drawn still takes its place in the prompt: it is bad, not missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from srum.geometry import iou
from srum.records import Box
from srum.shapes.checker import parse
from srum.shapes.matching import Assignment, Seen, assign, faults, matches, related, relation_sentence
from srum.shapes.prompts import NUMBERS, from_metadata
from srum.shapes.scenes import Spec


@dataclass(frozen=True)
class Truth:
    """A score in [-1, 1], what the region is ("small red circle", "background", "layout") and a short reason."""

    score: float
    label: str
    reason: str


STRAY_BLOB = Truth(-1.0, "blob", "badly drawn")


def region_truth(thing: Seen | None, scene_things: Sequence[Seen], spec: Spec, damaged: bool) -> Truth:
    """The truth about one thing of the scene, or about the background (None).

    1.0 asked for with all its attributes; -0.5 the shape is asked for, its colour or size is wrong; -1.0 not asked
    for or ``damaged`` (badly drawn). The background: 1.0 where nothing is missing and it is clean (not ``damaged`` by
    stray blobs), else -1.0. The truth about a thing depends on no other thing: one of several equal things too many
    cannot be seen in a region, so that numbers are the layout's.
    """
    if thing is None:
        return _background_truth(assign(scene_things, spec), damaged)
    if damaged:
        return Truth(-1.0, thing.label, "badly drawn")
    if any(matches(thing, want) for want in spec.wants):
        return Truth(1.0, thing.label, "it is asked for")
    near = [faults(thing, want) for want in spec.wants if want.shape == thing.shape]
    if near:
        fewest = min(near, key=len)
        return Truth(-0.5, thing.label, f"it should be {' and '.join(fewest)}")
    return Truth(-1.0, thing.label, "not asked for")


def _background_truth(assignment: Assignment, stray_blobs: bool) -> Truth:
    if assignment.missing:
        return Truth(-1.0, "background", f"a {assignment.missing[0].name} is missing")
    if stray_blobs:
        return Truth(-1.0, "background", "it is not clean")
    return Truth(1.0, "background", "nothing is missing")


def layout_truth(scene_things: Sequence[Seen], spec: Spec) -> Truth:
    """The truth about the composition.

    Without a relation: 0.4 where the number of things is right, else -1.0. With one: 1.0 where it holds between
    things with all the attributes asked for and the number of things is right, else -1.0.
    """
    if len(scene_things) != spec.total:
        few = "few" if len(scene_things) < spec.total else "many"
        return Truth(-1.0, "layout", f"too {few} things")
    if spec.relation is None:
        number = "one thing" if spec.total == 1 else f"{NUMBERS[spec.total]} things"
        return Truth(0.4, "layout", f"{number} as asked")
    for want in spec.wants:
        if not any(matches(thing, want) for thing in scene_things):
            return Truth(-1.0, "layout", f"the {want.name} is missing")
    holds = related(scene_things, spec)
    return Truth(1.0 if holds else -1.0, "layout", relation_sentence(spec, holds))


# --- the truth about a generated image


def found_region_truth(box: Box | None, image: np.ndarray, metadata: dict[str, Any]) -> bool:
    """Whether the region of an image (uint8 RGB, (64, 64, 3)) is right; None is the background region.

    The box (x0, y0, x1, y1), in pixels, stands for the thing with the largest IoU; a box on no thing is wrong.
    """
    found, spec = parse(image), from_metadata(metadata)
    things = [thing for thing in found if not thing.stray]
    if box is None:
        return region_truth(None, things, spec, damaged=len(things) < len(found)).score > 0
    thing = max(found, key=lambda other: iou(box, other.box), default=None)
    if thing is None or thing.stray or iou(box, thing.box) == 0:
        return False
    return region_truth(thing, things, spec, damaged=not thing.well_formed).score > 0


def found_layout_truth(image: np.ndarray, metadata: dict[str, Any]) -> bool:
    """Whether the composition of an image (uint8 RGB, (64, 64, 3)) is right; stray blobs are no things."""
    return layout_truth([thing for thing in parse(image) if not thing.stray], from_metadata(metadata)).score > 0
