"""The arms of a run, compared: every arm's images of the same prompts, the summary, and its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from srum.config import RunConfig
from srum.evaluation.accuracy import EvalResult, evaluate
from srum.evaluation.statistics import difference
from srum.records import Prompt
from srum.run import BASE, REDRAWN, Run, load_model
from srum.stages.rollout import choose_prompts

EVAL = "held-out prompts - eval {}"  # what is done, of an arm


def eval_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts of the evaluation: the same for every seed of the run."""
    return choose_prompts(config.eval.prompts, config.eval.count, seed=0)


def of_base(config: RunConfig) -> tuple[str, ...]:
    """What the images and verdicts of the model that enters depend on."""
    return config.model, str(config.seed), config.device, str(config.compile), config.eval.model_dump_json()


def evaluate_arm(run: Run, arm: str, weights: str, folder: Path) -> dict[str, EvalResult]:
    """The images of an arm with these weights, drawn once, and where its method draws otherwise, so drawn, too; in
    ``folder``/ARM."""
    model, config, seed = load_model(run.config, weights), run.config.eval, run.config.seed
    prompts = eval_prompts(run.config)
    results = {arm: evaluate(model, prompts, config, folder / arm, seed)}
    if arm in run.arms and (draw := run.arms[arm].method.draw(model, run.arms[arm].config, seed)):
        name = f"{arm}{REDRAWN}"
        results[name] = evaluate(model, prompts, config, folder / name, seed, draw)
    return results


def summarize(results: Mapping[str, EvalResult]) -> dict[str, Any]:
    """Plain values of ``summary.json``: accuracies in percent, intervals of 95%, differences to ``base`` in points."""
    summary = {
        arm: asdict(result.overall)
        | {"seed": result.seed, "per_category": {name: asdict(a) for name, a in result.per_category.items()}}
        for arm, result in results.items()
    }
    for arm, result in results.items():
        if arm != BASE:
            gain = difference(result.correct, results[BASE].correct).times(100)
            summary[arm]["difference_to_base"] = {"points": gain.value, "interval": gain.interval}
    return summary


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The summary as a table of the terminal, a column per arm: percent, points."""
    table = Table("", *summary, title="held-out prompts, exact checker")
    table.add_row("accuracy, %", *(f"{values['accuracy']:.1f}" for values in summary.values()))
    table.add_row("  95% interval", *("{:.1f} to {:.1f}".format(*values["interval"]) for values in summary.values()))
    table.add_row("against base, points", *(_difference(values) for values in summary.values()))
    table.add_section()
    for category in next(iter(summary.values()))["per_category"]:
        accuracies = (values["per_category"][category]["accuracy"] for values in summary.values())
        table.add_row(category, *(f"{accuracy:.1f}" for accuracy in accuracies))
    return table


def _difference(values: Mapping[str, Any]) -> str:
    if "difference_to_base" not in values:
        return ""
    low, high = values["difference_to_base"]["interval"]
    return f"{values['difference_to_base']['points']:+.1f}\n{low:+.1f} to {high:+.1f}"
