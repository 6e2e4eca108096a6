"""Seconds and memory of what every stage does around the network, at 1e3, 1e4, 1e5 candidates: flat per candidate.

    python -m benchmarks.scale [--counts 1000 10000 100000] [--records 1000000] [--stages rollout judge ...]

Each stage runs in a process of its own, after a small round, over a made-up one: prompts of four candidates, three
regions each, a layout; images of 16 px. Nothing is drawn and nobody is asked: in place of the network stands what
returns at once. Training takes four steps of srum-tiny, so that what grows is its data. Seconds are those of the
processor, all threads. Memory is the highest above what the process had when it began, after that small round.

``each`` is the difference from the line above (the number before) over the candidates more: what one more costs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import srum
from srum.config import RunConfig, dump, load_config
from srum.grounding.stage import ground_stage
from srum.judging.stage import judge_stage
from srum.models.base import Generated
from srum.records import (
    Candidate,
    Grounding,
    Judgement,
    LayoutJudgement,
    MaskRLE,
    Prompt,
    Region,
    RegionJudgement,
    RewardMap,
)
from srum.run import Run
from srum.run_dir import CONFIG, write_records, write_text
from srum.stages.rasterize import rasterize_stage
from srum.stages.rollout import rollout
from srum.train.stage import train_stage
from srum.views.report import write_report

SIZE = (16, 16)
GRID = (2, 2)  # latent tokens of srum-tiny
PER_PROMPT = 4
WARM = 64  # candidates of the round before the one that is measured
SETTINGS = (
    "model=srum-tiny",
    "device=cpu",
    "rollout.size=[16,16]",
    "rollout.plan=false",
    "rollout.batch_size=64",
    "ground.grounder=grid",
    "judge.reward=benchmarks.scale:verdicts",
    "compare=[]",
    "train.steps=4",
    "train.probes=0",
    "train.samples.count=0",
)


# --- a made-up round


def candidates(count: int) -> Iterator[Candidate]:
    """All with one image and one latent."""
    for number in range(count):
        prompt, index = divmod(number, PER_PROMPT)
        yield Candidate(
            id=f"p{prompt:07d}-{index}",
            prompt_id=f"p{prompt:07d}",
            prompt="a red circle left of a blue square",
            index=index,
            seed=number,
            image="images/one.png",
            latent="latents/one.safetensors",
            size=SIZE,
            sampling={"size": list(SIZE), "timesteps": 16, "guidance": 4.0},
        )


def groundings(count: int) -> Iterator[Grounding]:
    """Three regions each, one with a mask."""
    mask = MaskRLE(size=SIZE, counts=[8, 8] * 16)
    boxes = ((0.0, 0.0, 8.0, 8.0), (8.0, 0.0, 16.0, 8.0), (8.0, 0.0, 16.0, 16.0))
    regions = [
        Region(id=n, box=box, area=64, source="made up", mask=mask if n == 3 else None)
        for n, box in enumerate(boxes, start=1)
    ]
    return (Grounding(candidate_id=candidate.id, regions=regions) for candidate in candidates(count))


def judgements(count: int) -> Iterator[Judgement]:
    """Of every prompt one is right, three are wrong in one place; a hundredth has no score."""
    for number, candidate in enumerate(candidates(count)):
        said = [
            RegionJudgement(region_id=n, score=1.0 if number % 4 or n > 1 else -0.5, reason="it is asked for", raw="1")
            for n in (1, 2, 3)
        ]
        failed = {"score": None, "failure": "no_score"} if number % 100 == 99 else {"score": 0.4}
        layout = LayoutJudgement.model_validate(failed | {"raw": "Score: 0.4"})
        yield Judgement(candidate_id=candidate.id, regions=said, layout=layout)


def rewards(count: int) -> Iterator[RewardMap]:
    """All with one map."""
    for number, candidate in enumerate(candidates(count)):
        if number % 100 != 99:
            score = 1.0 if number % 4 else -0.5
            yield RewardMap(
                candidate_id=candidate.id, values="rewards/one.safetensors", grid=GRID, mapping="signed",
                alpha=0.7, sample_score=score,
            )  # fmt: skip


def prompts(count: int) -> Iterator[Prompt]:
    """One for every four candidates."""
    return (Prompt(id=f"p{n:07d}", text="a red circle left of a blue square") for n in range(-(-count // PER_PROMPT)))


MADE: Mapping[str, Callable[[int], Iterator[Any]]] = {
    "prompts": prompts,
    "candidates": candidates,
    "regions": groundings,
    "judgements": judgements,
    "rewards": rewards,
}


def write_run(folder: Path, count: int, files: Sequence[str]) -> Run:
    """A run with a round of ``count`` candidates, as far as these ``files``."""
    config = load_config(None, SETTINGS)
    write_text(folder / CONFIG, dump(config))
    run = Run(folder, config)
    for name in files:
        write_records(run.round(0) / f"{name}.jsonl", MADE[name](count))
    for name in ("images", "latents", "rewards"):
        (run.round(0) / name).mkdir(parents=True)
    Image.new("RGB", SIZE, "red").save(run.round(0) / "images" / "one.png")
    save_file({"latent": torch.zeros(8, 4, 4)}, run.round(0) / "latents" / "one.safetensors")
    save_file({"reward": torch.tensor([[1.0, -1.0], [0.5, 0.0]])}, run.round(0) / "rewards" / "one.safetensors")
    write_text(run.round(0) / "counts.json", "{}")
    return run


def verdicts(images: Sequence[Image.Image], texts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    """What the judge says: alternately good and bad."""
    return [0.5 - number % 2 for number in range(len(images))]


class Painter:
    """In place of a model that draws."""

    device = torch.device("cpu")
    abilities: frozenset[str] = frozenset()

    def latent_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """That of srum-tiny."""
        return GRID

    def draw(self, contexts: Sequence[Any], *_: object, **__: object) -> list[Generated]:
        """Red."""
        return [Generated(Image.new("RGB", SIZE, "red"), torch.zeros(8, 4, 4)) for _ in contexts]


# --- the stages


def roll_out(run: Run, count: int) -> None:
    """Images, latents, records."""
    config: RunConfig = run.config.model_copy(update={"candidates_per_prompt": PER_PROMPT})
    rollout(Painter(), list(prompts(count)), config, 0, run.round(0))  # type: ignore[arg-type]


def read(run: Run, count: int) -> None:
    """Every candidate with all that is known of it."""
    found = sum(candidate.score is not None for candidate in srum.open_run(run.folder).candidates())
    assert found == count - count // 100


def rasterized(run: Run, count: int) -> None:
    """A map of each."""
    (run.round(0) / "counts.json").unlink()
    rasterize_stage(run, 0)


JUDGED = ("prompts", "candidates", "regions", "judgements")
STAGES: Mapping[str, tuple[Sequence[str], Callable[[Run, int], object]]] = {  # what is there before, and the work
    "rollout": ((), roll_out),
    "ground": (JUDGED[:2], lambda run, _: ground_stage(run, 0)),
    "judge": (JUDGED[:3], lambda run, _: judge_stage(run, 0)),
    "rasterize": (JUDGED, rasterized),
    "train": ((*JUDGED, "rewards"), lambda run, _: train_stage(run, 0)),
    "report": ((*JUDGED, "rewards"), lambda run, _: write_report(run.folder)),
    "read": ((*JUDGED, "rewards"), read),
}
ON_RECORDS = ("train", "report", "read")  # those that make no file of each candidate


def measure(stage: str, count: int) -> dict[str, float]:
    """Processor seconds, and bytes above what the process had."""
    files, work = STAGES[stage]
    with tempfile.TemporaryDirectory() as folder:
        work(write_run(Path(folder, "warm"), WARM * PER_PROMPT, files), WARM * PER_PROMPT)
        run = write_run(Path(folder, "measured"), count, files)
        before, start = _lowered_peak(), time.process_time()
        work(run, count)
        return {"seconds": time.process_time() - start, "bytes": _status("VmHWM") - before}


def _lowered_peak() -> int:
    """Bytes resident now; the highest number is counted anew from here."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--records", type=int, default=1_000_000, help="for what makes no files; 0: not")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args(argv)
    table = Table("stage", "candidates", "seconds", "MB", "each, ms", "each, kB")
    for stage in args.stages:
        before: tuple[int, dict[str, float]] | None = None
        for count in [*args.counts, *([args.records] if args.records and stage in ON_RECORDS else [])]:
            with get_context("fork").Pool(1) as pool:  # a process of its own, whose libraries are loaded
                found = pool.apply(measure, (stage, count))
            each = _each_more(count, found, *before) if before else ("", "")
            row = (stage, f"{count:,}", f"{found['seconds']:.2f}", f"{found['bytes'] / 1e6:.0f}", *each)
            print(*row, file=sys.stderr, flush=True)
            table.add_row(*row)
            before = count, found
    Console().print(table)


def _each_more(count: int, found: Mapping[str, float], fewer: int, of_fewer: Mapping[str, float]) -> tuple[str, str]:
    """Milliseconds and kilobytes that each candidate more has cost."""
    more = {name: (found[name] - of_fewer[name]) / (count - fewer) for name in found}
    return f"{more['seconds'] * 1000:.3f}", f"{more['bytes'] / 1000:.2f}"


if __name__ == "__main__":
    main()
