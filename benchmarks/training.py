"""A training step in packs from cached latents against the plain way of the released code, in the same run.

    python -m benchmarks.training [--images 8] [--repeats 3] [--beginnings]

The plain way pads every image of the batch to the largest, encodes both images of a sample (in practice the same file)
in every step, and brings full-resolution reward maps to the latent grid. Its parts are taken away one after the other,
down to our trainer, so that the table says where the time goes. Eq. 1-3, the generation expert, the model of
``benchmarks/medium.py``, images of 256, 192 and 128 px. Tokens are those of images that are not padding.

Times are medians, the ways taking turns. Memory is the peak of a process of its own for each way, above what it had
before the model was built. The floor is the time that our matrix products would take at the rate of the machine.

``--beginnings``: instead, a step in which what rows begin with, texts and seen images, runs once and without gradients,
against one in which it runs with the rest. Times are seconds of the processor there.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.medium import medium_model
from benchmarks.stages import Work, make_items, matmul_rate, medians, operations, trainer_of
from srum import models
from srum.config import parse_config
from srum.flow import FlowNoise, sample_timesteps, velocity_target
from srum.models import native_bfloat16
from srum.models.bagel import Bagel
from srum.models.bagel.autoencoder import encode_mean
from srum.models.bagel.network import BagelNetwork
from srum.models.base import Segment
from srum.processes import Processes
from srum.records import Candidate
from srum.run import find_method
from srum.train.data import TrainingRecord
from srum.train.examples import Example
from srum.train.feed import Mix, Part
from srum.train.trainer import Trainer
from srum.train.weights import trainable_parameters

SIZES = ((256, 256), (128, 256), (192, 192), (256, 128), (128, 128))  # (H, W) in pixels
TRAIN = {"text_dropout": 0.0, "trainable": "generation", "lr": 1e-5}
WAYS = 4
PRECISION = "bf16" if native_bfloat16(torch.device("cpu")) else "fp32"


@dataclass(frozen=True)
class Batch:
    """Samples of mixed sizes: pixels (3, H, W) in [-1, 1], reward maps (H, W), latents (C, h, w), prompts."""

    prompts: Sequence[str]
    pixels: Sequence[Tensor]
    maps: Sequence[Tensor]
    latents: Sequence[Tensor]


def make_batch(model: Bagel, images: int) -> Batch:
    """The same samples every time; the latents are those of the autoencoder."""
    generator = torch.Generator().manual_seed(0)
    sizes = [SIZES[index % len(SIZES)] for index in range(images)]
    pixels = [torch.rand(3, *size, generator=generator) * 2 - 1 for size in sizes]
    maps = [torch.rand(size, generator=generator) * 2 - 1 for size in sizes]
    prompts = [item.prompt for item in make_items(images)]
    with torch.no_grad():
        latents = [encode_mean(model.autoencoder, x[None])[0] for x in pixels]
    return Batch(prompts, pixels, maps, latents)


def padded(tensors: Sequence[Tensor]) -> Tensor:
    """(..., H, W) each to (N, ..., H max, W max), zeros on the right and below."""
    height, width = (max(tensor.shape[axis] for tensor in tensors) for axis in (-2, -1))
    return torch.stack([F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in tensors])


def plain_step(
    model: Bagel, batch: Batch, optimizer: torch.optim.Optimizer, encode: bool = True, full_maps: bool = True
) -> None:
    """The released code's step; without ``encode`` from cached latents, without ``full_maps`` from maps on the grid."""
    if encode:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bf16"):
            bad, good = (encode_mean(model.autoencoder, padded(batch.pixels)).float() for _ in range(2))
    else:
        bad = good = padded(batch.latents)
    patch = model.config.latent_patch_size
    grid = (bad.shape[-2] // patch, bad.shape[-1] // patch)
    if full_maps:
        maps = F.interpolate(padded(batch.maps)[:, None], grid, mode="bilinear")[:, 0]
    else:
        maps = torch.ones(len(bad), *grid)
    there = padded([torch.ones(x.shape[-2] // patch, x.shape[-1] // patch) for x in batch.latents]).flatten()
    clean, target_image = (torch.stack([model.tokens(x) for x in latents]) for latents in (bad, good))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(clean.shape, generator=generator)
    times = sample_timesteps(len(clean), 4.0, generator).tolist()
    samples = [
        [Segment("text", text=prompt), Segment("noisy", latent=latent, loss=True)]
        for prompt, latent in zip(batch.prompts, bad, strict=True)
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bf16"):
        corruptions = [FlowNoise(eps, t) for eps, t in zip(noise, times, strict=True)]
        v = model.forward(model.pack(samples, corruptions)).velocity
    targets = (velocity_target(x, noise).flatten(0, 1) for x in (clean, target_image))
    repel, keep = ((v - target).square().mean(dim=-1) for target in targets)
    loss = ((maps.flatten() * repel + 0.5 * keep) * there).sum() / there.sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0, foreach=False)
    optimizer.step()


def ways(model: Bagel, images: int) -> dict[str, Callable[[], object]]:
    """A step in every way, by name, from the plain one to ours."""
    batch = make_batch(model, images)
    train = TRAIN | {"batch_size": images, "steps": 10**6, "precision": PRECISION}
    config = parse_config({"method": "srum", "train": train})
    records = [
        TrainingRecord(
            Candidate(id=n, prompt_id=n, prompt=prompt, index=0, seed=0, image=n, latent=n, size=tuple(map_.shape)),
            latent, F.adaptive_avg_pool2d(map_[None], model.latent_grid(tuple(map_.shape)))[0],
            mapping="signed", alpha=1.0, sample_score=0.0,
        )
        for n, (prompt, map_, latent) in (
            (str(number), sample)
            for number, sample in enumerate(zip(batch.prompts, batch.maps, batch.latents, strict=True))
        )
    ]  # fmt: skip
    trainer = trainer_of(model, records, config)
    optimizer = torch.optim.AdamW(list(trainer.parameters.values()), config.train.lr, foreach=False)

    def alone(step: Callable[[], object]) -> Callable[[], object]:
        def work() -> None:
            with trainable_parameters(model, config.train.trainable):
                step()

        return work

    steps: Mapping[str, Callable[[], object]] = {
        "plain: padded, both images encoded, full maps": partial(plain_step, model, batch, optimizer),
        "  without encoding": partial(plain_step, model, batch, optimizer, encode=False),
        "  with maps on the latent grid": partial(plain_step, model, batch, optimizer, encode=False, full_maps=False),
        "ours: and packed": partial(trainer.step, 0),
    }
    return {name: alone(step) for name, step in steps.items()}


# --- what rows begin with


def examples(model: Bagel, count: int, seen: bool) -> list[Example]:
    """Images after their prompts, every other one to be avoided; ``seen``: after another image and RvR's texts."""
    generator, (before, after) = torch.Generator().manual_seed(0), model.refine_texts
    made = []
    for number, item in enumerate(make_items(count)):
        image = model.resized(item.image)
        h, w = (cells * model.config.latent_patch_size for cells in model.latent_grid(image.size[::-1]))
        latent = torch.randn(model.config.autoencoder.z_channels, h, w, generator=generator)
        looked = [Segment("text", text=before), Segment("seen", image=image)]
        text = Segment("text", text=after.format(prompt=item.prompt) if seen else item.prompt)
        segments = [*(looked if seen else []), text, Segment("noisy", latent=latent, loss=True)]
        made.append(Example(id=str(number), segments=segments, credit=(torch.full((1,), 1.0 - 2.0 * (number % 2)),)))
    return made


def step_of(model: Bagel, method: str, learned: Sequence[Example]) -> tuple[Work, Work]:
    """A step of a method on all of these examples: (everything together, what rows begin with apart)."""
    train = TRAIN | {"batch_size": len(learned), "steps": 10**6, "precision": PRECISION}
    config = parse_config({"method": method, "train": train})
    feed = Mix([Part("", learned, len(learned))]).feed(model, config.train, 0, Processes())
    with trainable_parameters(model, "generation") as chosen:
        trainer = Trainer(model, feed, find_method(method).objective(config), config.train, 0, list(chosen))

    def apart() -> None:
        with trainable_parameters(model, "generation"):
            trainer.step(0)

    def together() -> None:
        with patch.object(BagelNetwork, "only_draws", lambda _: False):
            apart()

    return together, apart


def beginnings(images: int, repeats: int) -> Table:
    """Two methods, of which the first compares with old weights, on two kinds of examples."""
    table = Table("model", "method", "after", "together, s", "apart, s", "ratio", "of operations", "share of the rate")
    shipped = models.load("srum-tiny", device="cpu")
    assert isinstance(shipped, Bagel)
    for name, model, count in (("srum-tiny", shipped, 8 * images), ("medium", medium_model("fp32"), images)):
        for method, seen in (("region_nft", False), ("region_nft", True), ("rvr", True)):
            together, apart = step_of(model, method, examples(model, count, seen))
            before, after = operations(together), operations(apart)
            plain, ours = medians(together, apart, repeats)
            share = after / matmul_rate(PRECISION) / ours
            ratios = (f"{plain / ours:.2f}", f"{before / after:.2f}", f"{share:.0%}")
            what = "an image and texts" if seen else "a prompt"
            table.add_row(f"{name}, {count} images", method, what, f"{plain:.2f}", f"{ours:.2f}", *ratios)
    return table


# --- the clock


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; with ``--way`` measure that one's memory here and print its bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--beginnings", action="store_true")
    parser.add_argument("--way", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.way is not None:
        before = peak()
        work = list(ways(medium_model("fp32"), args.images).values())[args.way]
        for _ in range(2):  # in the second the optimiser has its state
            work()
        print(peak() - before)
        return
    if args.beginnings:
        table = beginnings(args.images, args.repeats)
        Console(width=140).print(table, f"{torch.get_num_threads()} threads, {PRECISION}")
        return
    command = [sys.executable, "-m", "benchmarks.training", "--images", str(args.images), "--way"]
    taken = [  # first, since a process starts with the peak of the one that it came from
        int(subprocess.run([*command, str(number)], check=True, capture_output=True, text=True).stdout)
        for number in range(WAYS)
    ]
    model = medium_model("fp32")
    steps = ways(model, args.images)
    for work in steps.values():
        work()
    times = [[seconds(work) for work in steps.values()] for _ in range(args.repeats)]
    tokens = sum(h * w for h, w in (model.latent_grid(SIZES[i % len(SIZES)]) for i in range(args.images)))
    table = Table("step", "s", "tokens / s", "plain / this", "peak, GB", title=f"{args.images} images, {tokens} tokens")
    first, *_ = medians = [median(own) for own in zip(*times, strict=True)]
    for name, took, held in zip(steps, medians, taken, strict=True):
        table.add_row(name, f"{took:.2f}", f"{tokens / took:.0f}", f"{first / took:.2f}", f"{held / 1e9:.2f}")
    ours = list(steps.values())[-1]
    floor = operations(ours) / matmul_rate(PRECISION)
    Console(width=120).print(
        table,
        f"{torch.get_num_threads()} threads, {PRECISION}; floor of ours {floor:.2f} s, ours / floor {took / floor:.1f}",
    )


if __name__ == "__main__":
    main()
