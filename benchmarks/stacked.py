"""RecA, SRUM and RvR one after the other on the embedded world, at equal compute.

    python -m benchmarks.stacked --seeds 0 1 2 3 4 --out runs/stacked [--arms reca_srum_rvr ...] [--set train.steps=60]

Every arm is three trainings of the same number of steps, each from the weights of the one before it (``srum fork`` is
how they share the first round): a method three times over, or the methods in turn. A training that needs candidates
draws and judges its own; ``training``, passes of the network in thousands, counts these drawings and three passes of
every sample that is learned, and a method that needs none has fewer. Each arm's weights then draw the evaluation's
prompts once, and again where the model's own judge finds fault (``srum refine``). Percent right by the exact checker,
95%, bootstrap crossed over seeds and prompts; differences to the base model, drawn likewise, in points; ``passes``: of
an image, on the way. What is finished is kept in ``OUT/seed-K/stacked/ARM.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks.reca import BASE, PARTS, seed_by_seed, trained
from benchmarks.refine import estimate_cell
from srum.config import changed
from srum.evaluation.accuracy import CheckedImage, evaluate
from srum.evaluation.compute import passes_of
from srum.evaluation.statistics import crossed, difference
from srum.run import Run, load_model
from srum.run_dir import read_records, write_json
from srum.stages.rollout import choose_prompts
from srum.train.refining import drawn_again

ARMS: dict[str, Sequence[str]] = {
    BASE: (),
    "sft": ("sft", "sft", "sft"),
    "reca": ("reca", "reca", "reca"),
    "srum": ("srum", "srum", "srum"),
    "rvr": ("rvr", "rvr", "rvr"),
    "reca_srum": ("reca", "srum", "srum"),
    "srum_rvr": ("srum", "srum", "rvr"),
    "reca_srum_rvr": ("reca", "srum", "rvr"),
}


@dataclass(frozen=True)
class Outcome:
    """An arm on a seed, per prompt: right when drawn once, right in the end, denoising passes; passes of training."""

    once: list[bool]
    again: list[bool]
    passes: list[float]
    training: float


def measured(run: Run, arm: str) -> Outcome:
    """The arm's trainings, and what the last weights draw."""
    parts = ARMS[arm]
    weights = trained(run, parts).newest(1) if parts else run.config.model
    config, folder = run.config, run.folder / "stacked" / arm
    model, prompts = load_model(config, weights), choose_prompts(config.eval.prompts, config.eval.count, seed=0)
    evaluate(model, prompts, config.eval, folder, config.seed, drawn_again(model, config, config.seed))
    checked = read_records(folder / "verdicts.jsonl", CheckedImage)
    first, later = passes_of(config.eval), passes_of(config.refine)
    return Outcome(
        once=[one.shots[0].correct for one in checked],
        again=[one.correct for one in checked],
        passes=[first + later * (len(one.shots) - 1) for one in checked],
        training=sum(passes_of_training(run, part) for part in parts),
    )


def passes_of_training(run: Run, part: str) -> float:
    """Of one of three trainings: its candidates, and three of each sample, one forward and twice that backward."""
    config = changed(run.config, PARTS[part])
    learned = 3.0 * max(1, config.train.steps // 3) * config.train.batch_size
    draws = "rollout" in Run(run.folder, config).stages
    drawn = config.prompt_count * config.candidates_per_prompt * passes_of(config.rollout)
    return learned + draws * drawn


def measure(
    folder: Path, seeds: Sequence[int], arms: Sequence[str], overrides: Sequence[str]
) -> dict[str, list[Outcome]]:
    """The outcomes seed by seed; what is finished is read."""
    return seed_by_seed(folder, seeds, arms, overrides, "stacked", measured, Outcome, table)


def table(rows: Mapping[str, Sequence[Outcome]]) -> Table:
    """A line per arm."""
    columns = ("once, %", "- base", "again, %", "- base", "broken", "passes", "training", "seeds")
    shown = Table("arm", *columns)
    values = {
        arm: [np.array([getattr(one, name) for one in own], float) for name in ("once", "again")]
        for arm, own in rows.items()
    }
    for arm, (once, again) in values.items():
        cells = []
        for ours, theirs in zip((once, again), values[BASE], strict=True):
            gain = difference(ours, theirs[: len(ours)])
            cells += [estimate_cell(crossed(ours)), estimate_cell(gain, "+")]
        passes, training = (float(np.mean([getattr(one, n) for one in rows[arm]])) for n in ("passes", "training"))
        broken = 100 * float((once > again).mean())
        shown.add_row(arm, *cells, f"{broken:.1f}", f"{passes:.0f}", f"{training / 1000:.1f}", str(len(rows[arm])))
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/stacked"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    options = parser.parse_args(arguments)
    arms = list(dict.fromkeys([BASE, *options.arms]))
    rows = measure(options.out, options.seeds, arms, options.overrides)
    write_json(options.out / "stacked.json", {arm: [vars(one) for one in own] for arm, own in rows.items()})


if __name__ == "__main__":
    main()
