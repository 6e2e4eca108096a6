"""How long the stages take against the plain way of doing them, in the same run, and against the floor of the machine.

    python -m benchmarks.stages [--model srum-tiny] [--items 16] [--repeats 3] [--only scoring ...]

Rollout in a batch against image by image; judging with the image's keys and values written once and all questions
together against one question at a time; the whole judge, whose scores follow on its replies, against one that sees the
images again for them; a training step from cached latents against encoding its images again. Times are seconds of the
processor, of all threads; medians over the repeats, the two ways taking turns.

The floor is the time that the matrix products and convolutions of our way would take, at the rate at which this machine
multiplies large square matrices of the same precision. What lies above it is memory traffic, small products, Python.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from srum import models
from srum.config import RolloutConfig, RunConfig, load_config
from srum.drawing import draw_prompts
from srum.judging.instructions import load_instructions
from srum.judging.self_judge import SelfJudge
from srum.models.bagel import Bagel
from srum.models.bagel.autoencoder import encode_mean
from srum.models.bagel.images import to_tensor
from srum.models.base import Decoding, Sampling, Segment
from srum.processes import Processes
from srum.records import Candidate, Region
from srum.run import find_method
from srum.shapes.prompts import sample_prompt
from srum.shapes.render import render
from srum.shapes.scenes import IMAGE_SIZE, Thing, sample_scene
from srum.train.data import TrainingRecord, candidate_mix
from srum.train.feed import Mix
from srum.train.methods.base import CandidateMethod
from srum.train.trainer import Trainer
from srum.train.weights import trainable_parameters

SIZE = (IMAGE_SIZE, IMAGE_SIZE)
MAX_TOKENS = 48  # of a reply
MATRIX = 1024  # side of the matrices whose product gives the machine's rate
UNKNOWN = (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.ops.srum.attend_by_row)  # to the counter

Work = Callable[[], object]


@dataclass(frozen=True)
class Item:
    """A prompt and a scene that satisfies it."""

    prompt: str
    things: Sequence[Thing]
    image: Image.Image


@dataclass(frozen=True)
class Comparison:
    """One piece of work done in two ways, and the precision of its products."""

    name: str
    plain: Work
    ours: Work
    precision: str


def make_items(count: int) -> list[Item]:
    """Prompts and scenes of the embedded world, always the same ones."""
    rng = np.random.default_rng(0)
    asked = [sample_prompt(rng, "development") for _ in range(count)]
    scenes = [sample_scene(spec, rng) for spec, _ in asked]
    return [
        Item(text, scene.things, Image.fromarray(render(scene))) for (_, text), scene in zip(asked, scenes, strict=True)
    ]


# --- the work


def rollout(model: Bagel, items: Sequence[Item]) -> Comparison:
    """Images of the prompts, sampled as a rollout is, without a planning text."""
    sampling = Sampling(**RolloutConfig(size=SIZE).sampling())
    prompts, seeds = [item.prompt for item in items], range(len(items))

    def plain() -> None:
        for prompt, seed in zip(prompts, seeds, strict=True):
            draw_prompts(model, [prompt], sampling, [seed])

    together = lambda: draw_prompts(model, prompts, sampling, seeds)  # noqa: E731
    return Comparison("rollout, one batch", plain, together, model.precision)


def judging(model: Bagel, items: Sequence[Item]) -> Comparison:
    """Replies to the questions of the judge: each thing, the background, the layout."""
    contexts = [context for item in items for context in questions(item)]
    decoding = Decoding(max_tokens=MAX_TOKENS)

    def plain() -> None:
        for context in contexts:
            model.write([context], decoding, [0])

    together = lambda: model.write(contexts, decoding, range(len(contexts)))  # noqa: E731
    return Comparison("judging, shared images", plain, together, model.precision)


def questions(item: Item) -> list[list[Segment]]:
    """The contexts of what the judge asks about an image, which they share."""
    instructions = load_instructions("compact")
    texts = [instructions.about_regions(item.prompt, [region]) for region in regions(item)]
    seen = Segment("seen", image=item.image)
    return [[seen, Segment("text", text=text)] for text in (*texts, instructions.about_layout(item.prompt))]


def regions(item: Item) -> list[Region]:
    """Each thing, and the background."""
    boxes = {index: thing.box for index, thing in enumerate(item.things, start=1)} | {0: (0.0, 0.0, 64.0, 64.0)}
    return [Region(id=index, box=box, area=1, source="truth") for index, box in boxes.items()]


def scoring(model: Bagel, items: Sequence[Item]) -> Comparison:
    """Replies and the scores behind them, as the judge of the loop asks for them."""
    judge = SelfJudge(model, decoding=Decoding(max_tokens=MAX_TOKENS))
    asked = [item.image for item in items], [item.prompt for item in items], [regions(item) for item in items]

    def forgetful() -> None:
        with patch.object(model, "abilities", model.abilities - {"remember"}):
            judge.judge(*asked)

    return Comparison("scores, images remembered", forgetful, lambda: judge.judge(*asked), model.precision)


def training(model: Bagel, items: Sequence[Item]) -> Comparison:
    """One step of the default method, the whole batch encoded together where it is encoded at all."""
    config = load_config(None, [f"train.batch_size={len(items)}"])
    pixels = torch.stack([to_tensor(item.image) for item in items])
    records = [
        _record(model, index, item, x)
        for index, (item, x) in enumerate(zip(items, _encode(model, pixels), strict=True))
    ]
    trainer = trainer_of(model, records, config)

    def step(records: Sequence[TrainingRecord]) -> None:
        trainer.feed = mix_of(records, config).feed(model, config.train, 0, Processes())
        with trainable_parameters(model, config.train.trainable):
            trainer.step(0)

    def plain() -> None:
        step([replace(record, latent=x) for record, x in zip(records, _encode(model, pixels), strict=True)])

    return Comparison("training, cached latents", plain, lambda: step(records), config.train.precision)


def trainer_of(model: Bagel, records: Sequence[TrainingRecord], config: RunConfig) -> Trainer:
    """The trainer of the config's method on these candidates."""
    feed = mix_of(records, config).feed(model, config.train, 0, Processes())
    with trainable_parameters(model, config.train.trainable) as chosen:
        return Trainer(model, feed, find_method(config.method).objective(config), config.train, 0, list(chosen))


def mix_of(records: Sequence[TrainingRecord], config: RunConfig) -> Mix:
    """What the config's method makes of these candidates."""
    method = find_method(config.method)
    assert isinstance(method, CandidateMethod)
    return candidate_mix(records, method.credits(records, config), config.train, seed=0)


def _encode(model: Bagel, pixels: Tensor) -> Tensor:
    """Clean latents (N, C, h, w) of pixels (N, 3, H, W)."""
    return encode_mean(model.autoencoder, pixels.to(model.device)).cpu()


def _record(model: Bagel, index: int, item: Item, latent: Tensor) -> TrainingRecord:
    """An image as training knows it, of the one prompt, every other one judged well; ``latent`` (C, h, w)."""
    name = str(index)
    candidate = Candidate(
        id=name, prompt_id="0", prompt=item.prompt, index=index, seed=0, image=name, latent=name, size=SIZE
    )
    score = 1.0 - 2.0 * (index % 2)
    values = torch.full(model.latent_grid(SIZE), score)
    return TrainingRecord(candidate, latent, values, mapping="signed", alpha=1.0, sample_score=score)


WORK: Mapping[str, Callable[[Bagel, Sequence[Item]], Comparison]] = {
    "rollout": rollout,
    "judging": judging,
    "scoring": scoring,
    "training": training,
}


# --- the clock


def medians(plain: Work, ours: Work, repeats: int) -> tuple[float, float]:
    """Seconds of the two, which take turns."""
    times = [(_seconds(plain), _seconds(ours)) for _ in range(repeats)]
    return median(a for a, _ in times), median(b for _, b in times)


def _seconds(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def operations(work: Work) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions that ``work`` does."""
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(UNKNOWN, _attention_operations)) as counter:
        work()
    return counter.get_total_flops()


def _attention_operations(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    """Of two products of queries (B, heads, L, d) with keys (B, kv heads, S, d) and values."""
    return 4 * q.numel() * k[2]


@cache
def matmul_rate(precision: str) -> float:
    """Operations per second of the best of 20 large matrix products, in ``fp32`` or ``bf16``."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(MATRIX, MATRIX, dtype=dtype) for _ in range(2))
    return 2 * MATRIX**3 / min(_seconds(lambda: a @ b) for _ in range(20))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="srum-tiny", help="a shipped name, or a folder in the official layout")
    parser.add_argument("--items", type=int, default=16, help="images per batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK))
    args = parser.parse_args(argv)
    model, items = models.load(args.model, device="cpu"), make_items(args.items)
    table = Table("what", "plain s", "ours s", "ratio", "floor s", "ours / floor", title=f"{args.items} images")
    for name in args.only:
        work = WORK[name](model, items)
        plain, ours = medians(work.plain, work.ours, args.repeats)
        floor = operations(work.ours) / matmul_rate(work.precision)
        numbers = (f"{plain:.3f}", f"{ours:.3f}", f"{plain / ours:.2f}", f"{floor:.4f}", f"{ours / floor:.1f}")
        table.add_row(work.name, *numbers)
    rates = ", ".join(f"{name} {matmul_rate(name) / 1e9:.0f} GFLOP/s" for name in ("bf16", "fp32"))
    Console().print(table, f"{torch.get_num_threads()} threads, {rates}")


if __name__ == "__main__":
    main()
