"""RecA and RvR on a small BAGEL of random weights, by one process or two, for ``test_recipes``."""

from __future__ import annotations

from pathlib import Path

from srum.config import RefineConfig, RunConfig, load_config
from srum.loop import run_loop
from srum.run import Run, newest_weights
from srum.train.refining import refine_run

GOLDEN = Path(__file__).parents[1] / "golden" / "bagel" / "checkpoint"


def config_of(method: str) -> RunConfig:
    """A round of 6 candidates of 64 px, or of 6 pictures, two steps, no evaluation; scores by one forward pass."""
    drawing = [f"{part}.{name}" for part in ("rollout", "refine") for name in ("size=[64,64]", "timesteps=3")]
    batches = [f"{part}.batch_size=2" for part in ("rollout", "ground", "judge", "images", "refine", "train")]
    judging = ["judge.reply=none", "pairs.select=relative", "pairs.min_gap=1e-6", "rollout.plan=false"]
    small = ["compare=[]", "rounds=1", "prompt_count=3", "candidates_per_prompt=2", "images.count=6", "eval.count=0"]
    names = [f"model={GOLDEN}", f"method={method}", "train.steps=2", "train.lr=1e-3", "train.precision=fp32"]
    own = ["seen_size=42"] if method == "reca" else []
    return load_config(None, [*names, *small, *drawing, *batches, *judging, *own])


def whole_runs(folder: Path) -> None:
    """Both methods, and the round of RvR's run refined by its weights."""
    for method in ("reca", "rvr"):
        run_loop(config_of(method), folder / method)
    run = Run(folder / "rvr", config_of("rvr"))
    again = RefineConfig(size=(64, 64), timesteps=3, rounds=2, stop=None, image_guidance=2.0, batch_size=2)
    refine_run(run, run.round(0), newest_weights(run), run.config.model_copy(update={"refine": again}))
