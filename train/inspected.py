"""Inspections of the model's own strokes (docs/process.md): what it planned and drew, and what is truly wrong with it.

The model draws prompts of the embedded world in strokes, its texts at temperature 1, and inspects nothing. Of each
plan that can be read and its draft the exact writers say what an inspection should. All at which a side objects are
kept, and as many of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from srum.drawing.strokes import Drawing, StrokeSettings, draw_in_strokes
from srum.evaluation.accuracy import require_metadata
from srum.models.base import Segment, UnifiedModel
from srum.records import Prompt
from srum.shapes.edits import apply
from srum.shapes.prompts import from_metadata
from srum.shapes.scenes import Scene, Spec, Thing
from srum.shapes.strokes import Inspection, Plan, conflict, inspect, parse_plan
from srum.train.examples import Example
from srum.train.tasks.base import Picture, recognised
from srum.train.tasks.editing import MOST_EDITS, repaired


def own_inspections(
    model: UnifiedModel, prompts: Sequence[Prompt], settings: StrokeSettings, batch_size: int, seed: int
) -> list[Example]:
    """Examples [prompt, plan, seen draft, inspection*] of the prompts' drawings, wrong ones first, then as many right
    ones as there are of these. Raises RunError for a prompt that cannot be checked."""
    require_metadata(prompts, settings.drawing.size)
    decoding = replace(settings.decoding, temperature=1.0)
    settings = replace(settings, form="compact", max_refinements=0, decoding=decoding)
    wrong, right = list[Example](), list[Example]()
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        drawings = draw_in_strokes(model, [p.text for p in some], [p.id for p in some], settings, seed)
        for prompt, drawing in zip(some, drawings, strict=True):
            for number, (context, reply) in enumerate(inspected(drawing, from_metadata(prompt.metadata))):
                said = Segment("text", text=str(reply), loss=True)
                example = Example(id=f"own-{prompt.id}-{number}", segments=[*context, said])
                (right if isinstance(reply.verdict, str) else wrong).append(example)
    return wrong + right[: len(wrong)]


def inspected(drawing: Drawing, spec: Spec) -> Iterator[tuple[list[Segment], Inspection]]:
    """The context of each draft's inspection, and what it should be; none of what no edits can name."""
    for stage in drawing.stages:
        if stage.made is None:
            continue
        reply = _truth(stage.asked, recognised(np.asarray(stage.made.image.convert("RGB"))), spec)
        if reply is not None:
            texts = [Segment("text", text=drawing.prompt), Segment("text", text=stage.asked)]
            yield [*texts, Segment("seen", image=stage.made.image)], reply


def _truth(asked: str, picture: Picture, spec: Spec) -> Inspection | None:
    try:
        plan = parse_plan(asked)
    except ValueError:
        return None
    mended = _without_conflict(plan, spec)
    if picture.blobs or mended is None:
        return None
    reply = inspect(plan.things, picture.things, mended, spec, picture.damaged)
    return None if isinstance(reply.verdict, tuple) and len(reply.verdict) > MOST_EDITS else reply


def _without_conflict(plan: Plan, spec: Spec) -> tuple[Thing, ...] | None:
    """The planned scene, changed where it conflicts with the prompt; what is only missing stays missing."""
    if not conflict(plan.things, spec):
        return plan.things
    changes = [edit for edit in repaired(plan.things, spec) or () if edit.before is not None]
    try:
        things = apply(Scene(plan.things), changes).things
    except ValueError:
        return None
    return None if conflict(things, spec) else things
