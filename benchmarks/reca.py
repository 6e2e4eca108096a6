"""RecA on the embedded world: what every arm of docs/specs/reca.md, 6, draws and reconstructs.

    python -m benchmarks.reca --seeds 0 1 2 3 4 --out runs/reca [--arms reca sft ...] [--set train.steps=60]

A seed is a round of ``srum-tiny``'s candidates, judged by itself. Each arm is trained for the same steps: on scenes
that are rendered (information from outside), on the round's own candidates (none), or in two trainings one after the
other, each of half the steps. Measured by the exact checker: the share of development prompts drawn right, and of as
many rendered scenes, which no training has seen, that hold the same things in the same cells once reconstructed.
Percent, 95%, bootstrap crossed over seeds and prompts; differences to the base in points. ``loss``: of the first and
the last fifth of the steps. What is finished is kept in ``OUT/seed-K/arms/ARM.json``, so that the same command goes on,
and with fewer arms it prints those.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import numpy as np
from rich.table import Table

from srum.config import changed, load_config
from srum.evaluation.accuracy import evaluate
from srum.evaluation.statistics import crossed, difference
from srum.fork import fork_run
from srum.loop import perform
from srum.run import Run, console, load_model
from srum.run_dir import claim_run, read_records, write_json
from srum.stages.rollout import choose_prompts
from srum.train.methods.reca import OF_THE_ROUND
from srum.train.reconstructing import Reconstruction, reconstruct_images

T = TypeVar("T")
BASE = "base"
SEED_STRIDE = 100  # between the trainings of an arm
SMALL = (
    "method=reca",
    "mix=[1,1,0]",
    "compare=[]",
    "rounds=1",
    "prompt_count=48",
    "candidates_per_prompt=4",
    "rollout.plan=true",
    "images.count=192",
    "train.steps=40",
    "train.batch_size=32",
    "train.lr=2e-5",
    "train.warmup_steps=4",
    "train.timestep_shift=1.0",
    "eval.prompts=development",
    "eval.count=48",
)
ALONE = "mix=[1,0,0]"
DRAWN = ("train.lr=1e-4", "train.timestep_shift=4.0")  # of what learns from images of its own
PARTS: dict[str, Sequence[str]] = {  # a training -> what it changes in the config of a seed's run
    "reca": (ALONE,),
    "own": (ALONE, "images.source=candidates"),
    "own_good": (ALONE, "images.source=good"),
    "half_t2i": (),
    "sft": ("method=sft",),
    "srum": ("method=srum", *DRAWN),
    "rvr": ("method=rvr", *DRAWN),
    "clean_latent": (ALONE, "condition=clean"),
    "seen_32": (ALONE, "seen_size=32"),
    "blurred": (ALONE, "images.blur=8"),
    "one_template": (ALONE, "template_count=1"),
    "no_dropout": (ALONE, "train.text_dropout=0.0"),
}
ARMS: dict[str, Sequence[str]] = {name: (name,) for name in PARTS} | {  # the trainings, one after the other
    "sft_reca": ("sft", "reca"),
    "reca_sft": ("reca", "sft"),
    "reca_rvr": ("reca", "rvr"),
    "srum_rvr": ("srum", "rvr"),
}


@dataclass(frozen=True)
class Outcome:
    """An arm on a seed: prompts drawn right, scenes reconstructed, the losses of its last training."""

    drawn: list[bool]
    reconstructed: list[bool]
    loss: list[float]


def seed_run(folder: Path, seed: int, overrides: Sequence[str]) -> Run:
    """The run of a seed. Raises RunError where the folder holds one with other values."""
    config = load_config(None, [*SMALL, *overrides, f"seed={seed}"])
    claim_run(folder, config, resume=True)
    return Run(folder, config)


def trained(run: Run, parts: Sequence[str]) -> Run:
    """The last of these trainings, which share the run's steps evenly, in folders beside the seed's round.

    The first one shares the candidates of the round, which is made where it is not there; a later one draws its own, if
    it needs any. Arms that begin with the same trainings share these.
    """
    steps = max(1, run.config.train.steps // len(parts))
    last, weights = run, run.config.model
    for number, part in enumerate(parts):
        seed = run.config.seed + SEED_STRIDE * number  # prompts, scenes and noise of its own
        config = changed(run.config, [*PARTS[part], f"model={weights}", f"train.steps={steps}", f"seed={seed}"])
        folder = run.folder / "trained" / f"{'-'.join(parts[: number + 1])}-{steps}"
        if number == 0 and not folder.exists():
            for stage in OF_THE_ROUND:
                perform(run, stage.name, 0)
            folder.parent.mkdir(exist_ok=True)
            fork_run(run.folder, folder, "images", config, 0)
        claim_run(folder, config, resume=True)
        last = Run(folder, config)
        for name in last.stages:
            perform(last, name, 0)
        weights = last.newest(1)
    return last


def outcome(run: Run, weights: str, place: Path, loss: list[float]) -> Outcome:
    """What the weights draw and reconstruct."""
    prompts = choose_prompts(run.config.eval.prompts, run.config.eval.count, seed=0)
    drawn = evaluate(load_model(run.config, weights), prompts, run.config.eval, place / "eval", run.config.seed)
    # other scenes than any round's: another seed
    count = f"images.count={run.config.eval.count}"
    wanted = [f"seed={run.config.seed + 10_000}", "images.source=rendered", count, "method=reca"]
    reconstruct_images(changed(run.config, wanted), place / "reconstructed", None, weights)
    made = read_records(place / "reconstructed" / "reconstructed.jsonl", Reconstruction)
    return Outcome(drawn.correct, [bool(one.same) for one in made], loss)


def losses_of(run: Run) -> list[float]:
    """Means over the first and the last fifth of the steps."""
    lines = (run.train_dir(run.method.name, 0) / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line)["loss"] for line in lines]
    fifth = max(1, len(values) // 5)
    return [fmean(values[:fifth]), fmean(values[-fifth:])]


def measured(run: Run, arm: str) -> Outcome:
    """The base model, or an arm after its training."""
    place = run.folder / "measured" / arm
    if arm == BASE:
        return outcome(run, run.config.model, place, [])
    last = trained(run, ARMS[arm])
    return outcome(run, last.newest(1), place, losses_of(last))


def measure(
    folder: Path, seeds: Sequence[int], arms: Sequence[str], overrides: Sequence[str]
) -> dict[str, list[Outcome]]:
    """The outcomes seed by seed; what is finished is read."""
    return seed_by_seed(folder, seeds, arms, overrides, "arms", measured, Outcome, table)


def seed_by_seed(
    folder: Path,
    seeds: Sequence[int],
    arms: Sequence[str],
    overrides: Sequence[str],
    place: str,
    measured: Callable[[Run, str], T],
    kind: Callable[..., T],
    table: Callable[[Mapping[str, Sequence[T]]], Table],
) -> dict[str, list[T]]:
    """What is ``measured`` of every arm, a dataclass of its ``kind``, kept in ``place`` of each seed; a table of what
    there is after each seed."""
    rows: dict[str, list[T]] = {}
    for seed in seeds:
        run = seed_run(folder / f"seed-{seed}", seed, overrides)
        for arm in arms:
            path = run.folder / place / f"{arm}.json"
            if not path.exists():
                write_json(path, vars(measured(run, arm)))
            rows.setdefault(arm, []).append(kind(**json.loads(path.read_text())))
        console.print(table(rows))
    return rows


def table(rows: Mapping[str, Sequence[Outcome]]) -> Table:
    """A line per arm."""
    shown = Table("arm", "right, %", "against base", "reconstructed, %", "against base", "loss", "seeds")
    base = rows[BASE]
    for arm, outcomes in rows.items():
        cells = []
        for name in ("drawn", "reconstructed"):
            ours, theirs = (np.array([getattr(o, name) for o in these], float) for these in (outcomes, base))
            share, gain = crossed(ours).times(100), difference(ours, theirs[: len(ours)]).times(100)
            cells += [f"{share.value:.1f}", f"{gain.value:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})"]
        loss = "" if arm == BASE else " to ".join(f"{fmean(o.loss[i] for o in outcomes):.3f}" for i in (0, 1))
        shown.add_row(arm, *cells, loss, str(len(outcomes)))
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/reca"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    options = parser.parse_args(arguments)
    rows = measure(options.out, options.seeds, list(dict.fromkeys([BASE, *options.arms])), options.overrides)
    write_json(options.out / "reca.json", {arm: [vars(one) for one in own] for arm, own in rows.items()})


if __name__ == "__main__":
    main()
