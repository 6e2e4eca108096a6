"""What a long chain costs: keys and values of its turns kept between them, against written again for each.

    OMP_NUM_THREADS=1 python -m benchmarks.long_chains [--images 1 2 3 4 5] [--chains 4] [--repeats 3]

Exact chains of the embedded world of so many images, in the ``long`` layout; each turn is written or drawn anew after
all that was before it, with the settings of the evaluation, and its result is thrown away. The two ways take turns.
Context tokens: what the network runs for contexts alone. Seconds: of the processor, the median over repeats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from srum import models
from srum.config import EvalConfig
from srum.models.base import Decoding, Sampling, Segment, UnifiedModel, remembering
from srum.train.interleaved import exact_chain, long_segments

WORDS = Decoding(max_tokens=32)  # of a text
Turn = tuple[str, list[Segment]]  # the kind of what follows, and all that is before it


def turns_of(model: UnifiedModel, images: int, seed: int) -> list[Turn]:
    """The turns of an exact chain of so many images."""
    for number in range(10_000):
        prompt, turns = exact_chain(np.random.default_rng([seed, number]))
        if sum(turn.image is not None for turn in turns) == images:
            break
    else:
        raise SystemExit(f"--images: no exact chain has {images} images")
    segments = [s for s in long_segments(model, prompt, turns) if s.kind != "noisy"]
    kinds = [(place, s.kind) for place, s in enumerate(segments) if place and s.kind != "seen"]
    return [("text" if kind == "text" else "image", segments[:place]) for place, kind in kinds]


def kept_tokens(model: UnifiedModel, chain: Sequence[Turn]) -> int:
    """Tokens that a chain's contexts take where each goes on from the last image; texts after it are written again."""
    total = known = 0
    for _, context in chain:
        end = max((place for place, segment in enumerate(context, 1) if segment.kind != "text"), default=0)
        begun = model.length(context[:end])
        total, known = total + begun - known + model.length(context[end:]), begun
    return total


def run(model: UnifiedModel, chains: Sequence[Sequence[Turn]], keeps: bool) -> float:
    """Processor seconds of all turns, the chains side by side."""
    start, sampling = time.process_time(), Sampling(**EvalConfig().sampling())
    with remembering(model) if keeps else nullcontext():
        for number in range(max(map(len, chains))):
            now = [chain[number] for chain in chains if number < len(chain)]
            texts = [context for kind, context in now if kind == "text"]
            model.write(texts, WORDS, range(len(texts)))
            drawn = [context for kind, context in now if kind == "image"]
            model.draw(drawn, sampling, range(len(drawn)))
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--chains", type=int, default=4, help="side by side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="srum-tiny")
    options = parser.parse_args(arguments)
    model = models.load(options.model, "cpu")
    table = Table("images", "turns", "context tokens", "kept", "ratio", "seconds", "kept", "ratio")
    for images in options.images:
        chains = [turns_of(model, images, seed) for seed in range(options.chains)]
        again = sum(model.length(context) for chain in chains for _, context in chain)
        once = sum(kept_tokens(model, chain) for chain in chains)
        pairs = [(run(model, chains, keeps=False), run(model, chains, keeps=True)) for _ in range(options.repeats)]
        plain, kept = (median(own) for own in zip(*pairs, strict=True))
        ratio = median(a / b for a, b in pairs)
        tokens = f"{again:,}", f"{once:,}", f"{again / once:.2f}"
        turns = str(sum(map(len, chains)))
        table.add_row(str(images), turns, *tokens, f"{plain:.2f}", f"{kept:.2f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
