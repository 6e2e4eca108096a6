"""Unified models behind one protocol (``srum.models.base``). ``load`` finds one by name or folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from srum.models.bagel import Bagel

EMBEDDED = {"srum-tiny": Path(__file__).parent / "tiny"}


def load(name: str | Path, device: str | torch.device | None = None) -> Bagel:
    """The embedded model by name (``srum-tiny``), or a checkpoint folder in the official layout.

    ``device`` defaults to CUDA where there is one. On a CPU that multiplies bfloat16 natively, and on CUDA, the network
    computes in bfloat16 over float32 weights. Raises FileNotFoundError for a folder that is no checkpoint.
    """
    from srum.models.bagel import Bagel

    folder = EMBEDDED.get(str(name), Path(name))
    if not folder.is_dir():
        raise FileNotFoundError(f"no model {str(name)!r}: give a checkpoint folder or one of {', '.join(EMBEDDED)}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Bagel.load(folder, device, precision="bf16" if native_bfloat16(device) else "fp32")


def native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware: CUDA since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
