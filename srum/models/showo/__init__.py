"""Show-o, first version: one transformer for texts and masked image ids, any size (docs/specs/showo.md; docs/showo.md
says what differs from BAGEL).

``config`` what a folder says of itself and where its parts are; ``checkpoint`` its layout, read and written; ``magvit``
images to ids and back; ``sequence`` rows of tokens and who sees whom; ``language`` Phi over rows; ``sampler`` MaskGIT;
``model`` the adapter that meets ``srum.models.base.TrainableModel``; ``memory`` what fits. Here: what ``srum.models``
asks.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from srum.config import RunConfig
from srum.errors import ModelError
from srum.models import Description, native_bfloat16
from srum.models.checkpoints import Headers
from srum.models.needs import Need, Recipe
from srum.models.precision import Precision
from srum.models.settings import refuse_unused
from srum.models.showo.checkpoint import weight_files
from srum.models.showo.config import part
from srum.models.showo.magvit import MagvitSizes
from srum.models.showo.memory import Sizes, stage_needs, training_need
from srum.models.showo.model import Showo

__all__ = ["Showo", "describe", "load", "memory", "refuse", "settle", "training_memory"]

NO_SPREAD = "Show-o's layers are not spread over devices; it fits one GPU of 16 GB (device=cuda)"


def load(folder: Path, device: torch.device, dtype: torch.dtype, *, spread: bool, empty: bool) -> Showo:
    """``Showo.load``, in bfloat16 where the device multiplies it natively. Raises ModelError for ``spread``."""
    if spread:
        raise ModelError(f"device: {NO_SPREAD}")
    precision: Precision = "bf16" if native_bfloat16(device) else "fp32"
    return Showo.load(folder, device, precision, dtype, empty)


def refuse(config: RunConfig) -> None:
    """Raises ConfigError for settings that would do nothing here, or cannot be followed."""
    own = {}
    if config.train.trainable == "generation":
        same = "Show-o draws and reads with the same weights, there is no generation expert"
        own["train.trainable"] = f"{same}; set it to all"
    if config.refine.image_guidance > 1:
        own["refine.image_guidance"] = "Show-o is guided by texts alone; leave it at 1"
    for name, one in (("rollout", config.rollout), ("eval", config.eval)):
        if one.timestep_shift != 1:
            own[f"{name}.timestep_shift"] = "Show-o masks by its own schedule; set it to 1"
    refuse_unused(config, "Show-o", NO_SPREAD, guided="logits are", refine=True, own=own)


def settle(config: RunConfig) -> RunConfig:
    """The judge has the weights that entered, since those that are trained to draw are those that judge."""
    return config.model_copy(update={"judge": config.judge.frozen()})


def describe(folder: Path, device: torch.device, bfloat16: bool) -> Description:
    """Files, sizes and types."""
    model = Showo.load(folder, device, empty=True)
    sizes, config, phi = _sizes(model), model.config, model.config.phi
    shape = f"{phi.num_hidden_layers} layers, width {phi.hidden_size}, {phi.num_attention_heads} heads"
    rows = {path.name: f"{path.stat().st_size / 1e9:.3f} GB" for path in weight_files(folder)}
    rows |= {
        "types on disk": ", ".join(f"{kind} ({count})" for kind, count in sorted(model.headers.types.items())),
        "network": f"{sizes.network / 1e6:,.1f} million parameters, all of them trained: {shape}",
        "images to ids": f"{sizes.magvit / 1e6:,.1f} million parameters, MAGVIT-v2 in {part(folder, 'magvitv2')}",
        "what sees images": f"CLIP, {sizes.tower / 1e6:,.1f} million parameters, in {part(folder, 'clip')}"
        if config.sees
        else "the images' own ids",
        "image": f"{config.cells} ids of {config.codes}, {config.side} px square, no other size",
        "judge": "the weights that entered (judge.model=start): training changes what judges",
    }
    return Description(rows, config.side)


def memory(folder: Path, size: tuple[int, int], bfloat16: bool) -> dict[str, Need]:
    """``stage_needs`` of the folder; its images have one size."""
    model = Showo.load(folder, empty=True)
    return stage_needs(model.config, _sizes(model), bfloat16)


def training_memory(folder: Path, size: tuple[int, int], bfloat16: bool, recipe: Recipe) -> Need:
    """``training_need`` of the folder."""
    model = Showo.load(folder, empty=True)
    return training_need(model.config, _sizes(model), bfloat16, recipe)


def _sizes(model: Showo) -> Sizes:
    """Of the parts, read off their headers."""

    def total(headers: Headers, prefix: str = "") -> int:
        return sum(math.prod(shape) for name, shape in headers.shapes.items() if name.startswith(prefix))

    magvit = Headers.of(weight_files(part(model.folder, "magvitv2")), str)
    clip = Headers.of(weight_files(part(model.folder, "clip")), str) if model.clip else None
    return Sizes(
        network=total(model.headers),
        magvit=total(magvit, "encoder.") + total(magvit, "decoder."),
        tower=total(clip, "vision_model.") if clip else 0,
        tokenizer=MagvitSizes.of(magvit),
        features=(model.clip.image_size // model.clip.patch_size) ** 2 if model.clip else 0,
    )
