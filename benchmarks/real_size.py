"""How fast BAGEL of its real size draws and writes, and how much memory it takes: random weights in bfloat16.

    python -m benchmarks.real_size [--small] [--compile] [--batches 1 4 8] [--rows 1 16] [--tokens 128]

14.6 billion parameters, images of 1024 px at 50 timesteps with guidance 4 on the reference's interval, the decoder of
the autoencoder included. Meant for a GPU of 80 GB; ``--small`` is a toy size that shows on a CPU that the script runs.

The rate is that of the best of some large matrix products in bfloat16 on the same device; the share is that of the
operations of the matrix products and attentions of the image, counted once, over the time that all took.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.stages import Work, make_items, operations
from srum.drawing import draw_prompts
from srum.models import EMBEDDED
from srum.models.bagel import Bagel
from srum.models.bagel.autoencoder import build_autoencoder
from srum.models.bagel.checkpoint import TABLES
from srum.models.bagel.config import AutoencoderConfig, BagelConfig, LlmConfig, VitConfig
from srum.models.bagel.network import BagelNetwork
from srum.models.bagel.positions import sincos_table
from srum.models.base import Decoding, Sampling, Segment
from srum.models.checkpoints import load_tokenizer

REAL = BagelConfig(
    llm=LlmConfig(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064,
    ),
    vit=VitConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14,
    ),
)  # fmt: skip
SMALL = BagelConfig(
    llm=LlmConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=768,
    ),
    vit=VitConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, patch_size=14,
    ),
    autoencoder=AutoencoderConfig(ch=32),
)  # fmt: skip
MATRIX = {"cuda": 8192, "cpu": 1024}  # side of the matrices whose product gives the rate
PROMPT_LENGTH = 64  # tokens of the context of decoding, about


def random_model(config: BagelConfig, device: torch.device) -> Bagel:
    """A model of this size, its weights made where they stay; the tokenizer is the shipped model's."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # else the weights would be float32 for a moment, twice the memory
    try:
        with torch.device(device):
            network = BagelNetwork(config)
    finally:
        torch.set_default_dtype(usual)
    sides = (config.vit_max_num_patch_per_side, config.max_latent_size)
    for name, side in zip(TABLES, sides, strict=True):
        network.get_parameter(name).data.copy_(sincos_table(side, config.llm.hidden_size))
    folder: Path = EMBEDDED["srum-tiny"]
    autoencoder = build_autoencoder(config.autoencoder).to(device).eval()
    return Bagel(folder, config, network.requires_grad_(False).eval(), autoencoder, load_tokenizer(folder), "bf16")


def drawing(model: Bagel, sampling: Sampling, batch: int) -> Work:
    """So many images of different prompts."""
    prompts = [item.prompt for item in make_items(batch)]
    return lambda: draw_prompts(model, prompts, sampling, range(batch))


def writing(model: Bagel, rows: int, tokens: int) -> Work:
    """So many texts of exactly ``tokens`` tokens, each behind a prompt of its own."""

    def work() -> None:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
            texts = [f"{row} " * (PROMPT_LENGTH // 2) for row in range(rows)]
            cache = model.contexts([[Segment("text", text=text)] for text in texts])
            model.decode_tokens(cache, Decoding(max_tokens=tokens), range(rows), stop=-1)  # an id that no token has

    return work


def seconds(work: Work, device: torch.device) -> float:
    """The time of ``work``, to the end of all that it asked of the device."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device) -> float:
    """Operations per second of the best of 20 large matrix products in bfloat16."""
    side = MATRIX[device.type]
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(20))


def peak_memory(device: torch.device) -> float:
    """The most that was taken so far, in GB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a toy size, on the CPU: 64 px, 4 timesteps")
    parser.add_argument("--compile", action="store_true", help="through torch.compile, without the time of compiling")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8], help="images at a time")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="texts at a time")
    parser.add_argument("--tokens", type=int, default=128, help="of a text")
    args = parser.parse_args(argv)
    if not args.small and not torch.cuda.is_available():
        parser.error("the real size needs a GPU; --small shows that the script runs")
    device = torch.device("cpu" if args.small else "cuda")
    model = random_model(SMALL if args.small else REAL, device)
    sampling = Sampling(size=(64, 64), timesteps=4) if args.small else Sampling()
    of_one_image, rate = operations(drawing(model, sampling, 1)), matmul_rate(device)
    if args.compile:
        model.compile()
    size = sum(p.numel() for p in model.network.parameters()) / 1e9
    title = f"{size:.1f} billion parameters, {sampling.size[0]} px, {sampling.timesteps} timesteps"
    table = Table("what", "seconds", "each", "share of the rate", "peak GB so far", title=title)
    for batch in args.batches:
        work = drawing(model, sampling, batch)
        seconds(work, device)  # kernels are chosen, or compiled
        took = seconds(work, device)
        share = f"{100 * batch * of_one_image / rate / took:.0f}%"
        table.add_row(f"{batch} images", f"{took:.2f}", f"{took / batch:.2f} s", share, f"{peak_memory(device):.1f}")
    for rows in args.rows:
        work = writing(model, rows, args.tokens)
        seconds(work, device)
        took = seconds(work, device)
        each = f"{rows * args.tokens / took:.0f} tokens/s"
        table.add_row(f"{rows} texts", f"{took:.2f}", each, "", f"{peak_memory(device):.1f}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    Console().print(table, f"{name}, bf16 {rate / 1e12:.2f} TFLOP/s; floor of one image {of_one_image / rate:.2f} s")


if __name__ == "__main__":
    main()
