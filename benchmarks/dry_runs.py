"""What a step of each stage of BAGEL-7B takes by its presets: the rows of benchmarks/dry_runs.jsonl, and their tables.

    python -m benchmarks.dry_runs [--only PRESET:STAGE ...]     run them: about 30 s each on a free core
    python -m benchmarks.dry_runs --table                       the tables of docs/training.md, from the file

STAGE is ``rollout``, ``judge`` or a number of processes that train. Rows that are there are replaced.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srum.config import load_config
from srum.train.dry_run import Cost, DryRun, described

MODEL = "BAGEL-7B-MoT"
ROWS = Path(__file__).with_name("dry_runs.jsonl")
PRESETS = Path(__file__).parents[1] / "configs"
# in the order of their worth
WANTED = [
    "lora-1gpu:rollout", "lora-1gpu:1", "fsdp:8", "paper:8", "released:8", "lora-1gpu:8", "lora-1gpu:judge",
    "paper:rollout", "fsdp:64", "paper:64", "reca:8", "reca:64", "rvr:16", "rvr:64", "flow-grpo-lora:1", "r3:8",
    "r3:64", "released:64", "released:1",
]  # fmt: skip


def run_one(name: str) -> dict[str, Any]:
    """The row of PRESET:STAGE."""
    preset, stage = name.split(":")
    config, words = described(MODEL)
    dry = DryRun(config, load_config(PRESETS / f"bagel-7b-{preset}.yaml"), words)
    start = time.process_time()
    cost: Cost = dry.training(int(stage)) if stage.isdigit() else getattr(dry, stage)()
    return {"name": name} | vars(cost) | {"seconds": round(time.process_time() - start, 1)}


def stored() -> dict[str, dict[str, Any]]:
    """The rows by name."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def keep(row: dict[str, Any]) -> None:
    """Put a row into the file."""
    rows = stored() | {row["name"]: row}
    ROWS.write_text("".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown, a line for each."""
    names = ["preset", "stage", "processes", "a step", "tokens", "resident GB", "peak GB", "TFLOP each", "GB sent each"]
    lines = [names, ["---"] * len(names)]
    for row in rows:
        numbers = [f"{row[key] / scale:,.1f}" for key, scale in (("resident", 1e9), ("peak", 1e9))]
        sums = [f"{row['operations'] / 1e12:,.0f}", f"{row['sent'] / 1e9:,.0f}" if row["sent"] else "0"]
        stage, preset = row["stage"].partition(",")[0], row["name"].partition(":")[0]
        lines.append([preset, stage, str(row["processes"]), row["step"], f"{row['tokens']:,}", *numbers, *sums])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is wanted, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=WANTED, metavar="PRESET:STAGE")
    parser.add_argument("--table", action="store_true", help="print what is in the file")
    args = parser.parse_args(argv)
    if not args.table:
        for name in args.only:
            keep(run_one(name))
            print(stored()[name], flush=True)
    print(table([stored()[name] for name in args.only if name in stored()]))


if __name__ == "__main__":
    main()
