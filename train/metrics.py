"""What a training run writes down: one line of JSON per step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from srum.run_dir import write_text

TIMESTEP_BINS = 4


def loss_by_timestep(t: Tensor, terms: Tensor) -> list[float | None]:
    """Mean term in each quarter of the timestep range, from clean to noise; None where no token fell.

    ``t`` (N,) in [0, 1] and ``terms`` (N,), both per token.
    """
    bins = (t * TIMESTEP_BINS).long().clamp(max=TIMESTEP_BINS - 1)
    members = [terms[bins == number] for number in range(TIMESTEP_BINS)]
    return [member.mean().item() if len(member) else None for member in members]


def keep_rows(path: Path, steps: int) -> list[dict[str, Any]]:
    """The rows of the first ``steps`` steps; later ones, a torn last line among them, leave the file to be redone."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()[:steps]
    write_text(path, "".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add the row of the next step, so that line k is step k."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
