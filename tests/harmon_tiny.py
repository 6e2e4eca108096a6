"""Runs of a tiny Harmon of random weights, the checkpoint of tests/golden/harmon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from srum.config import RunConfig, load_config
from srum.loop import run_loop

CHECKPOINT = Path(__file__).parent / "golden" / "harmon" / "checkpoint"


def small(**more: object) -> RunConfig:
    """A run of a round on two prompts: the whole loop but for the exact checker."""
    fields = {"size": "[24, 24]", "timesteps": 4, "timestep_shift": 1.0, "decoder_steps": 5, "plan": "false"}
    overrides = [f"rollout.{name}={value}" for name, value in fields.items()]
    overrides += [f"model={CHECKPOINT}", "rounds=1", "prompt_count=2", "candidates_per_prompt=2", "images.count=3"]
    overrides += ["rollout.batch_size=2", "judge.reply=none", "judge.batch_size=2", "compare=[]", "eval.count=0"]
    overrides += ["train.steps=3", "train.batch_size=2", "train.checkpoint_every=1", "train.precision=fp32"]
    overrides += ["train.eps=1e-6", "train.timestep_shift=1.0", "eval.timestep_shift=1.0"]
    return load_config(None, [*overrides, *(f"{name}={value}" for name, value in more.items())])


def whole_run(folder: Path, more: Mapping[str, object]) -> None:
    """What each of several processes does."""
    run_loop(small(**more), folder)
