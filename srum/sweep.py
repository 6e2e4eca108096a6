"""``srum sweep``: the same run with several seeds and settings, and one table with intervals over seeds and prompts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from srum.config import CONFIG, ConfigError, RunConfig, changed
from srum.evaluation.comparison import of_base
from srum.evaluation.statistics import Estimate, crossed, difference
from srum.explain import plain
from srum.loop import run_loop
from srum.processes import Processes
from srum.run import BASE, Run
from srum.run_dir import write_json
from srum.views.reading import RunView
from srum.yaml_files import YamlError, parse_yaml

ONLY = "as configured"  # the name of the setting where nothing is varied


def settings(varied: Sequence[str]) -> dict[str, list[str]]:
    """The overrides of every combination of ``train.lr=1e-4,3e-4`` and the like, by their name.

    Raises ConfigError for what is not ``field=value,value``.
    """
    fields: list[list[str]] = []
    for one in varied:
        name, _, text = one.partition("=")
        try:
            found = parse_yaml(f"[{text}]", one)
        except YamlError:
            found = []
        if name == "seed":
            raise ConfigError("--vary seed: --seeds says how many of them there are")
        if not name or not found:
            raise ConfigError(f"--vary {one!r}: expected field=value,value such as train.lr=1e-4,3e-4")
        fields.append([f"{name}={plain(value)}" for value in found])
    return {" ".join(combined) or ONLY: list(combined) for combined in itertools.product(*fields)}


def folder_of(out: Path, setting: str, seed: int) -> Path:
    """Where the run of a setting and a seed is."""
    return out / re.sub(r"[^\w.=+-]+", "_", setting) / f"seed-{seed}"


def sweep(config: RunConfig, varied: Sequence[str], seeds: Sequence[int], out: Path, command: str = "") -> list[Any]:
    """Make every run that is not finished, and return the rows of the table, which ``sweep.json`` keeps.

    Each is a whole run in ``out/SETTING/seed-S``, interrupted and resumed as any other. Settings of a seed share what
    the model that enters draws in the evaluation, where they would draw the same. Raises ConfigError before the first
    run for a setting that is none, two that would share a folder, and a config without an evaluation.
    """
    named = {name: changed(config, overrides) for name, overrides in settings(varied).items()}
    if missing := [name for name, setting in named.items() if not setting.eval.count]:
        raise ConfigError(f"eval.count: a sweep compares accuracies; {missing[0]} has no evaluation")
    if len({folder_of(out, name, 0) for name in named}) < len(named):
        raise ConfigError(f"two of these settings would share a folder: {', '.join(named)}")
    processes, bases = Processes.here(), dict[tuple[str, ...], Path]()
    for seed, (name, setting) in itertools.product(seeds, named.items()):
        folder, config = folder_of(out, name, seed), setting.model_copy(update={"seed": seed})
        begun = processes.once((folder / CONFIG).exists)
        run_loop(config, folder, begun, command, base=bases.get(of_base(config)))
        bases.setdefault(of_base(config), folder / "eval" / BASE)
    rows = compared({name: [RunView(folder_of(out, name, seed)) for seed in seeds] for name in named})
    processes.once(lambda: write_json(out / "sweep.json", [_plain(row) for row in rows]))
    return rows


def compared(runs: Mapping[str, Sequence[RunView]]) -> list[dict[str, Any]]:
    """A row per setting and arm: ``accuracy``, the difference ``to base``, and of the setting's own arm that ``to
    first``, which is the own arm of the first setting; each an Estimate over seeds and prompts, in percent, points."""
    rows: list[dict[str, Any]] = []
    first: list[list[bool]] | None = None
    for setting, views in runs.items():
        own, verdicts = Run(views[0].folder, views[0].config).method.name, [view.verdicts() for view in views]
        correct = {arm: [[one.correct for one in of_seed[arm]] for of_seed in verdicts] for arm in verdicts[0]}
        for arm, table in correct.items():
            row: dict[str, Any] = {"setting": setting, "arm": arm, "accuracy": crossed(table).times(100)}
            if arm != BASE:
                row["to base"] = difference(table, correct[BASE]).times(100)
            if arm == own and first is not None:
                row["to first"] = difference(table, first).times(100)
            rows.append(row)
        first = first or correct[own]
    return rows


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: asdict(value) if isinstance(value, Estimate) else value for key, value in row.items()}


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows in percent and points, each with its interval."""
    table = Table("setting", "arm", "accuracy, %", "against base, points", "against the first setting, points")
    table.caption = f"95% intervals over {rows[0]['accuracy'].covers}"
    for row in rows:
        gains = [_cell(row.get(key), sign="+") for key in ("to base", "to first")]
        table.add_row(row["setting"], row["arm"], _cell(row["accuracy"]), *gains)
    return table


def _cell(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:{sign}.1f} ({estimate.low:{sign}.1f} to {estimate.high:{sign}.1f})"
