"""Is the memory that ``srum doctor`` estimates what a process takes? Every stage in a process of its own, CPU.

    python -m benchmarks.memory [--images 8]

The model is that of ``benchmarks/medium.py``. A process reports how far its peak resident memory rose above what it had
before the model was built.

    python -m benchmarks.memory --batches 9

What a process holds after each of so many batches of the judge, 64 images of srum-tiny's world each, never the same.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.medium import SIDE, medium_model
from benchmarks.stages import make_items, regions, trainer_of
from srum import models
from srum.config import load_config
from srum.drawing import draw_prompts
from srum.judging.self_judge import SelfJudge
from srum.models import keep_memory, native_bfloat16
from srum.models.bagel import Bagel
from srum.models.bagel.memory import QUESTIONS, TEXT, Sizes, stage_needs
from srum.models.base import Decoding, Sampling, Segment
from srum.records import Candidate
from srum.train.data import TrainingRecord
from srum.train.weights import trainable_parameters

SIZE = (SIDE, SIDE)
SHORT = Sampling(size=SIZE, timesteps=3, guidance_interval=(0.0, 1.0))
BFLOAT16 = native_bfloat16(torch.device("cpu"))


def rollout(model: Bagel, images: int) -> None:
    """Two guided steps and the decoder."""
    draw_prompts(model, [item.prompt for item in make_items(images)], SHORT, range(images))


def judging(model: Bagel, images: int) -> None:
    """As many questions as the estimate assumes, about as long."""
    text = "Is the red circle right? " * (TEXT // 8)
    shown = [Segment("seen", image=item.image.resize(SIZE)) for item in make_items(images)]
    contexts = [[seen, Segment("text", text=f"{number} {text}")] for seen in shown for number in range(QUESTIONS)]
    model.write(contexts, Decoding(max_tokens=TEXT), range(len(contexts)))


def training(scope: str) -> Callable[[Bagel, int], None]:
    """Two steps of the default method on ``images`` samples: in the second the optimiser has its state."""

    def work(model: Bagel, images: int) -> None:
        config = load_config(None, [f"train.batch_size={images}", f"train.trainable={scope}"])
        latent = torch.zeros(model.config.autoencoder.z_channels, *(2 * n for n in model.latent_grid(SIZE)))
        map_ = torch.ones(model.latent_grid(SIZE))
        records = [
            TrainingRecord(
                Candidate(id=n, prompt_id=n, prompt="a red circle", index=0, seed=0, image=n, latent=n, size=SIZE),
                latent, map_, mapping="signed", alpha=1.0, sample_score=1.0,
            )
            for n in map(str, range(images))
        ]  # fmt: skip
        trainer = trainer_of(model, records, config)
        with trainable_parameters(model, config.train.trainable):
            for step in range(2):
                trainer.step(step)

    return work


STAGES: dict[str, Callable[[Bagel, int], None]] = {
    "rollout": rollout,
    "judging": judging,
    "training, generation expert": training("generation"),
    "training, all weights": training("all"),
}


def judged(batches: int, size: int = 64) -> Iterator[int]:
    """Resident memory in bytes after each batch of ``size`` images."""
    model, items = models.load("srum-tiny", "cpu"), make_items(batches * size)
    judge = SelfJudge(model, decoding=Decoding(max_tokens=256))
    for first in range(0, len(items), size):
        batch = items[first : first + size]
        judge.judge([item.image for item in batch], [item.prompt for item in batch], [regions(item) for item in batch])
        yield resident()


def resident() -> int:
    """Memory that this process holds, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; with ``--stage`` measure that one here and print its bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batches", type=int, help="of the judge, and nothing else")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.batches:
        for number, held in enumerate(judged(args.batches), 1):
            print(f"batch {number}: {held / 1e9:.2f} GB", flush=True)
        return
    if args.stage:
        before = peak()
        keep_memory()  # as every model on a CPU does
        STAGES[args.stage](medium_model("bf16" if BFLOAT16 else "fp32"), args.images)
        print(peak() - before)
        return
    config = medium_model("fp32").config
    table = Table("stage", "estimate, GB", "taken, GB", "estimate / taken", title=f"{args.images} images of {SIDE} px")
    for stage, need in stage_needs(config, Sizes.of(config), SIZE, BFLOAT16).items():
        command = [sys.executable, "-m", "benchmarks.memory", "--images", str(args.images), "--stage", stage]
        taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        estimate = need.once + args.images * need.per_image
        table.add_row(stage, f"{estimate / 1e9:.2f}", f"{taken / 1e9:.2f}", f"{estimate / taken:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
