"""A run of srum-tiny that uses the cores in three ways, in turn: threads that spin while they wait, threads that sleep,
and a process per core, as the command has it by itself.

    python -m benchmarks.processes [--repeats 2] [--out runs/processes] [--set train.steps=90 ...]

Seconds of every stage by the clock (timings.json), and processor seconds of the whole command, its imports and plan
included; medians. Then whether the files of the candidates are those of one process, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
SHORT = ("rounds=1", "prompt_count=32", "train.steps=10", "eval.count=128")
LIBRARY, COMMAND = "from srum.cli import app; app()", "from srum.cli import main; main()"
WAYS = {
    "threads that spin": (LIBRARY, {}),
    "threads that sleep": (LIBRARY, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "a process per core": (COMMAND, {}),
}
MADE = ("candidates.jsonl", "regions.jsonl", "judgements.jsonl", "rewards.jsonl")


def run(folder: Path, way: str, overrides: list[str]) -> dict[str, float]:
    """Seconds by stage of a new run in ``folder``; ``processor`` is that of all its processes."""
    shutil.rmtree(folder, ignore_errors=True)
    code, environment = WAYS[way]
    own = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")} | environment
    sets = [f"--set={override}" for override in (*SHORT, *overrides)]
    command = [sys.executable, "-c", code, "run", "--config", str(CONFIG), "--out", str(folder), *sets]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=own, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = json.loads((folder / "timings.json").read_text())
    seconds = {name.rpartition("round-000/")[2]: value for name, value in taken.items() if value >= 1}
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds | {"all": sum(seconds.values()), "processor": processor}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/processes"))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
    for number in range(options.repeats):
        for way in options.ways:
            rows[way].append(run(options.out / way.replace(" ", "-"), way, options.overrides))
            print(number, way, f"load {os.getloadavg()[0]:.1f}", rows[way][-1], flush=True)
    stages = list(dict.fromkeys(stage for row in rows.values() for one in row for stage in one))
    table = Table("seconds", *stages, title=f"medians of {options.repeats}")
    for way, found in rows.items():
        table.add_row(way, *(f"{statistics.median(one.get(stage, 0.0) for one in found):.1f}" for stage in stages))
    Console(width=160).print(table)
    first, *others = (options.out / way.replace(" ", "-") / "round-000" for way in options.ways)
    for other in others:
        same = {name: (first / name).read_bytes() == (other / name).read_bytes() for name in MADE}
        print(other, "against", first, same)


if __name__ == "__main__":
    main()
