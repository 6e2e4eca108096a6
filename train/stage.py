"""The stage that trains: every arm, on the candidates of a round and what was made of them."""

from __future__ import annotations

import shutil
import sys

from srum.processes import Processes
from srum.run import Arm, Run, console, load_model
from srum.run_dir import RunError
from train.data import load_training_records
from train.feed import Source
from train.trainer import DTYPES, train


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
        with run.timed(f"{run.round(k).name}/train/{name}"):
            train_arm(run, k, name, arm, sources.pop(name))
    if processes.rank == 0 and not run.config.train.keep_checkpoints:
        for name in run.arms:
            shutil.rmtree(run.train_dir(name, k) / "checkpoints", ignore_errors=True)


def train_arm(run: Run, k: int, name: str, arm: Arm, source: Source) -> None:
    """train/ARM/: one arm goes on from its own weights."""
    config = arm.config.train
    if Processes.here().rank == 0:
        console.print(f"{run.round(k).name}: {name}, training on {source}")
    model = load_model(run.config, run.weights(name, k), DTYPES[config.memory.frozen], empty=True)
    candidates = load_training_records(run.round(k)) if config.probes or config.samples.count else []
    train(
        model,
        source,
        arm.method.objective(arm.config),
        config,
        run.train_dir(name, k),
        run.seed(k, "train"),
        sys.stderr.isatty(),
        candidates,
        remark=lambda losses: console.print(arm.method.remark(losses), soft_wrap=True),
        reproduces=name == run.method.name or k == 0,  # these weights made the candidates
    )


def require_trainable(device: str) -> None:
    """RunError for layers in several places."""
    if device == "spread":
        raise RunError("device: spread layers can sample and judge, not train; train on one device, or by torchrun")
