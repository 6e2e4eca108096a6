"""What people read of benchmarks: the table of a run, runs beside one another, published rows, the list of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from srum.evaluation.bench_config import BenchConfig, file_name, read_config
from srum.evaluation.benchmark import Benchmark, Verdict
from srum.evaluation.leakage import Leakage
from srum.evaluation.statistics import Estimate
from srum.evaluation.tables import Table, combined, differences, published_rows, same_evaluator, table_of
from srum.plugins import find, names
from srum.run_dir import RunError, read_records, write_json, write_text


def listing() -> str:
    """What ``srum bench --list`` says: the shipped and the installed benchmarks, a line each."""
    lines = []
    for name in names("benchmark"):
        kind: type[Benchmark] = find("benchmark", name)
        variants = ", ".join(variant for variant in kind.variants if variant)
        origin = f"; of {kind.origin}" if kind.origin.repository else ""
        lines.append(
            f"{name}: {kind.about}\n    variants: {variants or '-'}; scored by {', '.join(kind.evaluators)}{origin}"
        )
    return "\n".join(lines)


def comparison(outs: Sequence[Path]) -> str:
    """One table for each benchmark, variant and evaluator of the runs, a row for each of their settings.

    Differences are to the first row, paired over prompts: images of the same item. Raises RunError where there is none.
    """
    groups: dict[tuple[str, str, str], list[tuple[Path, BenchConfig, list[Verdict]]]] = {}
    for out in outs:
        for path in sorted(out.glob("bench/*/*/verdicts-*.jsonl")):
            config, verdicts = read_config(path.parent), read_records(path, Verdict)
            if not verdicts:
                raise RunError(f"{path} holds no verdicts; delete it, and srum bench makes it again")
            key = config.benchmark, config.variant, verdicts[0].evaluator
            groups.setdefault(key, []).append((out, config, verdicts))
    if not groups:
        raise RunError(f"{', '.join(map(str, outs))}: no verdicts of a benchmark in there")
    return "\n".join(_compared(*key, rows) for key, rows in groups.items())


def _compared(name: str, variant: str, evaluator: str, rows: Sequence[tuple[Path, BenchConfig, list[Verdict]]]) -> str:
    benchmark: Benchmark = find("benchmark", name)(variant)
    title = f"# {name}{f', {variant}' if variant else ''}, by {evaluator}"
    lines = [title, "", "| run | model | setting | n | failures | figures | to the first |", "|---" * 7 + "|"]
    for out, config, verdicts in rows:
        table = table_of(benchmark, verdicts)
        moved = {} if verdicts is rows[0][2] else differences(benchmark, verdicts, rows[0][2])
        cells = [str(out), config.model or config.images, config.setting, str(table.n)]
        cells += [str(sum(table.failures.values())), _figures(table.figures, benchmark.digits)]
        lines.append("| " + " | ".join([*cells, _figures(moved, benchmark.digits, "+")]) + " |")
    return "\n".join([*lines, "", *_published_lines(benchmark, evaluator)]) + "\n"


def _figures(figures: Mapping[str, Estimate], digits: int, sign: str = "") -> str:
    form = f"{sign}.{digits}f"
    return ", ".join(f"{name} {e.value:{form}} [{e.low:{form}}, {e.high:{form}}]" for name, e in figures.items())


def write_table(
    benchmark: Benchmark, config: BenchConfig, verdicts: Sequence[Verdict], folder: Path, leakage: Leakage | None = None
) -> str:
    """table-EVALUATOR.json and .md in ``folder``; the latter is returned."""
    evaluator = verdicts[0].evaluator
    ours, official = (table_of(benchmark, verdicts, way) for way in (False, True))
    stem = file_name(evaluator)
    facts = {"model": config.model or config.images, "setting": config.setting, "evaluator": evaluator}
    values = facts | {"ours": ours.to_json(), "official": official.to_json()}
    text = markdown(benchmark, config, evaluator, ours, official)
    if leakage is not None:
        values["leakage"] = asdict(leakage)
        text += f"\n{leakage.sentence()}\n"
    write_json(folder / f"table-{stem}.json", values)
    write_text(folder / f"table-{stem}.md", text)
    return text


def markdown(benchmark: Benchmark, config: BenchConfig, evaluator: str, ours: Table, official: Table) -> str:
    """The table of one model with published rows under it."""
    names = [*ours.figures, *(name for name in ours.columns if name not in ours.figures)]
    failed = ", ".join(f"{count} {name}" for name, count in ours.failures.items()) or "none"
    lines = [
        f"# {benchmark.name}: {config.model or config.images}",
        "",
        f"{config.setting}; evaluator {evaluator}; {ours.n} images; failures: {failed}. Intervals of 95% over prompts.",
        "",
        "| | value | 95% | n | as the original counts |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        estimate = ours.figures.get(name) or ours.columns[name]
        original = official.figures.get(name) or official.columns.get(name)
        low, high = (f"{end:.{benchmark.digits}f}" for end in estimate.interval)
        cells = [name, f"{estimate.value:.{benchmark.digits}f}", f"{low} to {high}", str(ours.counts.get(name, ours.n))]
        lines.append("| " + " | ".join([*cells, f"{original.value:.{benchmark.digits}f}" if original else ""]) + " |")
    return "\n".join([*lines, "", *_published_lines(benchmark, evaluator)]) + "\n"


def _published_lines(benchmark: Benchmark, evaluator: str) -> list[str]:
    rows = [row for row in published_rows() if row["benchmark"] == benchmark.published]
    if not rows:
        return []
    lines = ["| published | setting | evaluator | figures | |", "|---|---|---|---|---|"]
    for row in rows:
        figures = combined(benchmark, row["values"])
        derived = ", ".join(f"{name} {value:.{benchmark.digits}f}" for name, value in figures.items())
        printed = f"printed {row['overall']}" if row.get("overall") is not None else "no overall printed"
        marked = "" if same_evaluator(evaluator, row["evaluator"]) else "another evaluator: not to be compared"
        cells = [row["model"], row["setting"], row["evaluator"], f"{printed}; from its categories: {derived or '-'}"]
        lines.append("| " + " | ".join([*cells, marked]) + " |")
    return lines
