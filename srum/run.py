"""An open run: its folder, its config, the weights in it; and what a stage is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from srum import models
from srum.config import RunConfig
from srum.processes import Processes
from srum.run_dir import RunError, StageTimer, round_dir

if TYPE_CHECKING:
    from srum.models.bagel import Bagel

BASE, MAIN = "base", "srum"  # the model that entered; the arm whose weights make the candidates
console = Console()


@dataclass(frozen=True)
class Run:
    """An open run: its folder and its config."""

    folder: Path
    config: RunConfig

    def round(self, k: int) -> Path:
        """The folder of round ``k``."""
        return round_dir(self.folder, k)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that the block takes in process 0 to the times of the run, as ``name``."""
        if Processes.here().rank:
            yield
            return
        with StageTimer(self.folder / "timings.json").stage(name):
            yield

    def weights(self, arm: str, rounds: int) -> str:
        """The weights of ``arm`` after so many rounds: a folder, or the model that entered.

        Raises RunError where they have not been trained yet.
        """
        if arm == BASE or rounds == 0:
            return self.config.model
        folder = self.train_dir(arm, rounds - 1) / "model"
        if not folder.is_dir():
            raise RunError(f"{folder} is missing: {arm} has not been trained in round {rounds - 1}")
        return str(folder)

    def train_dir(self, arm: str, k: int) -> Path:
        """Where ``arm`` is trained in round ``k``."""
        return self.round(k) / "train" / arm


@dataclass(frozen=True)
class Stage:
    """A stage of a round: its name, also that of its command; the files NAME.jsonl that it writes; what it does.

    ``perform`` works on round k of a run; what is finished it does not do again.
    """

    name: str
    writes: tuple[str, ...]
    perform: Callable[[Run, int], None]


def load_model(config: RunConfig, weights: str, dtype: torch.dtype = torch.float32, empty: bool = False) -> Bagel:
    """The model with these weights, or still ``empty`` (``Bagel.load``), on the device and compiled as the config says.

    Raises RunError where several processes would share that device.
    """
    if Processes.here().count > 1 and (config.device == "spread" or ":" in config.device):
        raise RunError(f"device: every process needs a GPU of its own, not {config.device}; use auto or cuda")
    if config.compile or Processes.here().count > 1:
        gc.collect()  # the model before it, compiled or sharded, is a cycle and would keep its memory
    model = models.load(weights, config.device, dtype, empty)
    if config.compile:
        model.compile()
    return model
