"""The tiny OpenUni of random weights, as it can be loaded, and a run of it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.parity_openuni import converted
from srum.config import RunConfig, load_config
from srum.loop import run_loop
from srum.models import openuni

GOLDEN = Path(__file__).parent / "golden" / "openuni"
CHECKPOINT = GOLDEN / "checkpoint"  # with the authors' pickle


def tiny(folder: Path) -> Path:
    """The checkpoint as safetensors, in ``folder``."""
    return converted(CHECKPOINT, folder)


def small(model: Path, **more: object) -> RunConfig:
    """A run of a round on two prompts with RecA, SFT and region-NFT."""
    overrides = [f"model={model}", "rounds=1", "prompt_count=2", "candidates_per_prompt=2", "compare=[sft,reca]"]
    overrides += ["rollout.timesteps=4", "rollout.timestep_shift=3.0", "rollout.plan=false", "rollout.batch_size=2"]
    overrides += ["ground.batch_size=2", "judge.reply=none", "judge.batch_size=2", "images.count=4"]
    overrides += ["train.steps=3", "train.batch_size=2", "train.checkpoint_every=1", "train.timestep_shift=1.0"]
    overrides += ["train.eps=1e-6", "train.precision=fp32", "train.samples.count=1", "eval.count=0"]
    return load_config(None, [*overrides, *(f"{name}={value}" for name, value in more.items())])


def whole_run(folder: Path, model: Path) -> None:
    """What each of several processes does."""
    run_loop(small(model), folder)


def queries_trained(model: Path) -> RunConfig:
    """RecA on queries, connector and transformer, with an eps above the rounding of gradients."""
    more = {"train.trainable": "all", "train.samples.count": 0, "train.eps": 1e-4, "train.steps": 2}
    return small(model, method="reca", compare="[]", **more)


def queries_run(folder: Path, model: Path) -> None:
    """What each of several processes does, in float32."""
    openuni.native_bfloat16 = lambda _: False  # type: ignore[assignment]
    run_loop(queries_trained(model), folder)
