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

from srum.disk import writing
from srum.run_dir import write_text

TIMESTEP_BINS = 4


def image_sums(terms: dict[str, Tensor], credit: Tensor, t: Tensor) -> Tensor:
    """What ``step_means`` needs of a pack's image tokens, to be added over packs and processes; float64, on the CPU.

    ``terms`` of the objective, ``credit`` and ``t`` in [0, 1]: (N,) each.
    """
    rows = torch.stack([*terms.values(), credit]).detach().double()
    bins = one_hot((t * TIMESTEP_BINS).long().clamp(max=TIMESTEP_BINS - 1), TIMESTEP_BINS).double()
    return torch.cat([rows.sum(dim=1), rows[:-1].sum(dim=0) @ bins, bins.sum(dim=0)]).cpu()


def text_sums(terms: dict[str, Tensor]) -> Tensor:
    """The same of the text tokens, terms (M,) each."""
    return torch.stack([*terms.values()]).detach().double().sum(dim=1).cpu()


def step_means(images: Tensor, texts: Tensor, names: tuple[list[str], list[str]], text_tokens: int) -> dict[str, Any]:
    """Means over the tokens: the loss, its parts by ``names``, the credit, and the images' loss by timestep.

    The loss is the mean over image tokens and that over text tokens, added; parts of a kind of which there is no token
    are left out. The loss by timestep is that in each quarter of the range, from clean to noise; None where no token
    fell.
    """
    losses, counts = images[-2 * TIMESTEP_BINS :].view(2, TIMESTEP_BINS).tolist()
    of_images, of_texts = names
    parts: dict[str, float] = {}
    credit = None
    if tokens := sum(counts):
        *means, credit = (images[: -2 * TIMESTEP_BINS] / tokens).tolist()
        parts |= zip(of_images, means, strict=True)
    if text_tokens:
        for name, mean in zip(of_texts, (texts / text_tokens).tolist(), strict=True):
            parts[name] = parts.get(name, 0.0) + mean  # a method may call a part of both kinds the same
    return {
        "loss": sum(parts.values()),
        "parts": parts,
        "mean_credit": credit,
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
    with writing(path), path.open("a") as file:
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
