"""What drawing gains and loses by approximations: times as fast, the checker's verdict, the judge's score.

    OMP_NUM_THREADS=1 python -m benchmarks.approximate --out runs/approximate [--seeds 0 1 2 3 4] [--count 48]

Held-out prompts of the embedded world, one image each, guided as in the evaluation. The ways take turns on the same
prompts and noise. Seconds are those of the processor, of drawing alone. Right: by the exact checker, in percent; score:
of the layout, by the model itself, times 100. Both are differences from the plain way on the same prompts and seeds,
with crossed bootstrap intervals of 95% over both. What a seed has told stays in ``--out``, and is not drawn again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from srum import models
from srum.config import EvalConfig
from srum.evaluation.accuracy import drawn
from srum.evaluation.compute import passes_of
from srum.evaluation.statistics import Estimate, crossed, difference
from srum.json_files import read_json
from srum.judging.self_judge import SelfJudge
from srum.models.base import UnifiedModel
from srum.records import Prompt
from srum.run_dir import write_json
from srum.shapes.checker import is_right
from srum.shapes.prompts import prompt_set

PLAIN = "plain"
WAYS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {},
    "guidance_every=2": {"guidance_every": 2},
    "guidance_every=3": {"guidance_every": 3},
    "guidance_interval=[0.8, 1]": {"guidance_interval": (0.8, 1.0)},
    "guidance_interval=[0, 0.9]": {"guidance_interval": (0.0, 0.9)},
    "velocity_every=2": {"velocity_every": 2},
    "timesteps=11": {"timesteps": 11},
    "velocity_every=3": {"velocity_every": 3},
    "velocity_every=2, guidance_every=2": {"velocity_every": 2, "guidance_every": 2},
    "timesteps=8": {"timesteps": 8},
}


def config_of(way: str) -> EvalConfig:
    """The evaluation's settings, but for those of the way."""
    return EvalConfig.model_validate(dict(WAYS[way]))


def draw(model: UnifiedModel, prompts: Sequence[Prompt], seed: int, way: str) -> dict[str, Any]:
    """Processor seconds, and of each image whether it is right and what the judge thinks."""
    start = time.process_time()
    images = [made.image for made in drawn(model, {prompt.id: prompt for prompt in prompts}, config_of(way), seed)]
    seconds = time.process_time() - start
    judged = SelfJudge(model).judge(images, [prompt.text for prompt in prompts], [[]] * len(images))
    checked = zip(images, prompts, strict=True)
    right = [is_right(image, prompt.metadata) for image, prompt in checked]
    return {"seconds": seconds, "right": right, "score": [layout.score or 0.0 for _, layout in judged]}


def of_seed(model: UnifiedModel, prompts: Sequence[Prompt], seed: int) -> dict[str, dict[str, Any]]:
    """All ways in turn; of a first image of the plain one, what is done once is not timed."""
    draw(model, prompts[:1], seed, PLAIN)
    return {way: draw(model, prompts, seed, way) for way in WAYS}


def table_of(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> Table:
    """A row for each way; ``found`` of each seed."""
    first = found[0][PLAIN]
    size = f"{len(found)} seeds, {len(first['right'])} prompts"
    table = Table("way", "passes", "times as fast", "right, points", "score", title=f"against the plain way, {size}")
    values = {
        way: {name: [of_seed[way][name] for of_seed in found] for name in ("seconds", "right", "score")} for way in WAYS
    }
    plain = values[PLAIN]
    for way, own in values.items():
        speed = median(a / b for a, b in zip(plain["seconds"], own["seconds"], strict=True))
        cells = (
            [_told(crossed(own[name]).times(100), "") for name in ("right", "score")]
            if way == PLAIN
            else [_told(difference(own[name], plain[name]).times(100), "+") for name in ("right", "score")]
        )
        table.add_row(way, str(passes_of(config_of(way))), f"{speed:.2f}", *cells)
    return table


def _told(estimate: Estimate, sign: str) -> str:
    value, low, high = (f"{number:{sign}.1f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value}, {low} to {high}"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what the seeds have told")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--count", type=int, default=48, help="prompts")
    parser.add_argument("--model", default="srum-tiny")
    args = parser.parse_args(argv)
    model, prompts, found = models.load(args.model, device="cpu"), prompt_set("held_out", args.count), []
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        path = args.out / f"{args.count}-{seed}.json"
        if not path.exists():
            write_json(path, of_seed(model, prompts, seed))
            print(f"seed {seed} is drawn", flush=True)
        found.append(read_json(path))
    Console().print(table_of(found))


if __name__ == "__main__":
    main()
