"""Tables of benchmarks: means of columns, figures of them, intervals over prompts, published rows beside ours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srum.evaluation.benchmark import Benchmark, Verdict
from srum.evaluation.statistics import Estimate, stratified, stratified_difference, wilson

PUBLISHED = Path(__file__).parent / "published.jsonl"


@dataclass(frozen=True)
class Table:
    """Columns and figures of one model's images, by one evaluator. ``n`` images, of which ``failures`` have no value;
    of a column, ``counts`` values enter the mean."""

    columns: dict[str, Estimate]
    figures: dict[str, Estimate]
    counts: dict[str, int]
    n: int
    failures: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        parts = {"columns": self.columns, "figures": self.figures}
        rows = {part: {name: [e.value, e.low, e.high] for name, e in rows.items()} for part, rows in parts.items()}
        return rows | {"counts": self.counts, "n": self.n, "failures": self.failures}


def table_of(benchmark: Benchmark, verdicts: Sequence[Verdict], official: bool = False) -> Table:
    """The table of these verdicts; ``official``: as the original scorer counts, its faults included.

    Figures whose columns are not all there are left out. Intervals: prompts are drawn again within their categories.
    """
    sums, counts, columns, strata = _by_prompt(verdicts, official)
    weights = _weights(benchmark, columns)
    if columns:
        rows = np.vstack([np.eye(len(columns)), *weights.values()])
        estimates = stratified(sums, counts, strata, rows)
    else:
        estimates = []
    own = {
        name: _of_share(benchmark, sums[:, place], counts[:, place], estimate)
        for place, (name, estimate) in enumerate(zip(columns, estimates, strict=False))
    }
    alone = {name: next(iter(parts)) for name, parts in benchmark.figures().items() if list(parts.values()) == [1.0]}
    figures = zip(weights, estimates[len(columns) :], strict=True)
    return Table(
        own,
        {name: own[alone[name]] if name in alone else estimate for name, estimate in figures},
        dict(zip(columns, map(int, counts.sum(axis=0)), strict=True)),
        len(verdicts),
        dict(Counter(verdict.failure.value for verdict in verdicts if verdict.failure)),
    )


def differences(
    benchmark: Benchmark, ours: Sequence[Verdict], base: Sequence[Verdict], official: bool = False
) -> dict[str, Estimate]:
    """Figures of ``ours`` less those of ``base``, over the images of which both have a value."""

    def with_values(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
        return {v.item_id: v for v in verdicts if (v.official if official else v.values)}

    first, second = with_values(ours), with_values(base)
    shared = [name for name in first if name in second]
    if not shared:
        return {}
    a = _by_prompt([first[name] for name in shared], official)
    b = _by_prompt([second[name] for name in shared], official)
    weights = _weights(benchmark, a[2])
    if a[2] != b[2] or not weights:
        return {}
    estimates = stratified_difference((a[0], a[1]), (b[0], b[1]), a[3], np.vstack(list(weights.values())))
    return dict(zip(weights, estimates, strict=True))


def combined(benchmark: Benchmark, values: Mapping[str, float]) -> dict[str, float]:
    """The benchmark's figures of the columns and figures of a published row."""
    known = {benchmark.printed.get(name, name): value for name, value in values.items()}
    for name, parts in benchmark.figures().items():
        if name not in known and parts.keys() <= known.keys():
            known[name] = sum(weight * known[part] for part, weight in parts.items())
    return {name: known[name] for name in benchmark.figures() if name in known}


@cache
def published_rows() -> list[dict[str, Any]]:
    """What papers and repositories print: benchmark, model, setting, evaluator, source, values, overall, note."""
    return [json.loads(line) for line in PUBLISHED.read_text(encoding="utf-8").splitlines()]


def same_evaluator(ours: str, published: str) -> bool:
    """Whether a published row was made by the evaluator of ours: a judge's model by its name, without its owner and
    without our note on the template."""
    return ours.partition(",")[0].rpartition("/")[2].lower() == published.rpartition("/")[2].lower()


def _by_prompt(
    verdicts: Sequence[Verdict], official: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str], list[str]]:
    """Sums and counts (prompts, columns), the columns, and the category of each prompt."""
    prompts = list(dict.fromkeys(verdict.prompt_id for verdict in verdicts))
    values = [verdict.official if official else verdict.values for verdict in verdicts]
    columns = sorted({column for one in values for column in one})
    row, place = ({name: index for index, name in enumerate(names)} for names in (prompts, columns))
    sums, counts = np.zeros((2, len(prompts), len(columns)))
    for verdict, one in zip(verdicts, values, strict=True):
        for column, numbers in one.items():
            sums[row[verdict.prompt_id], place[column]] += sum(numbers)
            counts[row[verdict.prompt_id], place[column]] += len(numbers)
    category = {verdict.prompt_id: verdict.category for verdict in verdicts}
    return sums, counts, columns, [category[name] for name in prompts]


def _of_share(
    benchmark: Benchmark, sums: NDArray[np.float64], counts: NDArray[np.float64], estimate: Estimate
) -> Estimate:
    """Wilson's interval where a column is a share over prompts, all or none of a prompt's values being the top: there a
    bootstrap of few prompts, or of prompts that are all alike, has too little or no width."""
    means = sums[counts > 0] / counts[counts > 0]
    if not np.isin(means, (0.0, benchmark.top)).all():
        return estimate
    share, unit = wilson([bool(mean) for mean in means]), benchmark.top / 100
    return Estimate(estimate.value, min(unit * share.low, estimate.value), unit * share.high, prompts=len(means))


def _weights(benchmark: Benchmark, columns: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """The figures that these columns give: weights (columns,)."""
    known = {name: np.eye(len(columns))[index] for index, name in enumerate(columns)}
    figures = {}
    for name, parts in benchmark.figures().items():
        if parts.keys() <= known.keys():
            figures[name] = known[name] = sum(  # type: ignore[assignment]
                (weight * known[part] for part, weight in parts.items()), np.zeros(len(columns))
            )
    return figures
