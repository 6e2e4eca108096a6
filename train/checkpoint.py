"""Checkpoints of a training run: ``step-00000050/`` with weights, optimiser and facts.

A checkpoint appears by the rename of a complete folder, so whichever exists is whole. The last two are kept. The last
step's has no optimiser: nothing follows it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

KEPT = 2

Identity = Mapping[str, str]


class CheckpointMismatch(ValueError):
    """The folder holds the checkpoints of another training run."""


def save_checkpoint(
    folder: Path, step: int, identity: Identity, parameters: Mapping[str, Tensor], optimizer: Optimizer | None
) -> None:
    """Write the state after ``step`` steps and drop all but the last two checkpoints.

    ``identity`` names what the run depends on (config, seed, data, model): part -> digest.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    save_file(weights, partial / "weights.safetensors")
    if optimizer is not None:
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps({"step": step, "identity": dict(identity)}))
    for path in partial.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    partial.rename(final)
    for old in list_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def resume(folder: Path, identity: Identity, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> int:
    """Load the newest checkpoint into the parameters and the optimiser; the number of steps done (0: there is none).

    Raises CheckpointMismatch where the checkpoint's run and this one differ. A finished run takes any model: its
    weights are all there.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    state = json.loads((newest / "state.json").read_text())
    finished = not (newest / "optimizer.pt").exists()
    differing = [name for name, digest in identity.items() if state["identity"].get(name) != digest]
    if set(differing) - ({"model"} if finished else set()):
        raise CheckpointMismatch(
            f"{newest} belongs to another training run (different: {', '.join(differing)}); "
            "pass what the run was started with, or use another folder"
        )
    with torch.no_grad():
        for name, weight in load_file(newest / "weights.safetensors").items():
            parameters[name].copy_(weight)
    if not finished:
        optimizer.load_state_dict(torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True))
    return int(state["step"])
