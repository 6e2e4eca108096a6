"""What a checkpoint folder says of itself; sizes that it leaves to the code are read off its tensors
(docs/specs/harmon.md, 2 and 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Qwen2Config

from srum.errors import ModelError
from srum.json_files import read_json
from srum.models.checkpoints import Headers, require_heads, require_values, with_rope

# The official folders have no file for what no tensor shows; a checkpoint of another size has one of these.
OVERRIDE_FILES = ("harmon_config.json", "fixture_config.json")
HEADS = {768: 12, 1024: 16, 1280: 16}  # of MAR's encoder and decoder, by their width
OFFICIAL: dict[str, Any] = {"mask_ratio_min": 0.7, "diffusion_batch_mul": 4, "vae_stride": 16, "patch_size": 1}
SCALE = 0.2325  # of latents
ENLARGED = 2  # times the native side is the side of an image: 512 pixels of 256
NOT_OURS = ("model_type", "architectures", "transformers_version", "torch_dtype")  # of what transformers reads
SIZES = ("hidden_size", "num_attention_heads")

# Fields that change numbers and have one value here: anything else is refused. transformers computes with the rest.
TEXT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (None, 0, 0.0),
    "tie_word_embeddings": (True,),
    "use_sliding_window": (None, False),
}
MAR: dict[str, tuple[Any, ...]] = {"patch_size": (1,)}


@dataclass(frozen=True)
class MarSizes:
    """MAR's encoder, decoder and diffusion head; a native image is a ``grid`` of tokens on a side."""

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    head_width: int
    head_depth: int
    channels: int
    buffers: int
    grid: int


@dataclass(frozen=True)
class AutoencoderSizes:
    """KL-16: the ``widths`` of its levels, of ``layers`` blocks each; latents are ``scale`` times its means."""

    widths: tuple[int, ...]
    layers: int
    channels: int
    scale: float

    @property
    def stride(self) -> int:
        """Pixels on a side of a latent's cell."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class HarmonConfig:
    """Everything needed to build the parts; ``side`` is that of its usual images in pixels."""

    qwen: Qwen2Config
    mar: MarSizes
    autoencoder: AutoencoderSizes
    mask_least: float  # share of an image's tokens that training hides at least
    repeats: int  # draws of (t, noise) per token and step of training
    side: int
    raw: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as peft asks a model's config for."""
        return self.raw

    @classmethod
    def from_folder(cls, folder: Path, headers: Headers) -> HarmonConfig:
        """Read a checkpoint folder. Raises ModelError for one of another model, and for what is missing."""
        raw = read_json(folder / "config.json")
        return read_sizes(folder, raw, headers, raw_overrides(folder))


def raw_overrides(folder: Path) -> dict[str, Any]:
    """What a checkpoint of another size says beside its config; nothing of the published ones."""
    for name in OVERRIDE_FILES:
        if (folder / name).is_file():
            overrides: dict[str, Any] = read_json(folder / name)
            return overrides
    return {}


def read_sizes(folder: Path, raw: dict[str, Any], headers: Headers, overrides: Mapping[str, Any]) -> HarmonConfig:
    """The config of these fields and tensors. Raises ModelError where a part's tensors are missing, where a field
    contradicts them, and naming a field that transformers refuses."""
    path = folder / "config.json"
    whole = raw.get("model_type") == "harmon"  # else the language model's own, beside MAR's weights
    text = _section(path, raw, "llm") if whole else raw
    fields = OFFICIAL | (_section(path, raw, "mar") if whole else {}) | overrides.get("mar", {})
    require_values(path, fields, MAR)
    mar = _mar(folder, headers, overrides.get("mar_dims", {}))
    autoencoder = _autoencoder(folder, headers, overrides.get("vae_scale", SCALE))
    _require_agreement(path, fields, mar, autoencoder)
    return HarmonConfig(
        qwen=_qwen(path, text),
        mar=mar,
        autoencoder=autoencoder,
        mask_least=fields["mask_ratio_min"],
        repeats=fields["diffusion_batch_mul"],
        side=overrides.get("image_size", ENLARGED * mar.grid * autoencoder.stride),
        raw=raw,
    )


def _section(path: Path, raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(raw.get(name), dict):
        raise ModelError(f"{path}: {name}: expected an object with the fields of this part")
    section: dict[str, Any] = raw[name]
    return section


def _qwen(path: Path, text: Mapping[str, Any]) -> Qwen2Config:
    """The language model. Raises ModelError for what it does not compute with."""
    if wrong := [name for name in SIZES if type(text.get(name)) is not int]:
        raise ModelError(f"{path}: {wrong[0]}: expected a whole number")
    require_values(path, text, TEXT)
    require_heads(path, text)
    values = with_rope(path, text)
    try:
        return Qwen2Config(**{name: value for name, value in values.items() if name not in NOT_OURS})
    except Exception as error:  # of its checks, which have several types
        raise ModelError(f"{path}: {' '.join(str(error).split())[:200]}") from None


def _mar(folder: Path, headers: Headers, dims: Mapping[str, Any]) -> MarSizes:
    """Read off the tensors, but for the heads."""
    width, channels = _shape(folder, headers, "mar.z_proj.weight", 2)
    decoder_width, _ = _shape(folder, headers, "mar.decoder_embed.weight", 2)
    cells = _shape(folder, headers, "mar.diffusion_pos_embed_learned", 3)[1]
    return MarSizes(
        width=width,
        depth=headers.count("mar.encoder_blocks."),
        heads=_heads(folder, width, dims.get("encoder_num_heads")),
        decoder_width=decoder_width,
        decoder_depth=headers.count("mar.decoder_blocks."),
        decoder_heads=_heads(folder, decoder_width, dims.get("decoder_num_heads")),
        head_width=_shape(folder, headers, "mar.diffloss.net.input_proj.weight", 2)[0],
        head_depth=headers.count("mar.diffloss.net.res_blocks."),
        channels=channels,
        buffers=_shape(folder, headers, "mar.encoder_pos_embed_learned", 3)[1] - cells,
        grid=int(cells**0.5),
    )


def _heads(folder: Path, width: int, known: Any) -> int:
    heads = known or HEADS.get(width)
    if type(heads) is not int or width % heads:
        raise ModelError(
            f"{folder}: MAR's width {width} is none of {', '.join(map(str, HEADS))}; {OVERRIDE_FILES[0]} has to say "
            "encoder_num_heads and decoder_num_heads in mar_dims"
        )
    return heads


def _autoencoder(folder: Path, headers: Headers, scale: float) -> AutoencoderSizes:
    levels = headers.count("vae.encoder.down.")
    first = "vae.encoder.down.{}.block.0.conv1.weight"
    return AutoencoderSizes(
        widths=tuple(_shape(folder, headers, first.format(level), 4)[0] for level in range(max(1, levels))),
        layers=headers.count("vae.encoder.down.0.block."),
        channels=_shape(folder, headers, "vae.post_quant_conv.weight", 4)[0],
        scale=scale,
    )


def _require_agreement(path: Path, fields: Mapping[str, Any], mar: MarSizes, autoencoder: AutoencoderSizes) -> None:
    """ModelError for a field that says another size than the tensors have."""
    sizes = {
        "img_size": mar.grid * autoencoder.stride,
        "vae_stride": autoencoder.stride,
        "vae_embed_dim": mar.channels,
        "buffer_size": mar.buffers,
        "diffloss_d": mar.head_depth,
        "diffloss_w": mar.head_width,
    }
    for name, size in sizes.items():
        if fields.get(name, size) != size:
            raise ModelError(f"{path}: mar.{name}: {fields[name]!r}, but its tensors are of {size}")
    if autoencoder.channels != mar.channels:
        raise ModelError(f"{path.parent}: latents of {autoencoder.channels} channels, but MAR's of {mar.channels}")
    for name in ("mask_ratio_min", "diffusion_batch_mul"):
        if isinstance(fields[name], bool) or not isinstance(fields[name], int | float) or fields[name] <= 0:
            raise ModelError(f"{path}: mar.{name}: expected a number above 0, got {fields[name]!r}")


def _shape(folder: Path, headers: Headers, name: str, rank: int) -> tuple[int, ...]:
    """Of a tensor that sizes are read off. Raises ModelError where it is missing or empty, or has another rank."""
    shape = headers.shapes.get(name, ())
    if len(shape) != rank or 0 in shape:
        raise ModelError(f"{folder}: its tensors do not fit its config: {name} is missing, or of another shape")
    return shape
