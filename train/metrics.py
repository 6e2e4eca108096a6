"""What a training run writes down: one line of JSON per step, and per validation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from srum.run_dir import write_text

TIMESTEP_BINS = 4


def token_sums(parts: dict[str, Tensor], weight: Tensor, t: Tensor) -> Tensor:
    """What ``token_means`` needs of the tokens of a pack, to be added over packs and processes; float64, on the CPU.

    ``parts`` of the objective, ``weight`` and ``t`` in [0, 1]: (N,) each.
    """
    rows = torch.stack([*parts.values(), weight]).detach().double()
    bins = one_hot((t * TIMESTEP_BINS).long().clamp(max=TIMESTEP_BINS - 1), TIMESTEP_BINS).double()
    return torch.cat([rows.sum(dim=1), rows[:-1].sum(dim=0) @ bins, bins.sum(dim=0)]).cpu()


def token_means(sums: Tensor, names: list[str]) -> dict[str, Any]:
    """Means over the tokens: the loss, its parts by ``names``, the weight, and the loss by timestep.

    The latter in each quarter of the timestep range, from clean to noise; None where no token fell.
    """
    *parts, weight = (sums[: -2 * TIMESTEP_BINS] / (tokens := sums[-TIMESTEP_BINS:].sum())).tolist()
    losses, counts = sums[-2 * TIMESTEP_BINS :].view(2, TIMESTEP_BINS).tolist()
    return {
        "loss": (sums[-2 * TIMESTEP_BINS : -TIMESTEP_BINS].sum() / tokens).item(),
        "parts": dict(zip(names, parts, strict=True)),
        "mean_weight": weight,
        "loss_by_timestep": [loss / count if count else None for loss, count in zip(losses, counts, strict=True)],
    }


def keep_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The first ``count`` rows; later ones, a torn last line among them, leave the file to be written again."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()[:count]
    write_text(path, "".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row, so that line k is the k-th."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@dataclass(frozen=True)
class Log:
    """Files of rows, ``NAME.jsonl`` in ``folder``; where that is None, another process writes them.

    ``tell`` hears of every row that is added, with its name.
    """

    folder: Path | None
    tell: Callable[[str, dict[str, Any]], None] | None = None

    def keep(self, name: str, count: int) -> list[dict[str, Any]]:
        """The first ``count`` rows, which alone stay in the file."""
        return keep_rows(self.folder / f"{name}.jsonl", count) if self.folder else []

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a row."""
        if self.folder:
            append_row(self.folder / f"{name}.jsonl", row)
        if self.tell:
            self.tell(name, row)
