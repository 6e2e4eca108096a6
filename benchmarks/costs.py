"""What a round of BAGEL-7B costs, from 100 to 1,000,000 candidates on 1 to 512 GPUs: the table of docs/scale.md.

    python -m benchmarks.costs [--price 2.5] [--link 450] [--network 400]

Operations and bytes sent are those of the dry runs (benchmarks/dry_runs.jsonl); the rate and the shares of it that
stages reach are measured (docs/performance.md); prices and links are arguments. A round draws, judges and learns from
every candidate once: LoRA on one GPU, the whole generation expert shared by all of several.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.dry_runs import stored

RATE = 769e12  # of a large bfloat16 product on an H100, operations per second
SHARES = {"draw": 0.57, "judge": 0.10, "train": 0.57}  # of it: of a step on an H100; of a CPU's; taken to be drawing's
NODE = 8  # GPUs that are linked directly
PER_CANDIDATE = 2 * 1024**2 + 4 * 64**2  # bytes of an image at one per pixel, a latent, a reward map
WEIGHTS = 29.2e9  # of the published model
STATE = 12 * 6.53e9  # of a checkpoint of the generation expert: weights and AdamW's averages
CHECKPOINTS = 3  # two that are kept, one that is being written
CANDIDATES = [10**n for n in range(2, 7)]
GPUS = [1, 8, 64, 512]


@dataclass(frozen=True)
class Prices:
    """Dollars of an hour of a GPU; bytes per second that a ring carries within a node, and through several: what all
    cards of a node carry together."""

    hour: float = 2.5
    link: float = 450e9
    network: float = 400e9


@dataclass(frozen=True)
class Round:
    """``seconds`` of every stage, and what is short: GPUs without work, or links, or nothing but operations."""

    seconds: dict[str, float]
    short: str

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def waves(stage: str, row: str, candidates: int, gpus: int) -> float:
    """Seconds of a stage that works by batches, each on a GPU of its own."""
    found = stored()[row]
    batch = int(found["step"].split()[0])
    return math.ceil(candidates / (batch * gpus)) * found["operations"] / (RATE * SHARES[stage])


def training(candidates: int, gpus: int, prices: Prices) -> tuple[float, float]:
    """Seconds of computing and of sending, of which the longer counts, for one pass over the candidates."""
    row = stored()["lora-1gpu:1" if gpus == 1 else "fsdp:8"]
    words = row["step"].split()
    examples, packs = int(words[0]), int(words[2])
    in_pack = examples // (packs * row["processes"])
    steps = math.ceil(candidates / (in_pack * gpus))  # a pack of each GPU, whatever the batch that they make
    computing = row["operations"] / packs / (RATE * SHARES["train"])
    sending = row["sent"] / packs / (prices.link if gpus <= NODE else prices.network)
    return steps * computing, steps * sending


def round_of(candidates: int, gpus: int, prices: Prices) -> Round:
    """A round of so many candidates."""
    computing, sending = training(candidates, gpus, prices)
    seconds = {
        "draw": waves("draw", "lora-1gpu:rollout", candidates, gpus),
        "judge": waves("judge", "lora-1gpu:judge", candidates, gpus),
        "train": max(computing, sending),
    }
    idle = candidates < 8 * gpus
    short = "candidates" if idle else "links" if sending > computing else max(seconds, key=lambda name: seconds[name])
    return Round(seconds, short)


def disk(candidates: int, gpus: int) -> float:
    """Bytes of a round's folder."""
    return candidates * PER_CANDIDATE + WEIGHTS + (CHECKPOINTS * STATE if gpus > 1 else 0)


def table(prices: Prices) -> str:
    """In Markdown, a line for each size."""
    lines = [["candidates", "GPUs", "draw", "judge", "train", "all", "dollars", "disk", "short of"], ["---"] * 9]
    for candidates in CANDIDATES:
        for gpus in GPUS:
            made = round_of(candidates, gpus, prices)
            times = [duration(made.seconds[stage]) for stage in SHARES]
            dollars = made.total / 3600 * gpus * prices.hour
            sizes = [duration(made.total), f"{dollars:,.0f}", f"{disk(candidates, gpus) / 1e9:,.0f} GB"]
            lines.append([f"{candidates:,}", str(gpus), *times, *sizes, made.short])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def duration(seconds: float) -> str:
    """In minutes, hours or days, two digits."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, default=Prices.hour, help="dollars of an hour of a GPU")
    parser.add_argument("--link", type=float, default=Prices.link / 1e9, help="GB/s of a ring within a node")
    parser.add_argument("--network", type=float, default=Prices.network / 1e9, help="GB/s of one through nodes")
    args = parser.parse_args(argv)
    print(table(Prices(args.price, args.link * 1e9, args.network * 1e9)))


if __name__ == "__main__":
    main()
