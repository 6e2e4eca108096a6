"""Small runs of the tiny Show-o of random weights under tests/golden."""

from __future__ import annotations

from pathlib import Path

from srum.config import RunConfig, load_config
from srum.loop import run_loop

CHECKPOINTS = Path(__file__).parent / "golden" / "showo" / "checkpoint"
VQ, CLIP = CHECKPOINTS / "show-o", CHECKPOINTS / "show-o-w-clip-vit"
RECA = ("method=reca", "compare=[]", "images.count=4", "rollout.timesteps=2")


def small(model: Path, *more: str) -> RunConfig:
    """A round on two prompts, with every arm: the whole loop but for the exact checker."""
    overrides = [f"model={model}", "rounds=1", "prompt_count=2", "candidates_per_prompt=2", "compare=[sft]"]
    overrides += ["rollout.timesteps=5", "rollout.timestep_shift=1", "rollout.guidance=3", "rollout.plan=false"]
    overrides += ["rollout.batch_size=2", "ground.batch_size=2", "judge.reply=none", "judge.batch_size=2"]
    overrides += ["train.trainable=all", "train.steps=3", "train.batch_size=2", "train.checkpoint_every=1"]
    overrides += ["train.eps=1e-6", "train.precision=fp32", "train.timestep_shift=1"]
    return load_config(None, [*overrides, "eval.count=0", "eval.timestep_shift=1", *more])


def whole_run(folder: Path, model: Path, *more: str) -> None:
    """What each of several processes does."""
    run_loop(small(model, *more), folder)
