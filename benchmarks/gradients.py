"""What judged candidates teach, without drawing an image: how much of region-NFT's gradient is signal, by timestep, and
how far trained weights have gone in directions that say nothing.

    python -m benchmarks.gradients runs/a runs/b ... [--trained runs/c] [--count 2880]

The candidates are those of round 0 of the runs, the advantage of each (``train.advantages``) evenly on its image.
Without ``--trained``, at the weights that entered: gradients of A |v - u|^2 in batches,

    signal   the mean inner product of the gradients of two batches
    square   the mean square of one batch's; signal / square is the share that is no noise

With it, of the newest weights of that run, whose own round should not be among the runs:

    push      the mean of A change: below 0, what was judged better is likelier than before, also of prompts not met
    distance  the mean of d^2; push^2 / distance is what no rescaling of the step changes (docs/lab-notes.md, 69)
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from srum.config import load_config
from srum.models.base import TrainingForward
from srum.run import Run, console, load_model
from srum.run_dir import CONFIG
from srum.train.data import candidate_mix, load_training_records
from srum.train.examples import Example, generator_for
from srum.train.methods.region_nft import advantages
from srum.train.packs import Sample, make_pack, opened
from srum.train.weights import TrainableModel, trainable_parameters

TIMESTEPS = (0.985, 0.95, 0.9, 0.8, 0.65, 0.4)
BATCH = 96


def judged(folders: Sequence[Path], count: int) -> list[Example]:
    """At most ``count`` candidates of the runs' first rounds, mixed, with their advantages."""
    examples = list[Example]()
    for folder in folders:
        config = load_config(folder / CONFIG)
        records = load_training_records(folder / "round-000")
        credits = [
            record.reward_map.new_full(record.reward_map.shape, advantage)
            for record, advantage in zip(records, advantages(records, config), strict=True)
        ]
        (part, *_) = candidate_mix(records, credits, config.train, config.seed).parts
        examples += part.examples
    random.Random(0).shuffle(examples)
    return examples[:count]


def batches(
    models: Sequence[TrainableModel], examples: Sequence[Example], t: float
) -> Iterator[tuple[list[TrainingForward], Tensor]]:
    """What each model predicts of a batch at timestep t, with the same noise, and the credit of the tokens."""
    model = models[0]
    for start in range(0, len(examples) - len(examples) % BATCH or 1, BATCH):
        samples = list[Sample]()
        for place, example in enumerate(examples[start : start + BATCH], start):
            ready = opened(model, example)
            (latent,) = (s.latent for s in ready.segments if s.latent is not None)
            generator = generator_for(place, example.id, str(t))
            samples.append(Sample(ready, ready.segments, [model.corrupt(latent, generator, 1.0, t)]))
        pack = make_pack(model, samples)
        with torch.autocast(model.device.type, torch.bfloat16):
            predicted = [each.forward(pack.packed) for each in models]
        yield predicted, pack.image_credit(predicted[0])


def signal(model: TrainableModel, examples: Sequence[Example], t: float) -> tuple[float, float]:
    """(signal, square) of the generation expert's gradients."""
    with trainable_parameters(model, "generation") as chosen:
        named = dict(model.named_parameters())
        weights = [named[name] for name in chosen]
        total, squares, count = [torch.zeros_like(w, dtype=torch.float32) for w in weights], 0.0, 0
        for (new,), credit in batches([model], examples, t):
            gradients = torch.autograd.grad((credit * new.image_error).mean(), weights)
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += gradient
                squares += gradient.float().square().sum().item()
            count += 1
    of_sum = sum(sum_.square().sum().item() for sum_ in total)
    return (of_sum - squares) / (count * (count - 1)), squares / count


@torch.no_grad()
def moved(old: TrainableModel, new: TrainableModel, examples: Sequence[Example], t: float) -> tuple[float, float]:
    """(push, distance) from the old weights to the new."""
    pushes, distances = list[Tensor](), list[Tensor]()
    for (before, after), credit in batches([old, new], examples, t):
        change, drift = after.distance(before)
        pushes.append(credit * change)
        distances.append(drift)
    return torch.cat(pushes).mean().item(), torch.cat(distances).mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one or the other, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--trained", type=Path)
    parser.add_argument("--count", type=int, default=2880)
    options = parser.parse_args(argv)
    examples = judged(options.runs, options.count)
    if options.trained is None and len(examples) < 2 * BATCH:
        parser.error(f"--count, runs: a signal takes two batches of {BATCH} candidates, and these are {len(examples)}")
    config = load_config(options.runs[0] / CONFIG)
    model = load_model(config, config.model)
    names = ("signal", "square", "share, %") if options.trained is None else ("push", "distance", "push^2 / distance")
    table = Table("t", *names, title=f"{len(examples)} candidates")
    if options.trained is not None:
        run = Run(options.trained, load_config(options.trained / CONFIG))
        trained = load_model(run.config, run.newest(run.config.rounds))
    for t in TIMESTEPS:
        if options.trained is None:
            first, second = signal(model, examples, t)
            last = 100 * first / second
        else:
            first, second = moved(model, trained, examples, t)
            last = first * first / second
        table.add_row(f"{t:g}", f"{first:.2e}", f"{second:.2e}", f"{last:.2e}" if options.trained else f"{last:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
