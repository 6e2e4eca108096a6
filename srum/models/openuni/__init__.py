"""OpenUni: one architecture, any size (docs/specs/openuni.md; docs/openuni.md says how to put a folder together).

``config`` what a folder says of itself; ``checkpoint`` its layout, read and written; ``language`` InternVL3 and what it
sees; ``chat`` its words; ``generator`` queries, connector and Sana's transformer; ``solver`` its sampler; ``images``
pixels; ``model`` the adapter that meets ``srum.models.base.TrainableModel``, as far as ``srum.models.queries`` does
not; ``memory`` what fits. Here: what ``srum.models`` asks.
"""

from __future__ import annotations

from pathlib import Path

import torch

from srum.config import RunConfig
from srum.errors import ModelError
from srum.models import Description, native_bfloat16
from srum.models.needs import Need, Recipe
from srum.models.openuni.checkpoint import WEIGHTS, read_headers
from srum.models.openuni.config import OpenUniConfig
from srum.models.openuni.memory import Sizes, stage_needs, training_need
from srum.models.openuni.model import OpenUni
from srum.models.precision import Precision
from srum.models.queries import settings

__all__ = ["TERMS", "OpenUni", "describe", "load", "memory", "refuse", "renamed", "training_memory"]

TERMS = "OpenUni has NTU's S-Lab License 1.0: nothing commercial; InternVL3, Qwen2.5 and Sana have terms of their own"
NO_SPREAD = "OpenUni's layers are not spread over devices; its parts fit one GPU (device=cuda)"


def load(folder: Path, device: torch.device, dtype: torch.dtype, *, spread: bool, empty: bool) -> OpenUni:
    """``OpenUni.load``, computing in bfloat16 where the device multiplies it natively. Raises ModelError for
    ``spread``: its parts are in memory one at a time."""
    if spread:
        raise ModelError(f"device: {NO_SPREAD}")
    precision: Precision = "bf16" if native_bfloat16(device) else "fp32"
    return OpenUni.load(folder, device, precision, dtype, empty)


def refuse(config: RunConfig) -> None:
    """Raises ConfigError for settings that would do nothing here."""
    settings.refuse(config, OpenUni.name, NO_SPREAD)


def renamed(pickle: Path) -> str:
    """What a pickle of a folder is called as safetensors: the authors' file has a name for each of its trainings."""
    return WEIGHTS if pickle.parent == Path() else f"{pickle.stem}.safetensors"


def describe(folder: Path, device: torch.device, bfloat16: bool) -> Description:
    """Files, sizes and types."""
    model = OpenUni.load(folder, device, empty=True)
    sizes, config, text = Sizes.of(model.headers), model.config, model.config.internvl.text_config
    shape = f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads"
    fields, scheduler = config.transformer, config.scheduler
    width = fields["num_attention_heads"] * fields["attention_head_dim"]
    files = sorted({path for path in model.headers.files.values()})
    rows = {str(path.relative_to(folder)): f"{path.stat().st_size / 1e9:.3f} GB" for path in files}
    rows |= {
        "licence": TERMS,
        "types on disk": ", ".join(f"{kind} ({count})" for kind, count in sorted(model.headers.types.items())),
        "language model": f"{sizes.language / 1e6:,.1f} million parameters: {shape}",
        "queries, connector": f"{sizes.conditioner / 1e6:,.1f} million parameters: {config.queries} queries, "
        f"{config.connector.layers} layers, width {config.connector.width}",
        "diffusion transformer": f"{sizes.transformer / 1e6:,.1f} million parameters: "
        f"{fields['num_layers']} layers, width {width}",
        "autoencoder": f"{sizes.autoencoder / 1e6:,.1f} million parameters, {config.shrinks} pixels a latent",
        "images": f"{config.side}x{config.side} pixels, other multiples of {config.shrinks} by size",
        "drawn with": f"rollout.timestep_shift={scheduler.get('flow_shift', 1.0):g}, as its scheduler says",
        "trained with": f"train.timestep_shift={scheduler.get('shift', 1.0):g}, as its scheduler says",
        "trained": "the diffusion transformer; with train.trainable=all its queries and its connector, too",
    }
    return Description(rows, config.side)


def memory(folder: Path, size: tuple[int, int], bfloat16: bool) -> dict[str, Need]:
    """``stage_needs`` of the folder."""
    headers = read_headers(folder)
    return stage_needs(OpenUniConfig.from_folder(folder, headers), Sizes.of(headers), size, bfloat16)


def training_memory(folder: Path, size: tuple[int, int], bfloat16: bool, recipe: Recipe) -> Need:
    """``training_need`` of the folder."""
    headers = read_headers(folder)
    return training_need(OpenUniConfig.from_folder(folder, headers), Sizes.of(headers), size, bfloat16, recipe)
