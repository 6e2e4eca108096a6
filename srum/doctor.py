"""What ``srum doctor`` says of a checkpoint: its files, what fits on this machine, whether it computes as it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from srum.disk import GIGABYTE
from srum.errors import ModelError
from srum.models import Architecture, architecture, find_device, native_bfloat16
from srum.models.base import FlowForward, Sampling, Segment, UnifiedModel, require
from srum.models.needs import BFLOAT, FLOAT, Need, Recipe

CONTAINER = Path("/sys/fs/cgroup")  # where the system tells of it
LIMITS = {
    ".": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}  # of control groups, second and first version: how much it may have, what it has, and what of that are files to drop
PROCESSES = [2**n for n in range(7)]  # that may share a training
CHECKED = frozenset({"velocity", "path"})  # abilities of models that can be asked
CHECK = Sampling(timesteps=2, guidance=1.0)  # a single step from noise
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # of the self-check, relative to the largest velocity


@dataclass(frozen=True)
class Machine:
    """Where the model would run; ``memory`` in bytes, what is free now."""

    device: torch.device
    name: str
    memory: int
    bfloat16: bool

    @classmethod
    def here(cls, device: torch.device | str = "auto") -> Machine:
        """What ``srum.models.load`` means by ``device``, and raises; "spread" is all GPUs and the host."""
        found = find_device(device)
        if found.type == "cuda":
            gpus = range(torch.cuda.device_count()) if device == "spread" else [found]
            free = sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
            free += _available_memory() if device == "spread" else 0
            return cls(found, torch.cuda.get_device_name(found), free, native_bfloat16(found))
        name = f"CPU, {torch.get_num_threads()} threads" if found.type == "cpu" else found.type
        return cls(found, name, _available_memory(), native_bfloat16(found))


def _available_memory() -> int:
    """What the system says a new process can have, in bytes, at most what is left to a container; 0 where it says
    nothing."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for place, names in LIMITS.items():
        with suppress(OSError, ValueError):  # no such file; "max" is no limit
            found.append(_left(CONTAINER / place, *names))
    return max(0, min(found)) if found else 0


def _left(folder: Path, limit: str, used: str, dropped: str) -> int:
    """What a container may still have, in bytes. Raises OSError or ValueError where it may have all."""
    files = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int((folder / limit).read_text()) - int((folder / used).read_text()) + int(files.get(dropped, 0))


def asked(folder: Path) -> Architecture:
    """Who knows the folder. Raises ModelError for a user's class that cannot be asked."""
    model = architecture(folder)
    if lacks := [name for name in ("describe", "memory", "training_memory") if not hasattr(model, name)]:
        raise ModelError(f"{folder}: its class has none of which the doctor asks: {', '.join(lacks)}")
    return model


def usual_side(folder: Path, machine: Machine) -> int:
    """The side of the model's usual images in pixels."""
    return asked(folder).describe(folder, machine.device, machine.bfloat16).side


def tables(folder: Path, machine: Machine, size: tuple[int, int]) -> Iterator[Table]:
    """What was found, and what fits, for images of (H, W) pixels. Nothing but headers is read.

    Raises ModelError as loading does.
    """
    model = asked(folder)
    yield _rows(str(folder), model.describe(folder, machine.device, machine.bfloat16).rows)
    yield _machine(machine)
    yield _fits(model.memory(folder, size, machine.bfloat16), machine, size)
    yield _fits_shared(partial(model.training_memory, folder, size, machine.bfloat16), machine)


def _rows(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return table


def _machine(machine: Machine) -> Table:
    computes = "bfloat16" if machine.bfloat16 else "float32"
    free = f"{machine.memory / GIGABYTE:.1f} GB free"
    return _rows("this machine", {str(machine.device): machine.name, "memory": free, "computes in": computes})


def _fits(needs: Mapping[str, Need], machine: Machine, size: tuple[int, int]) -> Table:
    title = f"what fits, images of {size[0]}x{size[1]} px (an estimate)"
    table = Table("stage", "once, GB", "per image, GB", "images at a time", title=title, title_justify="left")
    for stage, need in needs.items():
        count = need.images(machine.memory)
        numbers = f"{need.once / GIGABYTE:.3f}", f"{need.per_image / GIGABYTE:.4f}"
        table.add_row(stage, *numbers, f"{count:,}" if count else "[red]does not fit[/red]")
    return table


def _fits_shared(need_of: Callable[[Recipe], Need], machine: Machine) -> Table:
    """The fewest processes, each with a device such as this one, that train with one image in a pack or more."""
    title = "training shared by processes with this memory each, activations recomputed (an estimate)"
    table = Table("training", "processes", "once, GB", "images at a time", title=title, title_justify="left")
    saving = Recipe(frozen=BFLOAT if machine.bfloat16 else FLOAT, recompute=True)
    for name, recipe in {
        "LoRA of rank 64": replace(saving, lora_rank=64),
        "generation expert": saving,
        "all weights": replace(saving, everything=True),
    }.items():
        for count in PROCESSES:
            need = need_of(replace(recipe, processes=count))
            if images := need.images(machine.memory):
                table.add_row(name, str(count), f"{need.once / GIGABYTE:.3f}", f"{images:,}")
                break
        else:
            table.add_row(name, f"[red]more than {PROCESSES[-1]}[/red]")
    return table


def self_check(model: UnifiedModel, size: tuple[int, int], bfloat16: bool) -> tuple[float, float]:
    """Largest deviation between the two ways to one velocity, relative to its largest value, and what is tolerated.

    One way is the packed forward pass that training takes, here in ``bfloat16`` where the model computes in that, the
    other a denoising step over the cached prompt. Raises MissingAbility for a model that cannot be asked.
    """
    require(model, CHECKED, "the self-check")
    prompt = Segment("text", text="a red circle above a blue square")
    (made,) = model.draw([[prompt]], CHECK, [0], sizes=[size], path=True)
    assert made.path is not None
    x_t, cached = (model.tokens(of_step[0]) for of_step in (made.path.states, made.path.velocities))
    noisy = Segment("noisy", state=(x_t, made.path.timesteps[0].item()), grid=model.latent_grid(size), loss=True)
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
        forward = model.forward(model.pack([[prompt, noisy]], []))
    assert isinstance(forward, FlowForward)
    packed = forward.velocity.cpu()
    return float((packed - cached).abs().max() / cached.abs().max()), TOLERANCE["bf16" if bfloat16 else "fp32"]
