"""The loop of the paper's Fig. 2: rollout -> ground -> judge -> rasterize -> train, again with the new weights.

Each stage of the run's method reads what the stages before it wrote into the round's folder, and writes its own file
there. Beside the method, whose weights make the next round's candidates, those that the config compares train on the
same candidates, each from its own weights.

The processes of one launch (``srum.processes.connected``) call everything here alike and share the work; what is not
shared, process 0 does, and it alone prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from grounding.base import load_grounder
from judging.stage import load_judging
from srum import models
from srum.config import ConfigError, RunConfig, config_of
from srum.evaluation.accuracy import EvalResult, evaluate, require_metadata
from srum.evaluation.comparison import summarize, summary_table
from srum.models.base import UnifiedModel, require
from srum.plugins import resolve
from srum.processes import Processes
from srum.records import Prompt
from srum.report import is_done, write_report
from srum.rollout import choose_prompts
from srum.run import BASE, REDRAWN, Run, console, find_method, load_model
from srum.run_dir import RunError, alone_in, claim_run, write_json, write_text
from srum.stages import Stage
from train.optimizer import make_optimizer
from train.stage import require_trainable
from train.tracking import require_tracker


def perform(run: Run, name: str, k: int) -> None:
    """One stage of round ``k``, timed; nothing is done again that is finished. Raises RunError for an unknown name."""
    if name not in run.stages:
        raise RunError(f"{run.method.name} has no stage {name!r}; its stages are {', '.join(run.stages)}")
    with run.timed(f"{run.round(k).name}/{name}"):
        resolve(run.stages[name].perform)(run, k)


def run_loop(config: RunConfig, folder: Path, resume: bool = False, command: str = "") -> dict[str, Any]:
    """All rounds, then every arm on the held-out prompts: ``summary.json`` (returned) and ``report.html``.

    ``command`` is what the report says the run was made with.

    An interrupted run with ``resume`` ends in the same ``summary.json``, bit for bit. Raises ConfigError, RunError,
    GrounderError, TrainingError and ValueError for inputs that cannot work, before anything is written, and RunError
    where another launch is at work in the folder.
    """

    def begin() -> None:
        claim_run(folder, config, resume)
        if command and not resume:
            write_text(folder / "command.txt", command + "\n")

    processes = Processes.here()
    processes.once(lambda: check_inputs(config))
    with alone_in(folder):
        processes.once(begin)
        run = Run(folder, config)
        processes.once(lambda: announce(run))
        for k in range(config.rounds):
            for stage in run.stages.values():
                advance(run, stage, k)
        return conclude(run)


def announce(run: Run) -> None:
    """Write the report, and say where it is: from now on it grows with every stage."""
    console.print(f"the report, written again after every stage: {write_report(run.folder)}", soft_wrap=True)


def advance(run: Run, stage: Stage, k: int) -> None:
    """A stage of round ``k``, and the report with what it has made now."""
    processes = Processes.here()
    made_before = processes.once(lambda: is_done(run, stage, k))
    perform(run, stage.name, k)
    if not made_before:
        processes.once(lambda: write_report(run.folder))


def check_inputs(config: RunConfig) -> None:
    """Raise now what would else be raised after hours: prompts, model, sizes, grounder, judge, optimiser, tracker."""
    require_trainable(config.device)
    require_arms(config)
    choose_prompts(config.prompts, config.prompt_count, config.seed)
    if config.eval.count:
        require_metadata(eval_prompts(config))
    models.require_settings(config)
    empty = models.load(config.model, config.device, empty=True)  # it knows its abilities and its grid
    require_abilities(config, empty)
    require_sizes(config, empty)
    load_grounder(config.ground.grounder, load_model(config, config.model), **config.ground.options)
    load_judging(config, config.model, config.seed)
    make_optimizer({"": Parameter(torch.zeros(1))}, config.train)
    if config.train.tracker:
        require_tracker(config.train.tracker)


def require_arms(config: RunConfig) -> None:
    """ConfigError for a method to compare with that there is not, that this config contradicts, or named as another."""
    named: dict[str, str] = {}
    for method in dict.fromkeys((*config.compare, config.method)):
        try:
            config_of(method, config)
        except ValueError as error:
            raise ConfigError(f"compare: {method}: {' '.join(str(error).split())}") from None
        if (other := named.setdefault(find_method(method).name, method)) != method:
            raise ConfigError(f"compare: {other} and {method} are both named {find_method(method).name}")


def require_abilities(config: RunConfig, model: UnifiedModel) -> None:
    """MissingAbility for a model that cannot do what a method needs."""
    for name in dict.fromkeys((*config.compare, config.method)):
        method = find_method(name)
        require(model, method.needs, f"method {method.name}")


def require_sizes(config: RunConfig, model: UnifiedModel) -> None:
    """RunError for images that the model's latent grid does not divide."""
    sizes = {"rollout.size": config.rollout.size} | ({"eval.size": config.eval.size} if config.eval.count else {})
    for name, size in sizes.items():
        try:
            model.latent_grid(size)
        except ValueError as error:
            raise RunError(f"{name}: {error}") from None


def conclude(run: Run) -> dict[str, Any]:
    """Evaluate every arm after the last round; write ``summary.json`` and ``report.html``, print the table.

    With ``eval.count=0`` the report alone; the summary is then empty.
    """
    results = evaluate_arms(run, run.config.rounds, run.folder / "eval") if run.config.eval.count else {}
    summary = summarize(results)

    def publish() -> None:
        if summary:
            write_json(run.folder / "summary.json", summary)
            console.print(summary_table(summary))
        write_report(run.folder)

    Processes.here().once(publish)
    return summary


def evaluate_arms(run: Run, rounds: int, folder: Path) -> dict[str, EvalResult]:
    """The base model and every arm after so many rounds, on the same prompts with the same noise, in ``folder/ARM``."""
    prompts = eval_prompts(run.config)
    results: dict[str, EvalResult] = {}
    weights = {arm: run.weights(arm, rounds) for arm in (BASE, *run.arms)}
    for arm in weights:
        with run.timed(f"{folder.relative_to(run.folder)} {arm}"):
            results |= _evaluated(run, arm, weights[arm], prompts, folder)
    return results


def _evaluated(run: Run, arm: str, weights: str, prompts: Sequence[Prompt], folder: Path) -> dict[str, EvalResult]:
    """An arm's images, drawn once, and where its method draws otherwise, so drawn, too."""
    model, config, seed = load_model(run.config, weights), run.config.eval, run.config.seed
    results = {arm: evaluate(model, prompts, config, folder / arm, seed)}
    if arm in run.arms and (draw := run.arms[arm].method.draw(model, run.arms[arm].config, seed)):
        name = f"{arm}{REDRAWN}"
        results[name] = evaluate(model, prompts, config, folder / name, seed, draw)
    return results


def eval_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts of the evaluation: the same for every seed of the run."""
    return choose_prompts(config.eval.prompts, config.eval.count, seed=0)
