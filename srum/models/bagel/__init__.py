"""BAGEL: one architecture, any size (docs/specs/bagel.md). The embedded ``srum-tiny`` is this code with a small config.

``config`` what is read from a checkpoint folder; ``positions`` fixed tables; ``network`` the weights and their forward;
``sequence`` segments to a packed batch; ``contexts``, ``cache`` keys and values of contexts; ``images`` the resize rule
and patches; ``autoencoder`` the FLUX autoencoder through diffusers; ``checkpoint`` the official file layout; ``model``
the adapter that meets ``srum.models.base.TrainableModel``; ``memory`` what fits. Here: what ``srum.models`` asks.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from srum.models import Description, native_bfloat16
from srum.models.bagel.checkpoint import TOKENIZER_FILES, weight_files
from srum.models.bagel.config import BagelConfig
from srum.models.bagel.memory import Sizes, stage_needs, training_need
from srum.models.bagel.model import Bagel
from srum.models.needs import Need, Recipe
from srum.models.precision import Precision
from srum.tensors import open_tensors

__all__ = ["Bagel", "describe", "load", "memory", "training_memory"]


def load(folder: Path, device: torch.device, dtype: torch.dtype, *, spread: bool, empty: bool) -> Bagel:
    """``Bagel.load``, computing in bfloat16 where the device multiplies it natively."""
    precision: Precision = "bf16" if native_bfloat16(device) else "fp32"
    return Bagel.load(folder, device, precision, dtype, "auto" if spread else None, empty)


def describe(folder: Path, device: torch.device, bfloat16: bool) -> Description:
    """Files, sizes and types, and which attention each kind of pass takes (``network.attend``)."""
    config = BagelConfig.from_folder(folder)
    sizes, llm = Sizes.of(config), config.llm
    rows: dict[str, str] = {}
    types: Counter[str] = Counter()
    for path in (*weight_files(folder), folder / "ae.safetensors"):
        with open_tensors(path) as tensors:
            names = list(tensors.keys())
            types.update(tensors.get_slice(name).get_dtype() for name in names)
        rows[path.name] = f"{path.stat().st_size / 1e9:.3f} GB, {len(names)} tensors"
    lost = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    shape = f"{llm.num_hidden_layers} layers, width {llm.hidden_size}, {llm.num_attention_heads} heads"
    rows |= {
        "tokenizer": f"without {', '.join(lost)}" if lost else "complete",
        "types on disk": ", ".join(f"{kind} ({count})" for kind, count in sorted(types.items())),
        "network": f"{sizes.network / 1e6:,.1f} million parameters: {shape}",
        "generation expert": f"{sizes.generation / 1e6:,.1f} million of them",
        "autoencoder": f"{sizes.autoencoder / 1e6:,.1f} million parameters",
        "latent token": f"{config.pixels_per_token} px square, {config.latent_dim} numbers",
    }
    unread = [f"{name}: {', '.join(names)}" for name, names in config.without_effect().items()]
    rows |= {"fields without effect": "; ".join(unread)} if unread else {}
    rows |= {f"attention, {kind}": taken for kind, taken in _attention(device, bfloat16).items()}
    return Description(rows, config.vae_transform.max_image_size)


def _attention(device: torch.device, bfloat16: bool) -> dict[str, str]:
    fused = "scaled_dot_product_attention"
    if device.type == "cuda":
        return {"inference": fused, "training": f"{fused}, long rows compiled flex_attention"}
    if bfloat16:
        return {"inference": f"explicit scores, long rows {fused}", "training": "explicit scores"}
    return {"inference": fused, "training": fused}


def memory(folder: Path, size: tuple[int, int], bfloat16: bool) -> dict[str, Need]:
    """``stage_needs`` of the folder's config."""
    config = BagelConfig.from_folder(folder)
    return stage_needs(config, Sizes.of(config), size, bfloat16)


def training_memory(folder: Path, size: tuple[int, int], bfloat16: bool, recipe: Recipe) -> Need:
    """``training_need`` of the folder's config."""
    config = BagelConfig.from_folder(folder)
    return training_need(config, Sizes.of(config), size, bfloat16, recipe)
