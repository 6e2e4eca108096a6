"""How well the judge tells right from wrong, and how long it takes, for each way of getting a score out of it.

    python benchmarks/judge.py --out runs/judge [--set prompt_count=96] [--set model=...]

The candidates of round 0 and their regions are made once, in ``--out``; each way then judges all of them, and is
compared with the truth of the embedded world (``srum.evaluation.judge_quality``):

    decoded          the number that the model writes
    constrained      the same, and replies that cannot be read go on with a forced score line
    decoded, soft    the expectation over the score behind what the model writes (the default)
    short, soft      the same, and nothing is written behind it: no reasons
    soft             the expectation over the score alone: one forward pass, nothing is decoded

AUROC times 100 over what has a score, failures beside it; ``judge.json`` says how many were right and wrong. Times
are of the judge alone, in milliseconds of the processor for one candidate with all its questions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from srum.config import load_config, parse_config
from srum.evaluation.judge_quality import JudgeQuality, Separation, judge_quality
from srum.images import open_image
from srum.judging.stage import load_judge
from srum.loop import perform
from srum.records import Candidate, Grounding, Judgement, Prompt
from srum.run import Run, console
from srum.run_dir import claim_run, read_records, write_json

WAYS: dict[str, dict[str, Any]] = {
    "decoded": {"soft": False, "reply": "free"},
    "constrained": {"soft": False, "reply": "constrained"},
    "decoded, soft": {"soft": True, "reply": "free"},
    "short, soft": {"soft": True, "reply": "short"},
    "soft": {"soft": True, "reply": "none"},
}


@dataclass(frozen=True)
class Measured:
    """One way: milliseconds per candidate, and its quality."""

    milliseconds: float
    quality: JudgeQuality


def measure(run: Run, way: Mapping[str, Any]) -> Measured:
    """Judge the candidates of round 0 in this way."""
    folder, size = run.round(0), run.config.judge.batch_size
    config = parse_config(run.config.model_dump() | {"judge": run.config.judge.model_dump() | way})
    judge = load_judge(config, config.model, config.seed)
    candidates = read_records(folder / "candidates.jsonl", Candidate)
    groundings = read_records(folder / "regions.jsonl", Grounding)
    images = [open_image(folder / candidate.image) for candidate in candidates]
    judge.judge(images[:1], [candidates[0].prompt], [groundings[0].regions])  # what is done once is not timed
    said, start = [], time.process_time()
    for first in range(0, len(candidates), size):
        batch = slice(first, first + size)
        prompts = [candidate.prompt for candidate in candidates[batch]]
        said += judge.judge(images[batch], prompts, [grounding.regions for grounding in groundings[batch]])
    seconds = time.process_time() - start
    judgements = [
        Judgement(candidate_id=candidate.id, regions=regions, layout=layout)
        for candidate, (regions, layout) in zip(candidates, said, strict=True)
    ]
    metadata = {prompt.id: prompt.metadata for prompt in read_records(folder / "prompts.jsonl", Prompt)}
    quality = judge_quality(candidates, groundings, judgements, metadata, images)
    return Measured(1000 * seconds / len(candidates), quality)


def table_of(found: Mapping[str, Measured]) -> Table:
    """A row for each way; how many times as fast as decoding it is."""
    decoded = found["decoded"].milliseconds
    table = Table("score", "ms", "times as fast", "regions", "background", "layout", title="AUROC")
    for name, measured in found.items():
        parts = (measured.quality.regions, measured.quality.background, measured.quality.layout)
        speed = f"{measured.milliseconds:.1f}", f"{decoded / measured.milliseconds:.1f}"
        table.add_row(name, *speed, *(_cell(part) for part in parts))
    return table


def _cell(part: Separation) -> str:
    auroc = "-" if part.auroc is None else f"{100 * part.auroc:.1f}"
    return f"{auroc} ({part.failures} failed)" if part.failures else auroc


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it to ``judge.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run that holds the candidates")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override of the config")
    args = parser.parse_args(argv)
    run = Run(args.out, load_config(None, args.set))
    claim_run(run.folder, run.config, resume=True)
    for stage in ("rollout", "ground"):
        perform(run, stage, 0)
    found = {name: measure(run, way) for name, way in WAYS.items()}
    write_json(args.out / "judge.json", {name: asdict(measured) for name, measured in found.items()})
    console.print(table_of(found))


if __name__ == "__main__":
    main()
