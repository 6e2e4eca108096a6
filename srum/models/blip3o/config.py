"""What a checkpoint folder says of itself; sizes that it leaves to the code are read off its tensors
(docs/specs/blip3o.md, 2 and 3)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, Qwen2_5_VLConfig

from srum.errors import ModelError
from srum.json_files import read_json
from srum.models.checkpoints import Headers, require_heads, require_values, with_rope

# The official folder has no file for the one size that no tensor shows; a checkpoint of another size has one of these.
OVERRIDE_FILES = ("blip3o_config.json", "fixture_config.json")
HEAD_WIDTH, SIDE = 112, 32  # of the EVA tower: numbers per head, patches per side
SIZES = ("hidden_size", "num_attention_heads")  # of the language model
NOT_OURS = ("model_type", "architectures", "transformers_version", "torch_dtype")  # of what transformers reads
TOKENS = ("mm_use_im_start_end", "mm_use_im_patch_token")  # would add tokens
DECODER = "diffusion-decoder"
POOLING = re.compile(r"early_pool2d_([1-9]\d?)")
SECTIONS = (16, 24, 24)  # of the halves of a head's rotations, for time, row and column, where a config has none

# Fields that change numbers and have one value here: anything else is refused. transformers computes with the rest.
FIXED: dict[str, tuple[Any, ...]] = {
    "gen_vision_tower": ("eva-clip-E-14-plus",),
}
TEXT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (None, 1, 1.0),
    "use_sliding_window": (None, False),
}
VISION: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "in_channels": (None, 3),
    "in_chans": (None, 3),
    "temporal_patch_size": (2,),
}
ROPE: dict[str, tuple[Any, ...]] = {
    "rope_type": ("mrope", "default"),
    "type": ("mrope", "default"),
    "mrope_section": (),
}
OURS = {*FIXED, *TEXT, "n_query", "gen_pooling", "rope_theta", "rope_scaling", "rope_parameters", "head_dim"}


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

    @property
    def vocabulary(self) -> int:
        """Tokens that the language model tells apart."""
        return int(self.qwen.text_config.vocab_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as peft asks a model's config for."""
        return self.raw

    @classmethod
    def from_folder(cls, folder: Path, headers: Headers) -> Blip3oConfig:
        """Read a checkpoint folder. Raises ModelError for one of another model, and for what is missing."""
        raw = read_config(folder)
        overrides = raw_overrides(folder)
        eva = overrides.get("eva")
        return read_sizes(
            folder, raw, headers, eva.get("head_width", HEAD_WIDTH) if isinstance(eva, dict) else HEAD_WIDTH
        )

    def without_effect(self) -> list[str]:
        """The fields that neither this code nor transformers reads."""
        text, vision = self.raw.get("text_config") or {}, self.raw["vision_config"]
        known = _fields(Qwen2_5_VLConfig) | _fields(type(self.qwen.text_config)) | OURS | {*NOT_OURS, *TOKENS}
        seen = _fields(type(self.qwen.vision_config)) | set(VISION)
        return [
            *sorted({*self.raw, *text} - known),
            *(f"vision_config.{name}" for name in sorted(set(vision) - seen)),
        ]


def _fields(kind: type[PreTrainedConfig]) -> set[str]:
    """What transformers reads of such a config, or leaves in every one."""
    return {*kind().to_dict(), *GenerationConfig().to_dict()}


def raw_overrides(folder: Path) -> dict[str, Any]:
    """What a checkpoint of another size says beside its config; nothing of the published ones."""
    for name in OVERRIDE_FILES:
        if (folder / name).is_file():
            overrides: dict[str, Any] = read_json(folder / name)
            return overrides
    return {}


def read_sizes(folder: Path, raw: dict[str, Any], headers: Headers, head_width: int) -> Blip3oConfig:
    """The config of these fields and tensors. Raises ModelError where a part's tensors are missing, and naming a field
    that transformers refuses."""
    tower = _tower(folder, headers, head_width)
    pooling = _pooling(folder / "config.json", raw["gen_pooling"])
    try:
        qwen = Qwen2_5_VLConfig(**{name: value for name, value in raw.items() if name not in NOT_OURS})
    except Exception as error:  # of its checks, which have several types
        raise ModelError(f"{folder / 'config.json'}: {' '.join(str(error).split())[:200]}") from None
    return Blip3oConfig(
        qwen=qwen,
        queries=raw["n_query"],
        pooling=pooling,
        grid=(tower.side if tower else SIDE) // pooling,
        transformer=_transformer(folder, headers),
        tower=tower,
        raw=raw,
    )


def _pooling(path: Path, value: Any) -> int:
    if not (match := POOLING.fullmatch(str(value))):
        raise ModelError(f"{path}: gen_pooling: {value!r} is not supported, only such as 'early_pool2d_4'")
    return int(match[1])


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises ModelError where it is not that of a BLIP3-o with Qwen2.5-VL, and without a decoder."""
    path = folder / "config.json"
    raw: dict[str, Any] = read_json(path)
    if "image_start_tag_id" in raw or "gen_vision_tower" not in raw:
        raise ModelError(
            f"{folder} is a checkpoint of BLIP3o-NEXT, another architecture; BLIP3o-Model-8B and -4B can be loaded"
        )
    text, vision = raw.get("text_config") or raw, raw.get("vision_config")  # newer transformers puts the first apart
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise ModelError(f"{path}: text_config and vision_config: expected objects")
    if lacking := [n for n in ("n_query", "gen_pooling", *SIZES) if n not in (text if n in SIZES else raw)]:
        raise ModelError(f"{path} has no {', '.join(lacking)}")
    if wrong := [n for n in ("n_query", *SIZES) if type((text if n in SIZES else raw)[n]) is not int]:
        raise ModelError(f"{path}: {wrong[0]}: expected a whole number")
    for values, fixed in ((raw, FIXED), (text, TEXT), (vision, VISION)):
        require_values(path, values, fixed)
    require_heads(path, text)
    require_heads(path, vision, "num_heads")
    _require_sections(path, with_rope(path, text, ROPE))
    if added := [name for name in TOKENS if raw.get(name)]:
        raise ModelError(f"{path}: {', '.join(added)} would add tokens, which no published checkpoint does")
    if not (folder / DECODER / "unet" / "config.json").is_file():
        raise ModelError(
            f"{folder} has no {DECODER}/, which training with the authors' code leaves out: copy the published model's"
        )
    return raw


def _require_sections(path: Path, text: Mapping[str, Any]) -> None:
    """ModelError for sections of rotations that do not make up a head."""
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    sections, half = rope.get("mrope_section", SECTIONS), text["hidden_size"] // text["num_attention_heads"] / 2
    if not isinstance(sections, (list, tuple)) or len(sections) != 3 or sum(sections) != half:
        raise ModelError(f"{path}: mrope_section: expected three numbers that add up to {half:g}, got {sections!r}")


def _transformer(folder: Path, headers: Headers) -> TransformerSizes:
    """Read off the tensors. Raises ModelError where there are none."""
    prefix = "model.dit.model."
    if f"{prefix}patch_embedder.proj.weight" not in headers.shapes:
        raise ModelError(f"{folder} has no tensors {prefix}*, the diffusion transformer: it is a Qwen2.5-VL alone")
    width, channels = _shape(folder, headers, f"{prefix}patch_embedder.proj.weight", 2)
    (heads,) = _shape(folder, headers, f"{prefix}layers.0.gate", 1)
    return TransformerSizes(
        channels=channels,
        width=width,
        layers=headers.count(f"{prefix}layers."),
        heads=heads,
        kv_heads=_shape(folder, headers, f"{prefix}layers.0.attn1.to_k.weight", 2)[0] * heads // width,
        condition=_shape(folder, headers, f"{prefix}caption_projection.linear_1.weight", 2)[1],
    )


def _tower(folder: Path, headers: Headers, head_width: int) -> TowerSizes | None:
    prefix = "model.gen_vision_tower.vision_tower.model."
    if not any(name.startswith(prefix) for name in headers.shapes):
        return None
    width, _, patch, _ = _shape(folder, headers, f"{prefix}patch_embed.proj.weight", 4)
    if type(head_width) is not int or head_width < 1 or width % head_width:
        raise ModelError(f"{folder}: eva.head_width: heads of {head_width!r} do not divide the width of {width}")
    return TowerSizes(
        width=width,
        layers=headers.count(f"{prefix}blocks."),
        heads=width // head_width,
        inner=_shape(folder, headers, f"{prefix}blocks.0.mlp.fc1.weight", 2)[0],
        patch=patch,
        side=int((_shape(folder, headers, f"{prefix}pos_embed", 3)[1] - 1) ** 0.5),
    )


def _shape(folder: Path, headers: Headers, name: str, rank: int) -> tuple[int, ...]:
    """Of a tensor that sizes are read off. Raises ModelError where it is missing or empty, or has another rank."""
    shape = headers.shapes.get(name, ())
    if len(shape) != rank or 0 in shape:
        raise ModelError(f"{folder}: its tensors do not fit its config: {name} is missing, or of another shape")
    return shape
