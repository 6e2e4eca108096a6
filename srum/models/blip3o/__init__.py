"""BLIP3-o: one architecture, any size (docs/specs/blip3o.md; docs/blip3o.md says what differs from BAGEL).

``config`` what a folder says of itself; ``checkpoint`` its layout, read and written; ``language`` Qwen2.5-VL and what
it sees; ``chat`` its words; ``generator`` queries and diffusion transformer; ``tower`` images to features; ``decoder``
features to images; ``images`` pixels and frames; ``model`` the adapter that meets ``srum.models.base.TrainableModel``,
as far as ``srum.models.queries`` does not; ``memory`` what fits. Here: what ``srum.models`` asks.
"""

from __future__ import annotations

from pathlib import Path

import torch

from srum.config import RunConfig
from srum.errors import ModelError
from srum.models import Description, native_bfloat16
from srum.models.blip3o.checkpoint import read_headers, weight_files
from srum.models.blip3o.config import Blip3oConfig
from srum.models.blip3o.decoder import usual_side
from srum.models.blip3o.memory import Sizes, stage_needs, training_need
from srum.models.blip3o.model import Blip3o
from srum.models.needs import Need, Recipe
from srum.models.precision import Precision
from srum.models.queries import settings

__all__ = ["Blip3o", "describe", "load", "memory", "refuse", "training_memory"]

NO_SPREAD = "BLIP3-o's layers are not spread over devices; it fits one GPU of 40 GB (device=cuda)"


def load(folder: Path, device: torch.device, dtype: torch.dtype, *, spread: bool, empty: bool) -> Blip3o:
    """``Blip3o.load``, computing in bfloat16 where the device multiplies it natively. Raises ModelError for ``spread``:
    its parts are in memory one at a time."""
    if spread:
        raise ModelError(f"device: {NO_SPREAD}")
    precision: Precision = "bf16" if native_bfloat16(device) else "fp32"
    return Blip3o.load(folder, device, precision, dtype, empty)


def refuse(config: RunConfig) -> None:
    """Raises ConfigError for settings that would do nothing here."""
    settings.refuse(config, Blip3o.name, NO_SPREAD)


def describe(folder: Path, device: torch.device, bfloat16: bool) -> Description:
    """Files, sizes and types."""
    model = Blip3o.load(folder, device, empty=True)
    sizes, config, text = Sizes.of(model.headers), model.config, model.config.qwen.text_config
    shape = f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads"
    transformer = (
        f"{config.transformer.layers} layers, width {config.transformer.width}, {config.transformer.heads} heads"
    )
    rows = {path.name: f"{path.stat().st_size / 1e9:.3f} GB" for path in weight_files(folder)}
    rows |= {
        "types on disk": ", ".join(f"{kind} ({count})" for kind, count in sorted(model.headers.types.items())),
        "language model": f"{sizes.language / 1e6:,.1f} million parameters: {shape}",
        "diffusion transformer": f"{sizes.generator / 1e6:,.1f} million parameters: {transformer}",
        "EVA tower": f"{sizes.tower / 1e6:,.1f} million parameters" if sizes.tower else "none: it encodes no images",
        "decoder": f"{sizes.decoder(folder) / 1e9:.3f} GB",
        "features": f"{config.grid}x{config.grid} of {config.transformer.channels} numbers, for every size of image",
        "trained": "the diffusion transformer; with train.trainable=all its queries, too",
    }
    unread = config.without_effect()
    rows |= {"fields without effect": f"config.json: {', '.join(unread)}"} if unread else {}
    return Description(rows, usual_side(folder))


def memory(folder: Path, size: tuple[int, int], bfloat16: bool) -> dict[str, Need]:
    """``stage_needs`` of the folder."""
    headers = read_headers(folder)
    return stage_needs(Blip3oConfig.from_folder(folder, headers), Sizes.of(headers), folder, size, bfloat16)


def training_memory(folder: Path, size: tuple[int, int], bfloat16: bool, recipe: Recipe) -> Need:
    """``training_need`` of the folder."""
    headers = read_headers(folder)
    return training_need(Blip3oConfig.from_folder(folder, headers), Sizes.of(headers), bfloat16, recipe)
