"""The loop of the paper's Fig. 2: rollout -> ground -> judge -> rasterize -> train, again with the new weights.

Each stage of the run's method reads what the stages before it wrote into the round's folder, and writes its own file
there. Beside the method, whose weights make the next round's candidates, those that the config compares train on the
same candidates, each from its own weights.

The processes of one launch (``srum.processes.connected``) call everything here alike and share the work; what is not
shared, process 0 does, and it alone prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch.nn import Parameter

from srum import models, own
from srum.config import ConfigError, RunConfig, config_of
from srum.evaluation.accuracy import EvalResult, require_metadata
from srum.evaluation.comparison import EVAL, eval_prompts, evaluate_arm, summarize, summary_table
from srum.fork import share_folder
from srum.grounding.base import load_grounder
from srum.images import open_image
from srum.judging.drift import judge_again
from srum.judging.stage import load_judging
from srum.models.base import UnifiedModel, require
from srum.plan import Plan, foresee
from srum.plugins import resolve
from srum.processes import Processes
from srum.progress import after_first_batch, expecting, part
from srum.run import BASE, Run, console, find_method, load_model
from srum.run_dir import RunError, alone_in, claim_run, write_json, write_text
from srum.stages import ROLLOUT, SHIPPED, Stage
from srum.stages.rollout import own_prompts, round_prompts
from srum.train.optimizer import make_optimizer
from srum.train.own import judge_own
from srum.train.stage import require_trainable, subject_of
from srum.train.tracking import require_tracker, tracked
from srum.views.plots import side_by_side
from srum.views.report import OFF, is_done, judge_of, write_report

PAIRS = 12  # that a tracker shows


def perform(run: Run, name: str, k: int) -> None:
    """One stage of round ``k``, timed; nothing is done again that is finished. Raises RunError for an unknown name."""
    if name not in run.stages:
        raise RunError(f"{run.method.name} has no stage {name!r}; its stages are {', '.join(run.stages)}")
    with run.timed(f"{run.round(k).name}/{name}"), part(run.named(k, name)):
        resolve(run.stages[name].perform)(run, k)


def next_command(run: Run, name: str, k: int) -> str:
    """The command that goes on after a stage of round ``k``."""
    names = list(run.stages)
    place = names.index(name) + 1
    if place == len(names) and k + 1 == run.config.rounds:
        return f"srum {'eval' if run.config.eval.count or own_prompts(run.pinned) else 'report'} {run.folder}"
    following, k = (names[place], k) if place < len(names) else (names[0], k + 1)
    if following not in {stage.name for stage in SHIPPED}:
        return f"srum run --out {run.folder} --resume"
    return f"srum {following} {run.folder} --round {k}"


def run_loop(
    config: RunConfig,
    folder: Path,
    resume: bool = False,
    command: str = "",
    foretell: bool = False,
    base: Path | None = None,
) -> dict[str, Any]:
    """All rounds, then every arm on the held-out prompts: ``summary.json`` (returned) and ``report.html``.

    ``command`` is what the report says the run was made with. ``foretell``: print first what a new run will cost
    (``srum.plan``), and on the way the time that is left in all; processes of several machines do not.

    ``base``: the finished evaluation of the model that enters in a run of the same model, evaluation and seed
    (``srum.evaluation.comparison.of_base``), which is shared and not made again.

    An interrupted run with ``resume`` ends in the same ``summary.json``, bit for bit. Raises ConfigError, RunError,
    GrounderError, TrainingError and ValueError for inputs that cannot work, before anything is written, and RunError
    where another launch is at work in the folder.
    """

    def begin() -> None:
        claim_run(folder, config, resume)
        if command and not resume:
            write_text(folder / "command.txt", command + "\n")
        if base is not None:
            share_folder(base, folder / "eval" / BASE)

    processes = Processes.here()
    config = processes.once(lambda: check_inputs(config, folder))
    with alone_in(folder):
        processes.once(begin)
        run = Run(folder, config)
        processes.once(lambda: announce(run))
        measurable = processes.whole or processes.count == 1
        plan = foresee(config, folder) if foretell and not resume and measurable else None
        with _ending(run), expecting({} if plan is None else plan.seconds):
            if plan is not None and processes.rank == 0:
                show_plan(plan)
            for k in range(config.rounds):
                for stage in run.stages.values():
                    advance(run, stage, k)
            return conclude(run)


@contextmanager
def _ending(run: Run) -> Iterator[None]:
    """Where the block fails or is interrupted, the report no longer loads itself again."""
    try:
        yield
    except BaseException:
        if Processes.here().rank == 0:
            with suppress(Exception):  # what went wrong is raised here; the report may fail of the same, and hide it
                write_report(run.folder)
        raise


def show_plan(plan: Plan) -> None:
    """Print what a run will cost."""
    console.print(plan.table())
    for line in plan.lines():
        console.print(line, soft_wrap=True, highlight=False)


def announce(run: Run) -> None:
    """Write the report, and say where it is: from now on it grows with every stage."""
    console.print(
        f"the report, written again after every stage: {write_report(run.folder, running=True)}", soft_wrap=True
    )


def advance(run: Run, stage: Stage, k: int) -> None:
    """A stage of round ``k``, and the report with what it has made now."""
    processes = Processes.here()

    def report() -> Path:
        return write_report(run.folder, running=True)

    made_before = processes.once(lambda: is_done(run, stage, k))
    first = stage == ROLLOUT and processes.rank == 0
    with after_first_batch(report) if first else nullcontext():
        perform(run, stage.name, k)
    if not made_before:
        processes.once(report)


def check_inputs(config: RunConfig, folder: Path | None = None) -> RunConfig:
    """The config as its model takes it. Raises now what would else be raised after hours: prompts, model, sizes,
    grounder, judge, optimiser, tracker. The prompts are those of the run in ``folder``, where there is one."""
    config = models.settled(config)
    require_trainable(config.device)
    require_arms(config)
    round_prompts(config if folder is None else Run(folder, config).pinned, 0)
    if config.eval.count:
        require_metadata(eval_prompts(config), config.eval.size)
    empty = models.load(config.model, config.device, empty=True)  # it knows its abilities and its grid
    require_abilities(config, empty)
    require_sizes(config, empty)
    load_grounder(config.ground.grounder, load_model(config, config.model), **config.ground.options)
    load_judging(config, config.model, config.seed)
    make_optimizer({"": Parameter(torch.zeros(1))}, config.train)
    if config.train.tracker:
        require_tracker(config.train.tracker)
    return config


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
        own = config if name == config.method else config_of(name, config)
        require(model, method.needs_of(own), f"method {method.name}")


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

    Before it what training made of the judge (``srum.judging.drift``), beside it ``own.json`` of one's own prompts,
    where some are held out. Without arms and prompts the report alone; the summary is then empty.
    """
    judge_again(run)
    results = evaluate_arms(run, run.config.rounds, run.folder / "eval") if run.config.eval.count else {}
    held_out = Processes.here().once(lambda: own_prompts(run.pinned))
    outcome = judge_own(run, held_out) if held_out else {}
    summary = summarize(results)

    def publish() -> None:
        if summary:
            write_json(run.folder / "summary.json", summary)
            console.print(summary_table(summary))
        if outcome:
            values = own.summary(judge_of(run.config.judge.frozen()), outcome)
            write_json(run.folder / "own.json", values)
            console.print(own.table(values))
        if not (summary or outcome):
            console.print(OFF)
        write_report(run.folder)

    Processes.here().once(publish)
    if run.config.train.tracker and (summary or outcome) and Processes.here().rank == 0:
        show_pairs(run, summary)
    return summary


def show_pairs(run: Run, summary: Mapping[str, Any]) -> None:
    """A tracker's run of the evaluation: the accuracies, and images before and after."""
    subject = subject_of(run, "evaluation", run.arms[run.method.name])
    with tracked(str(run.config.train.tracker), subject) as tracker:
        rounds = run.config.rounds
        if summary:
            tracker.tell("accuracy", {arm: row["accuracy"] for arm, row in summary.items()} | {"step": rounds})
        tracker.show("before and after", pictured_pairs(run.folder, run.method.name), rounds)


def pictured_pairs(folder: Path, arm: str) -> dict[str, Image]:
    """The first held-out prompts, of base and of an arm side by side, by their ids."""
    place = next(place for place in (folder / "eval", folder / own.OWN) if place.exists())
    ids = [path.stem for path in sorted((place / BASE / "images").glob("*.png"))[:PAIRS]]
    files = {name: [place / one / "images" / f"{name}.png" for one in (BASE, arm)] for name in ids}
    return {name: side_by_side([open_image(file) for file in pair]) for name, pair in files.items()}


def evaluate_arms(run: Run, rounds: int, folder: Path) -> dict[str, EvalResult]:
    """The base model and every arm after so many rounds, on the same prompts with the same noise, in ``folder/ARM``."""
    results: dict[str, EvalResult] = {}
    weights = {arm: run.weights(arm, rounds) for arm in (BASE, *run.arms)}
    for arm in weights:
        with run.timed(f"{folder.relative_to(run.folder)} {arm}"), part(EVAL.format(arm)):
            results |= evaluate_arm(run, arm, weights[arm], folder)
    return results
