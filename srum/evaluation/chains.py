"""The evaluation's prompts drawn in chains or in strokes, and how accurate their images are after 0, 1, 2, ...
refinements (docs/r3.md, docs/process.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from srum.config import RunConfig
from srum.drawing.chaining import ChainRecord, claim, draw_chains, draw_strokes
from srum.drawing.chains import ChainSettings
from srum.drawing.strokes import StrokeSettings
from srum.evaluation.comparison import eval_prompts
from srum.evaluation.statistics import wilson
from srum.evaluation.strokes import strokes_table
from srum.images import open_image
from srum.records import Prompt
from srum.run import load_model
from srum.shapes.checker import is_right
from srum.shapes.prompts import is_checkable


def draw_evaluation(config: RunConfig, settings: ChainSettings | StrokeSettings, folder: Path) -> Sequence[ChainRecord]:
    """The prompts of the evaluation, drawn so by the config's model and kept in ``folder``. Raises RunError as
    ``claim``, before the model is loaded."""
    prompts = eval_prompts(config)
    claim(folder, config.model, prompts, settings, config.seed)
    model, size = load_model(config, config.model), config.eval.batch_size
    if isinstance(settings, ChainSettings):
        return draw_chains(model, prompts, settings, folder, config.seed, size)
    return draw_strokes(model, prompts, settings, folder, config.seed, size)


def tables(
    config: RunConfig, settings: ChainSettings | StrokeSettings, records: Sequence[ChainRecord], folder: Path
) -> list[Table]:
    """What the checker says of the images of ``draw_evaluation``, and of strokes of their plans; nothing where it
    cannot tell."""
    prompts = eval_prompts(config)
    if not all(is_checkable(prompt.metadata, settings.drawing.size) for prompt in prompts):
        return []

    def shares(last: int) -> Table:
        categories = [str(prompt.metadata["tag"]) for prompt in prompts]
        return accuracy_table(verdicts(records, prompts, folder, last), categories)

    if isinstance(settings, ChainSettings):
        return [shares(settings.max_refinements)]
    return [shares(settings.budget - 1), strokes_table(records, prompts, folder)]


def verdicts(
    records: Sequence[ChainRecord], prompts: Sequence[Prompt], folder: Path, refinements: int
) -> list[list[bool]]:
    """Per chain whether its image is right after 0, 1, ... ``refinements``, by the exact checker; one without an image,
    because its plan could not be read, is wrong."""
    metadata = {prompt.id: prompt.metadata for prompt in prompts}
    rows = []
    for record in records:
        right = [is_right(open_image(folder / file), metadata[record.id]) for file in record.files()]
        rows.append([(right or [False])[min(k, len(right) - 1)] for k in range(refinements + 1)])
    return rows


def accuracy_table(rows: Sequence[Sequence[bool]], categories: Sequence[str]) -> Table:
    """Accuracy after each number of refinements with its interval, by category, and what the last one did."""
    table = Table("after", "right, %", "95% interval", *(names := sorted(set(categories))), "mended", "broken")
    for k in range(len(rows[0])):
        estimate = wilson([row[k] for row in rows])
        own = [np.mean([row[k] for row, c in zip(rows, categories, strict=True) if c == name]) for name in names]
        mended, broken = (sum(k > 0 and row[k] is to and row[k - 1] is not to for row in rows) for to in (True, False))
        cells = [f"{100 * share:.0f}" for share in own]
        interval = f"{estimate.low:.1f} to {estimate.high:.1f}"
        table.add_row(str(k), f"{estimate.value:.1f}", interval, *cells, str(mended), str(broken))
    return table


def endings(records: Sequence[ChainRecord]) -> dict[str, int]:
    """How many chains ended how."""
    return dict(Counter(record.end for record in records).most_common())
