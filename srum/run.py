"""An open run: its folder, its config, its arms and their weights."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from srum import models
from srum.config import RunConfig, config_of
from srum.disk import DiskFullError
from srum.json_files import as_unicode, read_json
from srum.models.base import require
from srum.plugins import find
from srum.processes import Processes
from srum.run_dir import RunError, prompts_copy, round_dir, write_json
from srum.seeding import seed_for
from srum.stages import TRAIN, Stage

if TYPE_CHECKING:
    from srum.models.base import TrainableModel
    from srum.train.methods.base import Method

BASE = "base"  # the model that entered
REDRAWN = "-redrawn"  # ends the name of what an arm's weights draw in more than one step
console = Console()


@dataclass(frozen=True)
class Run:
    """An open run: its folder and its config."""

    folder: Path
    config: RunConfig

    @cached_property
    def method(self) -> Method:
        """What is trained, on what; its arm's weights make the next round's candidates."""
        return find_method(self.config.method)

    @property
    def pinned(self) -> RunConfig:
        """The config whose ``prompts`` are the run's own copy of the user's file, where it has one: what the rounds
        have and what is held out of them is read from that."""
        copy = prompts_copy(self.folder, self.config)
        return self.config.model_copy(update={"prompts": str(copy)}) if copy.is_file() else self.config

    @property
    def arms(self) -> dict[str, Arm]:
        """What is trained in each round on the same candidates, by the methods' names; the run's own comes last."""
        compared = [find_method(name) for name in self.config.compare]
        others = {
            m.name: Arm(m, config_of(name, self.config)) for m, name in zip(compared, self.config.compare, strict=True)
        }
        return {name: arm for name, arm in others.items() if name != self.method.name} | {
            self.method.name: Arm(self.method, self.config)
        }

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages of a round by name: those of the method, those that only a compared method has, then training."""
        of_methods = [stage for arm in reversed(self.arms.values()) for stage in arm.method.stages_of(arm.config)]
        return {stage.name: stage for stage in [*of_methods, TRAIN]}

    def seed(self, *parts: int | str) -> int:
        """The seed of what ``parts`` name, such as (round, record id, purpose)."""
        return seed_for(self.config.seed, *parts)

    def newest(self, k: int) -> str:
        """The weights that make and judge the candidates of round ``k``: those of the run's own arm."""
        return self.weights(self.method.name, k)

    def named(self, k: int, what: str) -> str:
        """What is done in round ``k``, as people count rounds: "round 1/4 - judge"."""
        return f"round {k + 1}/{self.config.rounds} - {what}"

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
class Arm:
    """A method with the config that it has in this run."""

    method: Method
    config: RunConfig


def newest_weights(run: Run) -> str:
    """Those of the run's own arm after the last round that it was trained in; else the model that entered."""
    done = [k for k in range(run.config.rounds) if (run.train_dir(run.method.name, k) / "model").is_dir()]
    return run.newest(max(done) + 1 if done else 0)


def find_method(name: str) -> Method:
    """The method of that name, or ``module:Name``. Raises PluginError."""
    method: Method = find("method", name)()
    return method


def load_model(
    config: RunConfig, weights: str, dtype: torch.dtype | None = None, empty: bool = False
) -> TrainableModel:
    """The model with these weights, or still ``empty`` (``models.load``), on the device, compiled, as the config says.

    Its weights are ``dtype``, by default what drawing and writing hold them in (``models.held_dtype``).

    Raises RunError where several processes would share that device, and MissingAbility where it cannot be compiled.
    """
    if Processes.here().count > 1 and (config.device == "spread" or ":" in config.device):
        raise RunError(f"device: every process needs a GPU of its own, not {config.device}; use auto or cuda")
    if config.compile or Processes.here().count > 1:
        gc.collect()  # the model before it, compiled or sharded, is a cycle and would keep its memory
    held = models.held_dtype(config.device) if dtype is None else dtype
    model = models.load(weights, config.device, held, empty)
    if config.compile:
        require(model, {"compile"}, "compile=true")
        model.compile()
    return model


class StageTimer:
    """Seconds per stage, added up over errors and interruptions short of a kill, in ``timings.json``; what is timed
    within a stage is not counted to it again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to ``name``."""
        start, before = time.perf_counter(), sum(self._seconds().values())
        try:
            yield
        except DiskFullError:
            raise  # and no room for this
        except BaseException:
            self._add(name, start, before)
            raise
        self._add(name, start, before)

    def _add(self, name: str, start: float, before: float) -> None:
        seconds = self._seconds()
        own = time.perf_counter() - start - (sum(seconds.values()) - before)
        write_json(self.path, seconds | {name: round(seconds.get(name, 0.0) + max(0.0, own), 3)})

    def _seconds(self) -> dict[str, float]:
        kept = read_json(self.path).items() if self.path.exists() else ()
        return {as_unicode(stage): value for stage, value in kept if isinstance(value, int | float)}
