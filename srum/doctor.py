"""What ``srum doctor`` says of a checkpoint: its files, what fits on this machine, whether it computes as it should."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from srum.flow import FlowNoise
from srum.models import find_device, native_bfloat16
from srum.models.bagel import Bagel
from srum.models.bagel.checkpoint import TOKENIZER_FILES, weight_files
from srum.models.bagel.config import BagelConfig
from srum.models.bagel.memory import BFLOAT, FLOAT, Recipe, Sizes, stage_needs, training_need
from srum.models.base import Sampling, Segment
from srum.tensors import open_tensors

GIGABYTE = 1e9
PROCESSES = [2**n for n in range(7)]  # that may share a training
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

    @property
    def attention(self) -> dict[str, str]:
        """Which attention each kind of pass takes (``srum.models.bagel.network.attend``)."""
        fused = "scaled_dot_product_attention"
        if self.device.type == "cuda":
            return {"inference": fused, "training": f"{fused}, long rows compiled flex_attention"}
        if self.bfloat16:
            return {"inference": f"explicit scores, long rows {fused}", "training": "explicit scores"}
        return {"inference": fused, "training": fused}


def _available_memory() -> int:
    """What the system says a new process can have, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else 0


def tables(folder: Path, machine: Machine, size: tuple[int, int]) -> Iterator[Table]:
    """What was found, and what fits, for images of (H, W) pixels. Nothing but headers is read.

    Raises ModelError as loading does.
    """
    config = BagelConfig.from_folder(folder)
    sizes = Sizes.of(config)
    yield _found(folder, config, sizes)
    yield _machine(machine)
    yield _fits(config, sizes, machine, size)
    yield _fits_shared(config, sizes, machine, size)


def _found(folder: Path, config: BagelConfig, sizes: Sizes) -> Table:
    table = Table(title=str(folder), title_justify="left", show_header=False)
    types: Counter[str] = Counter()
    for path in (*weight_files(folder), folder / "ae.safetensors"):
        with open_tensors(path) as tensors:
            names = list(tensors.keys())
            types.update(tensors.get_slice(name).get_dtype() for name in names)
        table.add_row(path.name, f"{path.stat().st_size / GIGABYTE:.3f} GB, {len(names)} tensors")
    lost = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    table.add_row("tokenizer", f"without {', '.join(lost)}" if lost else "complete")
    table.add_row("types on disk", ", ".join(f"{kind} ({count})" for kind, count in sorted(types.items())))
    llm = config.llm
    shape = f"{llm.num_hidden_layers} layers, width {llm.hidden_size}, {llm.num_attention_heads} heads"
    table.add_row("network", f"{sizes.network / 1e6:,.1f} million parameters: {shape}")
    table.add_row("generation expert", f"{sizes.generation / 1e6:,.1f} million of them")
    table.add_row("autoencoder", f"{sizes.autoencoder / 1e6:,.1f} million parameters")
    table.add_row("latent token", f"{config.pixels_per_token} px square, {config.latent_dim} numbers")
    return table


def _machine(machine: Machine) -> Table:
    table = Table(title="this machine", title_justify="left", show_header=False)
    table.add_row(str(machine.device), machine.name)
    table.add_row("memory", f"{machine.memory / GIGABYTE:.1f} GB free")
    table.add_row("computes in", "bfloat16" if machine.bfloat16 else "float32")
    for kind, path in machine.attention.items():
        table.add_row(f"attention, {kind}", path)
    return table


def _fits(config: BagelConfig, sizes: Sizes, machine: Machine, size: tuple[int, int]) -> Table:
    title = f"what fits, images of {size[0]}x{size[1]} px (an estimate)"
    table = Table("stage", "once, GB", "per image, GB", "images at a time", title=title, title_justify="left")
    for stage, need in stage_needs(config, sizes, size, machine.bfloat16).items():
        count = need.images(machine.memory)
        numbers = f"{need.once / GIGABYTE:.3f}", f"{need.per_image / GIGABYTE:.4f}"
        table.add_row(stage, *numbers, f"{count:,}" if count else "[red]does not fit[/red]")
    return table


def _fits_shared(config: BagelConfig, sizes: Sizes, machine: Machine, size: tuple[int, int]) -> Table:
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
            need = training_need(config, sizes, size, machine.bfloat16, replace(recipe, processes=count))
            if images := need.images(machine.memory):
                table.add_row(name, str(count), f"{need.once / GIGABYTE:.3f}", f"{images:,}")
                break
        else:
            table.add_row(name, f"[red]more than {PROCESSES[-1]}[/red]")
    return table


def self_check(model: Bagel, size: tuple[int, int]) -> tuple[float, float]:
    """Largest deviation between the two ways to one velocity, relative to its largest value, and what is tolerated.

    One way is the packed forward pass that training takes, the other a denoising step over the cached prompt.
    """
    prompt, (noise,) = "a red circle above a blue square", model.noise([0], [size])
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    latent = torch.zeros(
        model.config.autoencoder.z_channels, *(n * model.config.latent_patch_size for n in model.latent_grid(size))
    )
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=model.precision == "bf16"):
        contexts, _ = model.generation_contexts([prompt], None, [0])
        model.denoise(contexts, [noise], [size], CHECK, steps)
        sample = [Segment("text", text=prompt), Segment("noisy", latent=latent, loss=True)]
        packed = model.forward(model.pack([sample], [FlowNoise(noise, 1.0)])).velocity
    ((_, cached),) = steps
    return float((packed - cached).abs().max() / cached.abs().max()), TOLERANCE[model.precision]
