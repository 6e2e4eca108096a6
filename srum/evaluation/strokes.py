"""What drawing in strokes is made of, on the embedded world: plans, drafts, inspections, corrections, each by the exact
checker (docs/process.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from srum.drawing.chaining import ChainRecord
from srum.drawing.strokes import parse_inspection, parse_plan
from srum.evaluation.statistics import wilson
from srum.images import open_image
from srum.records import Prompt
from srum.shapes.checker import Found, parse
from srum.shapes.matching import completable
from srum.shapes.prompts import from_metadata
from srum.shapes.scenes import CELL, GRID, Spec, Thing
from srum.shapes.wording import parse_things, placed


@dataclass(frozen=True)
class Look:
    """One inspection beside the truth: whether the plan can be completed and lacks things, and whether the image shows
    the plan; what was said of both, None where that could not be read."""

    completable: bool
    lacks: bool
    shows: bool
    plan_objected: bool | None
    image_objected: bool | None


def looks(record: ChainRecord, spec: Spec, folder: Path) -> Iterator[Look]:
    """The inspections of a chain whose plans could be read."""
    plan: list[Thing] | None = None
    shown: Counter[str] = Counter()
    for turn in record.turns:
        if turn.candidate_id is not None:
            plan = _things(turn.text or "")
            shown = things_in(folder / "images" / f"{turn.candidate_id}.png")
        elif turn.kind == "inspect" and plan is not None:
            read = parse_inspection(turn.text or "", "compact", ended=turn.failure != "truncated")
            said = (None, None) if read.failure else (bool(read.plan_fault), bool(read.image_fault))
            yield Look(completable(plan, spec), len(plan) < spec.total, shown == Counter(map(placed, plan)), *said)


def _things(plan: str) -> list[Thing] | None:
    try:
        return parse_things(parse_plan(plan, "compact").description)
    except ValueError:
        return None


def things_in(path: Path) -> Counter[str]:
    """The things of an image with their cells, in words, as the checker finds them."""
    return Counter(_placed(found) for found in parse(np.asarray(open_image(path))) if not found.stray)


def _placed(found: Found) -> str:
    column, row = (min(max(int(x // CELL), 0), GRID - 1) for x in found.centre)
    return placed(Thing(found.shape, found.colour, found.size, row, column))


def strokes_table(records: Sequence[ChainRecord], prompts: Sequence[Prompt], folder: Path) -> Table:
    """Shares with their intervals."""
    specs = {prompt.id: from_metadata(prompt.metadata) for prompt in prompts}
    every = [look for record in records for look in looks(record, specs[record.id], folder)]
    read = [look for look in every if look.plan_objected is not None]
    plan_side = [(bool(look.plan_objected), not look.completable) for look in read]
    image_side = [(bool(look.image_objected), not look.shows) for look in read]
    shares = {
        "plans that can be completed": [look.completable for look in every],
        "chains whose every plan can be": [
            all(look.completable for look in looks(record, specs[record.id], folder)) for record in records
        ],
        "images that show their plan": [look.shows for look in every],
        "inspections that can be read": [look in read for look in every],
        "plan side, precision": [wrong for objected, wrong in plan_side if objected],
        "plan side, recall": [objected for objected, wrong in plan_side if wrong],
        "plan side, false alarms on what only lacks things": [
            bool(look.plan_objected) for look in read if look.completable and look.lacks
        ],
        "image side, precision": [wrong for objected, wrong in image_side if objected],
        "image side, recall": [objected for objected, wrong in image_side if wrong],
    }
    table = Table("what", "%", "95% interval", "n")
    for name, values in shares.items():
        if values:
            share = wilson(values)
            table.add_row(name, f"{share.value:.1f}", f"{share.low:.1f} to {share.high:.1f}", str(len(values)))
    table.add_row("images of a chain, mean", f"{np.mean([len(r.images) for r in records]):.2f}", "", str(len(records)))
    return table
