"""Unified models behind one protocol (``srum.models.base``). ``load`` finds one by name or folder."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from huggingface_hub import snapshot_download

from srum.errors import ModelError

if TYPE_CHECKING:
    from srum.models.bagel import Bagel

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's numbers for mallopt
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
EMBEDDED = {"srum-tiny": Path(__file__).parent / "tiny"}


def load(
    name: str | Path, device: str | torch.device = "auto", dtype: torch.dtype = torch.float32, empty: bool = False
) -> Bagel:
    """The embedded model by name (``srum-tiny``), a checkpoint folder in the official layout, or one from the hub.

    ``device``: one of torch's; "auto" is CUDA where there is one, else the CPU; "spread" puts the layers on all GPUs,
    into the host's memory and then on disk, to sample and judge with what no GPU holds alone. On a CPU that multiplies
    bfloat16 natively, and on CUDA, the network computes in bfloat16, whatever the ``dtype`` of its weights; on a CPU
    the process keeps the memory that it frees (:func:`keep_memory`). ``empty``:
    without its weights, which training reads once it knows what this process keeps of them (``Bagel.load``). Raises
    ModelError as :func:`find` and :func:`find_device` do.
    """
    from srum.models.bagel import Bagel

    layers: Literal["auto"] | None = "auto" if device == "spread" else None
    found = find_device(device)
    if found.type == "cpu":
        keep_memory()
    return Bagel.load(find(name), found, "bf16" if native_bfloat16(found) else "fp32", dtype, layers, empty)


def find_device(name: str | torch.device = "auto") -> torch.device:
    """The device of this machine that ``name`` means in :func:`load`; of "spread", where all but the layers goes.

    Raises ModelError for a device that is not here.
    """
    if name in ("auto", "spread"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    here = torch.get_device_module(device).device_count()
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
        try:
            return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.txt"]))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"no folder {str(name)!r}, and none from the hub: {reason}") from None
    raise ModelError(f"no model {str(name)!r}: give a checkpoint folder or one of {', '.join(EMBEDDED)}")


def native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware: CUDA since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def keep_memory() -> None:
    """Have Linux's C library keep the memory of freed tensors, up to 2 GiB at a time, for the tensors that follow.

    Left alone it returns large blocks to the system, which clears every page of the next one: a quarter of the time of
    a layer of width 512, 3 to 15% of a rollout (docs/performance.md). Does nothing where the library is another one.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(MMAP_THRESHOLD, 2**30)
        library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
