"""What a checkpoint folder says of itself; sizes that it leaves to the code are read off its tensors
(docs/specs/blip3o.md, 2 and 3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Qwen2_5_VLConfig

from srum.errors import ModelError
from srum.json_files import read_json
from srum.models.blip3o.headers import Headers

# The official folder has no file for the one size that no tensor shows; a checkpoint of another size has one of these.
OVERRIDE_FILES = ("blip3o_config.json", "fixture_config.json")
HEAD_WIDTH, SIDE = 112, 32  # of the EVA tower: numbers per head, patches per side
NOT_OURS = ("model_type", "architectures", "transformers_version", "torch_dtype")  # of what transformers reads
TOKENS = ("mm_use_im_start_end", "mm_use_im_patch_token")  # would add tokens
DECODER = "diffusion-decoder"


@dataclass(frozen=True)
class TransformerSizes:
    """The diffusion transformer: ``channels`` of a feature, ``width``, and the width of what it is conditioned on."""

    channels: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    condition: int


@dataclass(frozen=True)
class TowerSizes:
    """The EVA tower; images of ``patch`` * ``side`` pixels square."""

    width: int
    layers: int
    heads: int
    inner: int
    patch: int
    side: int


@dataclass(frozen=True)
class Blip3oConfig:
    """Everything needed to build the parts. ``tower`` is None where the folder has no EVA tensors."""

    qwen: Qwen2_5_VLConfig
    queries: int
    pooling: int  # stride, in the tower's tokens, of a feature
    grid: int  # features on a side
    transformer: TransformerSizes
    tower: TowerSizes | None
    raw: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as peft asks a model's config for."""
        return self.raw

    @classmethod
    def from_folder(cls, folder: Path, headers: Headers) -> Blip3oConfig:
        """Read a checkpoint folder. Raises ModelError for one of another model, and for what is missing."""
        raw = read_config(folder)
        overrides = raw_overrides(folder)
        return read_sizes(folder, raw, headers, overrides.get("eva", {}).get("head_width", HEAD_WIDTH))


def raw_overrides(folder: Path) -> dict[str, Any]:
    """What a checkpoint of another size says beside its config; nothing of the published ones."""
    for name in OVERRIDE_FILES:
        if (folder / name).is_file():
            overrides: dict[str, Any] = read_json(folder / name)
            return overrides
    return {}


def read_sizes(folder: Path, raw: dict[str, Any], headers: Headers, head_width: int) -> Blip3oConfig:
    """The config of these fields and tensors. Raises ModelError where a part's tensors are missing."""
    tower = _tower(headers, head_width)
    pooling = int(raw["gen_pooling"].rsplit("_", 1)[1])
    return Blip3oConfig(
        qwen=Qwen2_5_VLConfig(**{name: value for name, value in raw.items() if name not in NOT_OURS}),
        queries=raw["n_query"],
        pooling=pooling,
        grid=(tower.side if tower else SIDE) // pooling,
        transformer=_transformer(folder, headers),
        tower=tower,
        raw=raw,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises ModelError where it is not that of a BLIP3-o with Qwen2.5-VL, and without a decoder."""
    path = folder / "config.json"
    raw: dict[str, Any] = read_json(path)
    if "image_start_tag_id" in raw or "gen_vision_tower" not in raw:
        raise ModelError(
            f"{folder} is a checkpoint of BLIP3o-NEXT, another architecture; BLIP3o-Model-8B and -4B can be loaded"
        )
    if lacking := [name for name in ("n_query", "gen_pooling", "hidden_size", "vision_config") if name not in raw]:
        raise ModelError(f"{path} has no {', '.join(lacking)}")
    if added := [name for name in TOKENS if raw.get(name)]:
        raise ModelError(f"{path}: {', '.join(added)} would add tokens, which no published checkpoint does")
    if not (folder / DECODER / "unet" / "config.json").is_file():
        raise ModelError(
            f"{folder} has no {DECODER}/, which training with the authors' code leaves out: copy the published model's"
        )
    return raw


def _transformer(folder: Path, headers: Headers) -> TransformerSizes:
    """Read off the tensors. Raises ModelError where there are none."""
    prefix = "model.dit.model."
    if f"{prefix}patch_embedder.proj.weight" not in headers.shapes:
        raise ModelError(f"{folder} has no tensors {prefix}*, the diffusion transformer: it is a Qwen2.5-VL alone")
    width, channels = headers.shapes[f"{prefix}patch_embedder.proj.weight"]
    (heads,) = headers.shapes[f"{prefix}layers.0.gate"]
    return TransformerSizes(
        channels=channels,
        width=width,
        layers=headers.count(f"{prefix}layers."),
        heads=heads,
        kv_heads=headers.shapes[f"{prefix}layers.0.attn1.to_k.weight"][0] * heads // width,
        condition=headers.shapes[f"{prefix}caption_projection.linear_1.weight"][1],
    )


def _tower(headers: Headers, head_width: int) -> TowerSizes | None:
    prefix = "model.gen_vision_tower.vision_tower.model."
    if not any(name.startswith(prefix) for name in headers.shapes):
        return None
    width, _, patch, _ = headers.shapes[f"{prefix}patch_embed.proj.weight"]
    return TowerSizes(
        width=width,
        layers=headers.count(f"{prefix}blocks."),
        heads=width // head_width,
        inner=headers.shapes[f"{prefix}blocks.0.mlp.fc1.weight"][0],
        patch=patch,
        side=int((headers.shapes[f"{prefix}pos_embed"][1] - 1) ** 0.5),
    )
