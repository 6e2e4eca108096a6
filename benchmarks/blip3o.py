"""What batches and kept conditions gain on BLIP3-o, against the plain way, in the same run.

    python -m benchmarks.blip3o [--model tests/golden/blip3o/checkpoint] [--items 8] [--repeats 5] [--precision fp32]
        [--work drawing judging training]

Drawing prompts at once against one at a time; scoring as many questions about an image with the image read once against
one at a time, each with the image; training steps with the conditions of frozen queries kept against computing them
in every step, as the reference does. Medians over the repeats, the two ways taking turns; on a CPU processor time, so
that other work on it counts for little. Training runs on random weights in the proportions of the 8B, a quarter as wide
and a quarter as deep: what it gains is the language model's share, which is counted in floating-point operations, too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from benchmarks.parity_blip3o import COMMON, PUBLISHED
from srum.judging.soft_score import score_logprobs
from srum.models import find_device, native_bfloat16
from srum.models.base import Decoding, Sampling, Segment
from srum.models.blip3o import Blip3o
from srum.models.blip3o.checkpoint import GENERATOR, QWEN, empty_generator, empty_qwen, official_name, read_headers
from srum.models.blip3o.config import HEAD_WIDTH, TransformerSizes, read_sizes
from srum.models.blip3o.generator import Blip3oGenerator
from srum.models.checkpoints import Headers
from srum.models.precision import Precision
from srum.shapes.prompts import prompt_set
from srum.train.weights import trainable_parameters

FEATURES = "model.dit.model.patch_embedder.proj.weight"  # (width, numbers of a feature)
SHAPES = Path("tests/golden/blip3o")
WORK = ["drawing", "judging", "training"]
REQUEST = 64  # tokens of a prompt with what stands around it
SCALE = 4  # how much less wide, and less deep, than the 8B is what training is measured on


@dataclass(frozen=True)
class Comparison:
    """One piece of work done in two ways."""

    name: str
    plain: Callable[[], object]
    ours: Callable[[], object]


def drawing(model: Blip3o, prompts: Sequence[str]) -> Comparison:
    side = model.decoder.side
    sampling = Sampling(size=(side, side), timesteps=31, timestep_shift=1.0, guidance=3.0, decoder_steps=10)
    contexts = [[Segment("text", text=prompt, droppable=True)] for prompt in prompts]
    seeds = list(range(len(prompts)))
    return Comparison(
        "drawing",
        lambda: [model.draw([context], sampling, [seed]) for context, seed in zip(contexts, seeds, strict=True)],
        lambda: model.draw(contexts, sampling, seeds),
    )


def judging(model: Blip3o, prompts: Sequence[str]) -> list[Comparison]:
    side = model.decoder.side
    (made,) = model.draw([[]], Sampling(size=(side, side), timesteps=4, timestep_shift=1.0, decoder_steps=2), [0])
    asked = [f"How well does what is at {prompt!r} fit? Score:" for prompt in prompts]

    def contexts() -> list[list[Segment]]:
        seen = Segment("seen", image=made.image)
        return [[seen, Segment("text", text=question)] for question in asked]

    def written(some: Sequence[Sequence[Segment]]) -> object:
        return model.write(some, Decoding(max_tokens=32), [0] * len(some))

    return [
        Comparison(
            "judging, scores",
            lambda: [score_logprobs(model, [context], " ") for context in contexts()],
            lambda: score_logprobs(model, contexts(), " "),
        ),
        Comparison(
            "judging, replies", lambda: [written([context]) for context in contexts()], lambda: written(contexts())
        ),
    ]


def proportioned(source: Path, folder: Path) -> Path:
    """A checkpoint of random weights in the 8B's proportions, with the tokenizer and decoder of ``source``."""
    shutil.copytree(source, folder)
    raw = json.loads((source / "config.json").read_text())
    published = PUBLISHED["8b"]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    raw |= {name: published[name] // SCALE for name in sizes}
    raw |= {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}
    raw["vision_config"] |= {"out_hidden_size": raw["hidden_size"]}
    (folder / "config.json").write_text(json.dumps(raw))
    headers = read_headers(source)
    channels = headers.shapes[FEATURES][1]
    heads = 28 // SCALE
    transformer = TransformerSizes(channels, 64 * heads, 24 // SCALE, heads, heads, condition=raw["hidden_size"])
    config = replace(read_sizes(source, raw, headers, 1), transformer=transformer, tower=None)
    weights = {
        official_name(name, beginnings): torch.randn(parameter.shape) * 0.02
        for part, beginnings in ((empty_qwen(config), QWEN), (empty_generator(config), GENERATOR))
        for name, parameter in part.named_parameters()
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def training(plain: Blip3o, ours: Blip3o, prompts: Sequence[str]) -> Comparison:
    """Forward and backward pass; ``ours`` is prepared, as the trainer does once for all steps."""
    latents = torch.randn(len(prompts), ours.config.transformer.channels, ours.config.grid, ours.config.grid)
    examples = [
        [Segment("text", text=prompt, droppable=True), Segment("noisy", latent=latent, loss=True)]
        for prompt, latent in zip(prompts, latents, strict=True)
    ]
    ours.prepare(examples)

    def step(model: Blip3o) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = [model.corrupt(latent, generator, 1.0) for latent in latents]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.precision == "bf16"):
            model.forward(model.pack(examples, noise)).image_error.mean().backward()

    return Comparison("training", lambda: step(plain), lambda: step(ours))


def counted(work: Callable[[], object]) -> float:
    """TFLOP of what is done."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def arithmetic(size: str) -> tuple[float, float]:
    """TFLOP per image of a training step at a published size, for a request of ``REQUEST`` tokens: of the language
    model, which kept conditions save, and of the transformer, forward and backward. Counted on the meta device."""
    facts = json.loads((SHAPES / f"official_shapes_{size}.json").read_text())
    shapes = {n.replace("{i}", str(i)): tuple(e["shape"]) for n, e in facts.items() for i in range(e["count"])}
    config = read_sizes(Path(size), COMMON | PUBLISHED[size], Headers({}, shapes, Counter()), HEAD_WIDTH)
    sizes = config.transformer
    with torch.device("meta"):
        text, dit = Qwen2_5_VLTextModel(config.qwen.text_config), Blip3oGenerator(config).dit
        inputs = torch.empty(1, REQUEST + config.queries, sizes.condition)
        places = torch.zeros(3, 1, inputs.shape[1], dtype=torch.long)
        x, condition = torch.empty(1, sizes.channels, config.grid, config.grid), inputs[:, : config.queries]
        with torch.no_grad():
            reading = counted(
                lambda: text(inputs_embeds=inputs, position_ids=places, attention_mask={"full_attention": None})
            )
        return reading, counted(lambda: dit(x, torch.ones(1), condition).sum().backward())


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Processor time on a CPU, else what passes."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("tests/golden/blip3o/checkpoint"))
    parser.add_argument("--items", type=int, default=8, help="prompts, questions, examples of a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=get_args(Precision), help="default: bf16 where the device multiplies it")
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    args = parser.parse_args(argv)
    device = find_device()
    precision: Precision = args.precision or ("bf16" if native_bfloat16(device) else "fp32")
    model = Blip3o.load(args.model, device, precision)
    prompts = [prompt.text for prompt in prompt_set("train", args.items, 0)]
    table = Table("work", "plain", "ours", "ratio", title=f"{args.items} items, {device}, {precision}")

    def add(name: str, plain: float, ours: float) -> None:
        table.add_row(name, f"{plain:.3f}", f"{ours:.3f}", f"{plain / ours:.1f}")

    with TemporaryDirectory() as temporary, ExitStack() as stack:
        compared = [drawing(model, prompts)] if "drawing" in args.work else []
        compared += judging(model, prompts) if "judging" in args.work else []
        if "training" in args.work:
            folder = proportioned(args.model, Path(temporary) / "model")
            unprepared, prepared = (Blip3o.load(folder, device, precision) for _ in range(2))
            for trained in (unprepared, prepared):
                stack.enter_context(trainable_parameters(trained, "generation"))
            compared.append(training(unprepared, prepared, prompts))
            add("training, TFLOP", counted(compared[-1].plain), counted(compared[-1].ours))
        for one in compared:
            one.plain(), one.ours()
            pairs = [(seconds(one.plain, device), seconds(one.ours, device)) for _ in range(args.repeats)]
            add(f"{one.name}, s", *(median(times) for times in zip(*pairs, strict=True)))
    Console(width=100).print(table)
    for size in PUBLISHED:
        reading, learning = arithmetic(size)
        saved = f"{reading + learning:.2f} TFLOP an image, {learning:.2f} with kept conditions"
        print(f"training at {size}: {saved}, ratio {(reading + learning) / learning:.1f}")


if __name__ == "__main__":
    main()
