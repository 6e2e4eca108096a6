"""The stage that trains: every arm, on the candidates of a round and what was made of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from srum.config import RunConfig, TrainConfig
from srum.processes import Processes
from srum.run import MAIN, Run, Stage, console, load_model
from srum.run_dir import RunError
from srum.seeding import seed_for
from train.data import TrainingRecord, load_replies, load_training_records
from train.trainer import DTYPES, train


def arms(config: RunConfig) -> dict[str, TrainConfig]:
    """What is trained in each round, on the same candidates and with the same number of steps.

    ``srum_paper`` needs signed maps, and is left out of a run whose maps are not; so is an arm that would be trained as
    ``srum`` is.
    """
    if not config.compare:
        return {MAIN: config.train}
    paper: dict[str, Any] = {"objective": "srum", "constraint_weight": 0.5, "use_layout": True, "credit": "region"}
    found = {"sft": config.train.model_copy(update={"objective": "sft"})}
    if config.reward.mapping == "signed":
        found["srum_paper"] = config.train.model_copy(update=paper)
    return {arm: own for arm, own in found.items() if own != config.train} | {MAIN: config.train}


def train_stage(run: Run, k: int) -> None:
    """train/ARM/: every arm goes on from its own weights, on the same candidates, with the same noise.

    An arm whose ``model/`` is there is left as it is, whatever its candidates are now.
    """
    require_trainable(run.config.device)
    processes = Processes.here()
    trained = processes.once(lambda: [arm for arm in arms(run.config) if (run.train_dir(arm, k) / "model").exists()])
    if processes.rank == 0:
        for arm in trained:
            console.print(f"already trained: {run.train_dir(arm, k)}", soft_wrap=True)
    missing = {arm: config for arm, config in arms(run.config).items() if arm not in trained}
    if not missing:
        return
    records, unrewarded = load_training_records(run.round(k))
    if processes.rank == 0:
        console.print(f"{run.round(k).name}: training on {len(records)} candidates, {unrewarded} have no reward map")
    if not records:
        skipped = processes.once(lambda: json.loads((run.round(k) / "counts.json").read_text())["skipped"])
        raise RunError(f"nothing to train on: no candidate of {run.round(k)} has a reward map, because of {skipped}")
    for arm, config in missing.items():
        train_arm(run, k, arm, config, records)


def train_arm(run: Run, k: int, arm: str, config: TrainConfig, records: Sequence[TrainingRecord]) -> None:
    """train/ARM/: one arm goes on from its own weights."""
    model = load_model(run.config, run.weights(arm, k), DTYPES[config.memory.frozen], empty=True)
    replies = load_replies(run.round(k), run.config.judge.instructions) if config.replies.weight else []
    seed, progress = seed_for(run.config.seed, k, "train"), sys.stderr.isatty()
    made_them = arm == MAIN or k == 0  # these weights made the candidates
    train(model, records, config, run.train_dir(arm, k), seed, progress, replies, reproduces=made_them)


def require_trainable(device: str) -> None:
    """RunError for layers in several places."""
    if device == "spread":
        raise RunError("device: spread layers can sample and judge, not train; train on one device, or by torchrun")


TRAIN = Stage("train", (), train_stage)
