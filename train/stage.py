"""The stage that trains: every arm, on the candidates of a round and what was made of them."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from itertools import islice

from PIL.Image import Image

from srum.processes import Processes
from srum.progress import part
from srum.run import Arm, Run, console, load_model
from srum.run_dir import RunError
from srum.train.alarms import alarms
from srum.train.data import load_training_records
from srum.train.feed import Source
from srum.train.metrics import keep_rows
from srum.train.tracking import Subject, Tracker, tracked
from srum.train.trainer import DTYPES, train
from srum.views.plots import as_image
from srum.views.reading import read_round

SHOWN = 6  # reward maps of a round that a tracker shows


def train_stage(run: Run, k: int) -> None:
    """train/ARM/: every arm goes on from its own weights, on the same candidates, with the same noise.

    An arm whose ``model/`` is there is left as it is, whatever its candidates are now. Every arm's examples are asked
    for before the first trains. Checkpoints of a trained arm go unless ``train.keep_checkpoints`` wants them.
    """
    require_trainable(run.config.device)
    processes = Processes.here()
    trained = processes.once(lambda: [name for name in run.arms if (run.train_dir(name, k) / "model").exists()])
    if processes.rank == 0:
        for name in trained:
            console.print(f"already trained: {run.train_dir(name, k)}", soft_wrap=True)
    missing = {name: arm for name, arm in run.arms.items() if name not in trained}
    sources = {name: arm.method.examples(run, k, arm.config) for name, arm in missing.items()}
    for name, arm in missing.items():
        with run.timed(f"{run.round(k).name}/train/{name}"), part(run.named(k, f"train {name}")):
            train_arm(run, k, name, arm, sources.pop(name))
    if processes.rank == 0 and not run.config.train.keep_checkpoints:
        for name in run.arms:
            shutil.rmtree(run.train_dir(name, k) / "checkpoints", ignore_errors=True)


def train_arm(run: Run, k: int, name: str, arm: Arm, source: Source) -> None:
    """train/ARM/: one arm goes on from its own weights."""
    config = arm.config.train
    if Processes.here().rank == 0:
        console.print(f"{run.round(k).name}: {name}, training on {source}", soft_wrap=True, highlight=False)
    with ExitStack() as stack:
        tracker = None
        if config.tracker and Processes.here().rank == 0:
            tracker = stack.enter_context(tracked(config.tracker, subject_of(run, f"{run.round(k).name}-{name}", arm)))
            tracker.show("reward maps", reward_maps(run, k), 0)
        _train(run, k, name, arm, source, tracker)


def _train(run: Run, k: int, name: str, arm: Arm, source: Source, tracker: Tracker | None) -> None:
    config = arm.config.train
    model = load_model(run.config, run.weights(name, k), DTYPES[config.memory.frozen], empty=True)
    candidates = load_training_records(run.round(k)) if config.probes or config.samples.count else []
    result = train(
        model,
        source,
        arm.method.objective(arm.config),
        config,
        run.train_dir(name, k),
        run.seed(k, "train"),
        candidates=candidates,
        remark=lambda losses: console.print(arm.method.remark(losses), soft_wrap=True),
        reproduces=name == run.method.name or k == 0,  # these weights made the candidates
        tracker=tracker,
    )
    if Processes.here().rank == 0:
        if result.stopped:
            console.print(f"stopped after {result.steps} of {config.steps} steps: {result.stopped}", soft_wrap=True)
        for alarm in alarms(keep_rows(run.train_dir(name, k) / "metrics.jsonl", result.steps)):
            console.print(f"{name}: {alarm}", soft_wrap=True)


def subject_of(run: Run, name: str, arm: Arm) -> Subject:
    """What a tracker shows of a training: all of a run are in one group."""
    return Subject(run.folder.resolve().name, name, run.folder / "tracker", arm.config.model_dump(mode="json"))


def reward_maps(run: Run, k: int) -> dict[str, Image]:
    """The first candidates of the round that have a reward map, with regions, map, and what the judge says."""
    if not (run.round(k) / "candidates.jsonl").exists():
        return {}
    views = islice((view for view in read_round(run.round(k)) if view.reward), SHOWN)
    return {view.id: as_image(view.figure(grid=True)) for view in views}


def require_trainable(device: str) -> None:
    """RunError for layers in several places."""
    if device == "spread":
        raise RunError("device: spread layers can sample and judge, not train; train on one device, or by torchrun")
