"""Unified models behind one protocol (``srum.models.base``). ``load`` finds one by name or folder.

An architecture is a folder here; a user's own model is a class in a module of theirs, ``module:Name``.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import snapshot_download

from srum.errors import ModelError
from srum.json_files import read_json
from srum.models.base import TrainableModel, UnifiedModel
from srum.models.needs import Need, Recipe
from srum.plugins import find as find_plugin
from srum.processes import Processes

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's numbers for mallopt
# What oneDNN, and torch in front of it, keep of every shape of a bfloat16 product: 0.5 MB, of 1,024 shapes by default.
SHAPES_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
EMBEDDED = {"srum-tiny": Path(__file__).parent / "tiny"}
# What marks a folder, a file, or one with a ``model_type`` or ``_class_name`` that begins so: the module that loads it.
ARCHITECTURES = {
    "llm_config.json": "srum.models.bagel",
    "config.json:blip3o": "srum.models.blip3o",
    "config.json:Showo": "srum.models.showo",
    "internvl3/config.json": "srum.models.openuni",
    "config.json:harmon": "srum.models.harmon",
    "kl16.safetensors": "srum.models.harmon",
    "kl16.ckpt": "srum.models.harmon",  # which is refused, with what to do
}
# What is to be known of published weights before they are fetched.
TERMS = {
    "BLIP3o/BLIP3o-Model-8B": "tagged apache-2.0, as is its language model; its decoder is BAAI's, of terms of its own",
    **dict.fromkeys(
        ("showlab/show-o", "showlab/show-o-512x512", "showlab/show-o-w-clip-vit", "showlab/show-o-w-clip-vit-512x512"),
        "its code is Apache 2.0; of the weights' own licence its page on the hub tells",
    ),
    "BLIP3o/BLIP3o-Model-4B": "tagged apache-2.0; its language model has Qwen's research licence: nothing commercial",
    "wusize/Harmon-0_5B": "NTU's S-Lab License 1.0: nothing commercial",
    "wusize/Harmon-1_5B": "NTU's S-Lab License 1.0: nothing commercial",
}
CLASS = "model_class.json"  # marks the folder of a user's own model, and names its class


class Description(NamedTuple):
    """What a folder holds and how it would run, line by line, and the side of its usual images in pixels."""

    rows: dict[str, str]
    side: int


class Architecture(Protocol):
    """A module that loads folders, and that ``srum doctor`` asks."""

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype, *, spread: bool, empty: bool) -> Any:
        """The model with its weights as ``dtype``; ``spread`` over several devices; ``empty``: without storage yet."""
        ...

    def describe(self, folder: Path, device: torch.device, bfloat16: bool) -> Description:
        """Reads headers alone; raises as ``load`` does."""
        ...

    def memory(self, folder: Path, size: tuple[int, int], bfloat16: bool) -> dict[str, Need]:
        """What each stage needs for images of (H, W) pixels."""
        ...

    def training_memory(self, folder: Path, size: tuple[int, int], bfloat16: bool, recipe: Recipe) -> Need:
        """What each process of such a training needs."""
        ...


def load(
    name: str | Path, device: str | torch.device = "auto", dtype: torch.dtype = torch.float32, empty: bool = False
) -> TrainableModel:
    """The model of a folder, or one by name (:func:`find`); or of a class ``module:Name``, or of an entry point of the
    group ``srum.models``, with the weights that it begins with.

    ``device``: one of torch's; "auto" is CUDA where there is one, else the CPU; "spread" puts the layers on all GPUs,
    into the host's memory and then on disk, to sample and judge with what no GPU holds alone. On a CPU that multiplies
    bfloat16 natively, and on CUDA, the network computes in bfloat16, whatever the ``dtype`` of its weights; on a CPU
    the process keeps the memory that it frees (:func:`keep_memory`). ``empty``: without its weights, which training
    reads once it knows what this process keeps of them (``read_weights``). Raises ModelError or PluginError where there
    is no such model, ModelError as :func:`find_device` does.
    """
    loader, folder = _located(name)
    if terms := getattr(loader, "TERMS", ""):
        say(f"{name}: {terms}")
    place = find_device(device)
    if place.type == "cpu":
        keep_memory()
    model: TrainableModel = loader.load(folder, place, dtype, spread=device == "spread", empty=empty)
    return model


@cache
def say(line: str) -> None:
    """Once, on what is not the result."""
    if Processes.here().rank == 0:
        print(line, file=sys.stderr)


def require_model(name: str | Path) -> None:
    """Raises what :func:`load` would raise where there is no such model. A repository of the hub is fetched."""
    _located(name)


def settled(config: Any) -> Any:
    """A ``RunConfig`` as the architecture of its model takes it: ``settle`` of its module, where it has one. Raises
    ConfigError for settings that it cannot follow (``refuse``)."""
    loader, _ = _located(config.model)
    if hasattr(loader, "refuse"):
        loader.refuse(config)
    return loader.settle(config) if hasattr(loader, "settle") else config


def architecture(folder: Path) -> Architecture:
    """Who loads the folder. Raises ModelError where nothing marks it."""
    if (folder / CLASS).is_file():
        user: Architecture = find_plugin("model", _class_of(folder), {})
        return user
    if (ours := shipped_architecture(folder)) is None:
        raise ModelError(_no_model(folder))
    return ours


def _no_model(folder: Path) -> str:
    """Why a folder is no model: it is a run's, or has no file that marks one."""
    if (folder / "config.yaml").is_file():
        weights = max(folder.glob("round-*/train/*/model"), default=folder / "round-000/train/METHOD/model")
        return f"{folder} is no model but a run: its weights are in {weights}"
    markers: dict[str, list[str]] = {}
    for marker, module in ARCHITECTURES.items():
        name, _, kind = marker.partition(":")
        markers.setdefault(module.rpartition(".")[2], []).append(f"{name} of type {kind}..." if kind else name)
    ours = "; ".join(f"{name}: {' or '.join(files)}" for name, files in markers.items())
    return f"{folder} is no model: it has no file that marks one ({ours}; a class of yours: {CLASS})"


def shipped_architecture(folder: Path) -> Any:
    """The module that loads the folder; None where none of ``ARCHITECTURES`` marks it."""
    module = next((module for marker, module in ARCHITECTURES.items() if _marks(marker, folder)), None)
    return module and import_module(module)


def _class_of(folder: Path) -> str:
    name = read_json(folder / CLASS).get("model")
    if not isinstance(name, str):
        raise ModelError(f"{folder / CLASS} names no class: expected 'model' with module:Name")
    return name


def mark(folder: Path, model: UnifiedModel) -> None:
    """Have a folder that ``model`` was saved in say which class loads it, where no file of an architecture does."""
    if not any(_marks(marker, folder) for marker in ARCHITECTURES):
        kind = type(model)
        (folder / CLASS).write_text(json.dumps({"model": f"{kind.__module__}:{kind.__qualname__}"}) + "\n")


def _marks(marker: str, folder: Path) -> bool:
    name, _, kind = marker.partition(":")
    if not (folder / name).is_file():
        return False
    values = read_json(folder / name) if kind else {}
    return not kind or any(str(values.get(field)).startswith(kind) for field in ("model_type", "_class_name"))


def _located(name: str | Path) -> tuple[Any, Path | None]:
    """Who loads a model, and its folder; a user's class has none to begin with."""
    text = str(name)
    if not Path(name).is_dir() and (":" in text or text in entry_points(group="srum.models").names):
        return find_plugin("model", text, {}), None
    folder = find(name)
    return architecture(folder), folder


def find_device(name: str | torch.device = "auto") -> torch.device:
    """The device of this machine that ``name`` means in :func:`load`; of "spread", where all but the layers goes.

    Raises ModelError for a device that is not here.
    """
    if name in ("auto", "spread"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        here = torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError):  # none of torch's, or one without a module that counts its devices
        raise ModelError(f"device: {name!r} is none to work on, as auto, spread, cpu, cuda:1 are") from None
    if (device.index or 0) >= here:
        raise ModelError(f"device: {name} is not here, this machine has {here} of that type; auto takes the best")
    return device


def find(name: str | Path) -> Path:
    """The folder of a model: of a shipped one, itself, or the local copy of a hub repository, fetched if need be.

    Raises ModelError where there is none.
    """
    folder = EMBEDDED.get(str(name), Path(name))
    if folder.is_dir():
        return folder
    if HUB_ID.fullmatch(str(name)):
        if terms := TERMS.get(str(name)):
            say(f"{name}: {terms}")
        try:
            return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.txt"]))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"no folder {str(name)!r}, and none from the hub: {reason}") from None
    raise ModelError(f"no model {str(name)!r}: give a checkpoint folder, one of {', '.join(EMBEDDED)}, or module:Name")


def native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware: CUDA since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def held_dtype(device: str | torch.device) -> torch.dtype:
    """What weights that only draw and write are held in: bfloat16 on CUDA that computes in it, where float32 beside
    its copies would take three times as much, 88 GB of BAGEL-7B; else float32. Raises as :func:`find_device` does."""
    place = find_device(device)
    return torch.bfloat16 if place.type == "cuda" and native_bfloat16(place) else torch.float32


def keep_memory() -> None:
    """Have Linux's C library keep the memory of freed tensors, up to 2 GiB at a time, for the tensors that follow.

    Left alone it returns large blocks to the system, which clears every page of the next one: a quarter of the time of
    a layer of width 512, 3 to 15% of a rollout (docs/performance.md). Does nothing where the library is another one.

    What is kept of the shapes of products is bounded, since texts have new ones in every batch: unless the environment
    says how much, and where no such product was run before.
    """
    for name, shapes in SHAPES_KEPT.items():
        os.environ.setdefault(name, shapes)
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(MMAP_THRESHOLD, 2**30)
        library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
