"""What the arms of a run cost, and how accurate they are at equal compute: counted from its records and its config.

An arm is charged for what it needs by itself: the stages of its own method and its own training. A forward pass is one
of the network over one image, or over one question about one: of drawing, every denoising step, twice where it is
guided; of judging, every question about a region or a layout; of training, every example of a step, once more where it
is compared with old weights; and a backward pass counts as two. Floating-point operations are those of drawing and
training, 2 for every weight of the generation expert and token of an image: attention, texts, the autoencoder and
judging are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from srum import models
from srum.config import ImageConfig
from srum.errors import ModelError
from srum.evaluation.accuracy import CheckedImage
from srum.evaluation.statistics import wilson
from srum.json_files import read_json
from srum.models.base import Sampling, branch_counts
from srum.records import Candidate, Judgement
from srum.run import Arm, Run
from srum.run_dir import read_records
from srum.stages import JUDGE, ROLLOUT
from srum.views.reading import RunView

BACKWARD = 2  # forward passes that a backward pass counts as


@dataclass(frozen=True)
class Compute:
    """What something took; ``flops`` None where the model cannot be asked."""

    images: int = 0
    passes: int = 0
    steps: int = 0
    seconds: float = 0.0
    flops: float | None = 0.0

    def __add__(self, other: Compute) -> Compute:
        flops = None if self.flops is None or other.flops is None else self.flops + other.flops
        seconds = self.seconds + other.seconds
        return Compute(self.images + other.images, self.passes + other.passes, self.steps + other.steps, seconds, flops)


@dataclass(frozen=True)
class Point:
    """An arm after so many rounds: what it took, and the verdicts on its images."""

    rounds: int
    compute: Compute
    verdicts: list[CheckedImage]


def passes_of(config: ImageConfig) -> int:
    """Forward passes of an image that is drawn so: one a step, where guidance is active two, or three with images."""
    return sum(branch_counts(Sampling(**config.sampling())))


def spent(run: Run, arm: str, rounds: int) -> Compute:
    """What ``arm`` took by itself in so many rounds."""
    if arm not in run.arms:
        return Compute()  # the model that entered
    return sum((_of_round(run, run.arms[arm], k) for k in range(rounds)), Compute())


def _of_round(run: Run, arm: Arm, k: int) -> Compute:
    config, folder, stages = arm.config, run.round(k), [stage.name for stage in arm.method.stages_of(arm.config)]
    candidates = len(read_records(folder / "candidates.jsonl", Candidate)) if ROLLOUT.name in stages else 0
    images = candidates + arm.method.images_drawn(config)
    judged = read_records(folder / "judgements.jsonl", Judgement) if JUDGE.name in stages else []
    questions = sum(len(one.regions) + 1 for one in judged)
    examples = config.train.steps * config.train.batch_size
    compared = arm.method.objective(config).old_decay is not None
    of_training = examples * (1 + BACKWARD + compared)
    per_pass = _flops_of_a_pass(run)
    drawing = images * passes_of(config.rollout)
    return Compute(
        images=images,
        passes=drawing + questions + of_training,
        steps=config.train.steps,
        seconds=_seconds(run, k, [*stages, f"train/{arm.method.name}"]),
        flops=None if per_pass is None else per_pass * (drawing + of_training),
    )


def _flops_of_a_pass(run: Run) -> float | None:
    """Of an image at the size of the rollout; None where its model is not here."""
    try:
        model = models.load(run.config.model, "cpu", empty=True)
        tokens = prod(model.latent_grid(run.config.rollout.size))
    except ModelError:
        return None
    return 2.0 * tokens * sum(parameter.numel() for _, parameter in model.generation_parameters())


def _seconds(run: Run, k: int, parts: Sequence[str]) -> float:
    path = run.folder / "timings.json"
    kept = read_json(path) if path.exists() else {}
    return sum(float(kept.get(f"{run.round(k).name}/{part}", 0.0)) for part in parts)


def points(view: RunView, arm: str) -> list[Point]:
    """The evaluations of an arm, after fewer rounds first."""
    run = Run(view.folder, view.config)
    evaluated = {k + 1: view.verdicts(k) for k in view.rounds} | {view.config.rounds: view.verdicts()}
    return [
        Point(rounds, spent(run, arm, rounds), verdicts[arm])
        for rounds, verdicts in sorted(evaluated.items())
        if verdicts.get(arm)
    ]


def compute_tables(views: Sequence[RunView]) -> Iterator[Table]:
    """What the arms of some runs took, and how accurate each is with no more passes than all of them had."""
    evaluated = {(view.folder, arm): points(view, arm) for view in views for arm in view.verdicts()}
    last = {key: found[-1] for key, found in evaluated.items() if found}
    if not last:
        return
    named = len(views) > 1
    table = Table("arm", "rounds", "images", "forward passes", "steps", "seconds", "FLOPs", title="compute of each arm")
    table.caption = "a backward pass counts as two; FLOPs: of drawing and training, without attention and texts"
    for (folder, arm), point in last.items():
        took = point.compute
        flops = "unknown" if took.flops is None else f"{took.flops:.2e}"
        numbers = f"{took.images:,}", f"{took.passes:,}", f"{took.steps:,}", f"{took.seconds:,.0f}", flops
        table.add_row(_name(folder, arm, named), str(point.rounds), *numbers)
    yield table
    trained = [point.compute.passes for point in last.values() if point.compute.passes]
    if len(trained) > 1:
        yield _at_equal_compute(evaluated, min(trained), named)


def _at_equal_compute(evaluated: dict[tuple[Path, str], list[Point]], budget: int, named: bool) -> Table:
    table = Table("arm", "rounds", "forward passes", "accuracy, %", "95% interval", title=f"within {budget:,} passes")
    table.caption = "the last evaluation within what all arms had; srum eval RUN --round K adds one"
    for (folder, arm), found in evaluated.items():
        within = [point for point in found if point.compute.passes <= budget]
        if not within:
            table.add_row(_name(folder, arm, named), "", "", "not evaluated within them", "")
            continue
        best = wilson([verdict.correct for verdict in within[-1].verdicts])
        interval = f"{best.low:.1f} to {best.high:.1f}"
        passes = f"{within[-1].compute.passes:,}"
        table.add_row(_name(folder, arm, named), str(within[-1].rounds), passes, f"{best.value:.1f}", interval)
    return table


def _name(folder: Path, arm: str, named: bool) -> str:
    return escape(f"{folder} {arm}" if named else arm)
