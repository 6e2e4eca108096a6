"""Reward maps per second on one core, against a plain loop in the same run and against the floor of the arithmetic.

    python benchmarks/rasterizer.py [--image 1024] [--cells 64] [--regions 20] [--maps 200]

A map is that of a square image with random boxes of whole pixels, scores for all of them, the layout and the
background, at the default rules. The plain loop paints one region after the other on the pixels and averages each cell.
The floor is the two matrix products of the area averages alone, on arrays of the same sizes; what lies between is calls
of numpy on small arrays and reading the records.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from srum.records import Candidate, Grounding, Judgement, LayoutJudgement, Region, RegionJudgement
from srum.stages.reward_map import cut, rasterize

Sample = tuple[Candidate, Grounding, Judgement]


def make_samples(count: int, side: int, regions: int) -> list[Sample]:
    """Always the same ones."""
    rng = np.random.default_rng(0)
    return [_sample(str(number), side, regions, rng) for number in range(count)]


def _sample(name: str, side: int, regions: int, rng: np.random.Generator) -> Sample:
    first, last = np.sort(rng.integers(0, side, (2, regions, 2)), axis=0)  # corner pixels
    boxes = np.hstack([first, last + 1]).astype(float)
    things = [
        Region(id=i, box=(x0, y0, x1, y1), area=(x1 - x0) * (y1 - y0), source="random")
        for i, (x0, y0, x1, y1) in enumerate(boxes.tolist(), start=1)
    ]
    said = [RegionJudgement(region_id=i, score=s) for i, s in enumerate(rng.uniform(-1, 1, regions + 1).tolist())]
    judgement = Judgement(candidate_id=name, regions=said, layout=LayoutJudgement(score=0.4))
    candidate = Candidate(
        id=name, prompt_id=name, prompt=name, index=0, seed=0, image=name, latent=name, size=(side, side)
    )
    return candidate, Grounding(candidate_id=name, regions=things), judgement


def plain(sample: Sample, cells: int) -> np.ndarray:
    """The map (cells, cells) of one sample, by loops over regions and cells."""
    candidate, grounding, judgement = sample
    scores = {said.region_id: said.score for said in judgement.regions}
    pixels = np.full(candidate.size, scores[0])
    for region in sorted(grounding.regions, key=lambda region: -region.area):
        x0, y0, x1, y1 = map(int, region.box)
        pixels[y0:y1, x0:x1] = scores[region.id]
    cell = candidate.size[0] // cells
    return np.array(
        [
            [pixels[y : y + cell, x : x + cell].mean() for x in range(0, cell * cells, cell)]
            for y in range(0, cell * cells, cell)
        ]
    )


def products(sample: Sample, cells: int) -> Callable[[], torch.Tensor]:
    """The matrix products of one sample, on random numbers."""
    rows, columns, _, _ = cut(sample[1].regions, sample[0].size)
    values = torch.rand(len(rows) - 1, len(columns) - 1, dtype=torch.float64)
    along_y = torch.rand(cells, len(rows) - 1, dtype=torch.float64)
    along_x = torch.rand(len(columns) - 1, cells, dtype=torch.float64)
    return lambda: along_y @ values @ along_x


def per_second(works: Sequence[Callable[[], object]]) -> float:
    """How many of ``works`` are done in a second of the processor: the best of ten parts, others only slow it down."""
    size = -(-len(works) // 10)
    return max(_rate(works[first : first + size]) for first in range(0, len(works), size))


def _rate(works: Sequence[Callable[[], object]]) -> float:
    start = time.process_time()
    for work in works:
        work()
    return len(works) / (time.process_time() - start)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, default=1024, help="side in pixels, a multiple of the cells")
    parser.add_argument("--cells", type=int, default=64, help="side of the map")
    parser.add_argument("--regions", type=int, default=20)
    parser.add_argument("--maps", type=int, default=2000)
    args = parser.parse_args(argv)
    if args.image % args.cells:
        parser.error("the plain loop needs an image whose side is a multiple of the cells")
    torch.set_num_threads(1)
    samples, grid = make_samples(args.maps, args.image, args.regions), (args.cells, args.cells)
    few = samples[: max(1, args.maps // 50)]
    rates = {
        "plain loop": per_second([lambda sample=sample: plain(sample, args.cells) for sample in few]),  # type: ignore[misc]
        "rasterize": per_second([lambda sample=sample: rasterize(*sample, grid) for sample in samples]),  # type: ignore[misc]
        "floor: two matrix products": per_second([products(sample, args.cells) for sample in samples]),
    }
    title = f"{args.cells}x{args.cells} cells, {args.regions} regions, {args.image} px, one core"
    table = Table("what", "maps per second", "against the plain loop", title=title)
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.0f}", f"{rate / rates['plain loop']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
