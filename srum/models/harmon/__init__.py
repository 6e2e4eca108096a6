"""Harmon: one architecture, any size (docs/specs/harmon.md; docs/harmon.md says what differs from BAGEL).

``config`` what a folder says of itself; ``checkpoint`` its layouts, read and written; ``autoencoder`` and ``images``
pixels and latents; ``mar`` MAR's encoder and decoder; ``language`` Qwen2.5 between them; ``chat`` its words; ``head``
the diffusion of a token; ``sampler`` masked autoregression; ``training`` what is learned of an example; ``model`` the
adapter that meets ``srum.models.base.TrainableModel``; ``memory`` what fits. Here: what ``srum.models`` asks.
"""

from __future__ import annotations

from pathlib import Path

import torch

from srum.config import RunConfig
from srum.errors import ModelError
from srum.models import Description, native_bfloat16
from srum.models.harmon.checkpoint import read_headers, weight_files
from srum.models.harmon.config import HarmonConfig
from srum.models.harmon.memory import Sizes, stage_needs, training_need
from srum.models.harmon.model import Harmon
from srum.models.needs import Need, Recipe
from srum.models.precision import Precision
from srum.models.settings import refuse_unused

__all__ = ["TERMS", "Harmon", "describe", "load", "memory", "refuse", "settle", "training_memory"]

TERMS = "Harmon has NTU's S-Lab License 1.0: nothing commercial without its authors' leave"
NO_SPREAD = "Harmon's layers are not spread over devices; it fits one GPU of 16 GB (device=cuda)"
NO_SHIFT = "Harmon hides tokens, it has no timesteps to shift; set it to 1"


def load(folder: Path, device: torch.device, dtype: torch.dtype, *, spread: bool, empty: bool) -> Harmon:
    """``Harmon.load``, computing in bfloat16 where the device multiplies it natively. Raises ModelError for
    ``spread``."""
    if spread:
        raise ModelError(f"device: {NO_SPREAD}")
    precision: Precision = "bf16" if native_bfloat16(device) else "fp32"
    return Harmon.load(folder, device, precision, dtype, empty)


def refuse(config: RunConfig) -> None:
    """Raises ConfigError for settings that would do nothing here."""
    shifts = {name: getattr(config, name).timestep_shift for name in ("train", "rollout", "eval")}
    own = {f"{name}.timestep_shift": NO_SHIFT for name, shift in shifts.items() if shift != 1}
    refuse_unused(config, "Harmon", NO_SPREAD, step="iteration", guided="noise is", own=own)


def settle(config: RunConfig) -> RunConfig:
    """Where all weights are trained, what judges is trained, too: it keeps the weights that entered."""
    if config.train.trainable == "generation":
        return config
    return config.model_copy(update={"judge": config.judge.frozen()})


def describe(folder: Path, device: torch.device, bfloat16: bool) -> Description:
    """Files, sizes and types."""
    model = Harmon.load(folder, device, empty=True)
    sizes, config, text = Sizes.of(model.headers), model.config, model.config.qwen
    mar, stride = config.mar, config.autoencoder.stride
    grid = config.side // stride
    rows = {"licence": TERMS}
    rows |= {path.name: f"{path.stat().st_size / 1e9:.3f} GB" for path in weight_files(folder)}
    rows |= {
        "types on disk": ", ".join(f"{kind} ({count})" for kind, count in sorted(model.headers.types.items())),
        "language model": f"{sizes.language / 1e6:,.1f} million parameters: {text.num_hidden_layers} layers, "
        f"width {text.hidden_size}, {text.num_attention_heads} heads",
        "MAR's encoder": f"{sizes.encoder / 1e6:,.1f} million parameters: {mar.depth} blocks, width {mar.width}",
        "MAR's decoder and head": f"{sizes.generation / 1e6:,.1f} million parameters: {mar.decoder_depth} blocks, "
        f"width {mar.decoder_width}; {mar.head_depth} blocks, width {mar.head_width}",
        "autoencoder": f"{sizes.autoencoder / 1e6:,.1f} million parameters",
        "latent": f"{mar.channels} numbers for {stride}x{stride} pixels; an image of {config.side} has {grid}x{grid}",
        "trained": "MAR's decoder, the head and what leads to them; with train.trainable=all everything",
    }
    return Description(rows, config.side)


def memory(folder: Path, size: tuple[int, int], bfloat16: bool) -> dict[str, Need]:
    """``stage_needs`` of the folder."""
    headers = read_headers(folder)
    return stage_needs(HarmonConfig.from_folder(folder, headers), Sizes.of(headers), size, bfloat16)


def training_memory(folder: Path, size: tuple[int, int], bfloat16: bool, recipe: Recipe) -> Need:
    """``training_need`` of the folder."""
    headers = read_headers(folder)
    return training_need(HarmonConfig.from_folder(folder, headers), Sizes.of(headers), size, bfloat16, recipe)
