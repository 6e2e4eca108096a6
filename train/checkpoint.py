"""Checkpoints of a training run: ``step-00000050/`` with tensors (torch.distributed.checkpoint) and facts.

Every process writes its own part, and reads whatever part it needs, so that a run goes on with another number of
processes. A checkpoint appears by the rename of a complete folder: whichever exists is whole. The last two are kept.
The last step's has no optimiser: nothing follows it. One that was damaged afterwards is passed over.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn import Parameter
from torch.optim import Optimizer

from srum.config import TrainConfig
from srum.disk import writing
from srum.errors import SrumError
from srum.json_files import JsonError, read_json
from srum.processes import Processes
from srum.train.muon import Muon
from srum.train.optimizer import optimizer_state, start_optimizer

KEPT = 2
MOMENTS = {"fp32": 8, "int8": 2}  # bytes per number of AdamW's two averages; muon has one, of 4

Identity = Mapping[str, str]
State = dict[str, dict[str, Any]]  # part of the state -> name of the parameter -> tensor, or tensors by name


class CheckpointMismatch(SrumError, ValueError):
    """The folder holds the checkpoints of another training run."""


def room(weights: int, moments: int, published: int, config: TrainConfig, start: int) -> int:
    """Bytes that checkpoints from step ``start`` on, and then the published weights, take beside what is there, at the
    fullest moment: of checkpoints ``KEPT`` and the one being written are there, and the last has no ``moments``."""
    every, whole = config.checkpoint_every, weights + moments
    there = min(KEPT, start // every)
    further = (config.steps - 1) // every - start // every
    sizes = [whole] * (there + min(further, KEPT + 1)) + [weights]
    fullest = max(sum(sizes[max(0, n - KEPT) : n + 1]) for n in range(there, len(sizes)))
    return max(fullest, sum(sizes[-KEPT:]) + published) - there * whole


class Checkpoints:
    """The checkpoints in ``folder`` of the run that ``identity`` names: what it depends on, part -> digest.

    ``background``: write while the training goes on, from a copy on the CPU.
    """

    def __init__(self, folder: Path, identity: Identity, processes: Processes, background: bool = False) -> None:
        self.folder, self.identity, self.processes, self.background = folder, identity, processes, background
        # a group of its own: its messages must not mix with those of the steps that go on meanwhile
        self.group = dist.new_group(backend="gloo") if processes.count > 1 else None
        self._writing: tuple[int, Future[Any]] | None = None

    def save(self, step: int, state: State, finished: bool) -> None:
        """Write the state after ``step`` steps; with ``finished`` none follow. It is there after ``complete``."""
        self.complete()
        partial = self._path(step, ".{}.partial")
        if self.processes.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            facts = {"step": step, "finished": finished, "identity": dict(self.identity)}
            with writing(partial):
                partial.mkdir(parents=True)
                with (partial / "state.json").open("w") as file:
                    json.dump(facts | {"optimizer": sorted(state.get("optimizer", ()))}, file)
                    file.flush()
                    os.fsync(file.fileno())
        self.processes.wait()
        where: dict[str, Any] = {"checkpoint_id": partial, "process_group": self.group, "no_dist": self.group is None}
        if self.background and not finished:
            with _single_process_is_fine(), writing(partial):
                written = dcp.async_save(state, **where)
            assert isinstance(written, Future)
            self._writing = step, written
        else:
            with _single_process_is_fine(), writing(partial):
                dcp.save(state, **where)
            self._appear(step)

    def complete(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._writing is not None:
            step, written = self._writing
            self._writing = None
            with writing(self._path(step)):
                written.result()
            self._appear(step)

    def _appear(self, step: int) -> None:
        """Name the checkpoint and drop all but the last."""
        self.processes.wait()
        if self.processes.rank == 0:
            self._path(step, ".{}.partial").rename(self._path(step))
            for old in list_checkpoints(self.folder)[:-KEPT]:
                shutil.rmtree(old)
        self.processes.wait()

    def _path(self, step: int, pattern: str = "{}") -> Path:
        return self.folder / pattern.format(f"step-{step:08d}")

    def resume(self, state: State, parameters: Mapping[str, Parameter], optimizer: Optimizer | Muon) -> int:
        """Load the newest checkpoint into ``state`` and the optimiser; the number of steps done (0: there is none).

        Damaged ones, newer than a whole one, go with a warning. Raises CheckpointMismatch where the checkpoint's run
        and this one differ, and where all are damaged. A finished run takes any model: its weights are all there.
        """
        newest = self.processes.once(lambda: newest_whole(self.folder))
        if newest is None:
            return 0
        facts = read_json(newest / "state.json")
        differing = [name for name, digest in self.identity.items() if facts["identity"].get(name) != digest]
        if set(differing) - ({"model"} if facts["finished"] else set()):
            raise CheckpointMismatch(
                f"{newest} belongs to another training run (different: {', '.join(differing)}); "
                f"pass what it was started with, or delete {self.folder.parent} to train anew"
            )
        if not facts["finished"]:
            start_optimizer(optimizer, {name: parameters[name] for name in facts["optimizer"]})
            state = state | {"optimizer": optimizer_state(optimizer, parameters)}
        with _single_process_is_fine():
            dcp.load(state, checkpoint_id=newest, process_group=self.group, no_dist=self.group is None)
        return int(facts["step"])


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """torch warns of every save and load outside a process group, wanted or not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, those after it removed with a warning; None where there is none at all."""
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(folder)):
        fault = _fault(path)
        if fault is None:
            for other, why in damaged.items():
                warnings.warn(
                    f"{other} is damaged ({why}) and removed; training goes on from {path.name}", stacklevel=2
                )
                shutil.rmtree(other)
            return path
        damaged[path] = fault
    if damaged:
        path, why = next(iter(damaged.items()))
        raise CheckpointMismatch(f"{path} is damaged ({why}), and so is every other; delete {folder} to train anew")
    return None


def _fault(path: Path) -> str | None:
    """What keeps a checkpoint from being loaded: files that are missing, empty or shorter than its metadata says."""
    try:
        facts = read_json(path / "state.json")
        if lacking := {"step", "finished", "identity", "optimizer"} - facts.keys():
            return f"state.json lacks {', '.join(sorted(lacking))}"
        stored = dcp.FileSystemReader(path).read_metadata().storage_data.values()
        ends = {
            name: max(s.offset + s.length for s in stored if s.relative_path == name)
            for name in {s.relative_path for s in stored}
        }
        short = [name for name, end in sorted(ends.items()) if (path / name).stat().st_size < end]
    except JsonError as error:
        return str(error).removeprefix(f"{path}/")
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, EOFError, AttributeError, LookupError, ValueError, TypeError, ImportError, pickle.UnpicklingError):
        return ".metadata is not whole"
    return f"{short[0]} is cut off" if short else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))
