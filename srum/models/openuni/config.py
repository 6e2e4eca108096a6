"""What a checkpoint folder says of itself: the configs of its five parts; sizes that they leave to the code are read
off the tensors (docs/specs/openuni.md, 2, 3 and 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import InternVLConfig, Qwen2Config

from srum.errors import ModelError
from srum.json_files import read_json
from srum.models.checkpoints import Headers, require_heads, require_values, with_rope

# The published folders have no file for what the code has as literals; a checkpoint of other sizes has one of these.
OVERRIDE_FILES = ("openuni_config.json", "fixture_config.json")
HEAD_WIDTH = 64  # of the connector
INTERNVL, SANA, DC_AE = "internvl3", "sana", "dc-ae"
NOT_OURS = ("model_type", "architectures", "transformers_version", "torch_dtype", "rope_scaling", "rope_parameters")

# Fields that change numbers and have one value here: anything else is refused. The libraries compute with the rest.
CHAT: dict[str, tuple[Any, ...]] = {
    "select_layer": (-1,),
    "downsample_ratio": (0.5,),
    "ps_version": ("v2",),
    "use_backbone_lora": (None, 0),
    "use_llm_lora": (None, 0),
}
TEXT: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen2",),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (None, 1, 1.0),
    "use_sliding_window": (None, False),
}
# Dynamic rope is plain up to the length that the model was made for, and nothing longer is read.
ROPE: dict[str, tuple[Any, ...]] = {"rope_type": ("default", "dynamic"), "type": ("default", "dynamic"), "factor": ()}
VISION: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "norm_type": ("layer_norm",),
    "qk_normalization": (None, False),
    "num_channels": (None, 3),
}
VISION_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
TEXT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
TRANSFORMER: dict[str, tuple[Any, ...]] = {
    "_class_name": ("SanaTransformer2DModel",),
    "patch_size": (1,),
    "interpolation_scale": (None,),  # the 2K and 4K models add positions, which no OpenUni was made from
    "guidance_embeds": (None, False),
    "dropout": (None, 0.0),
}
SCHEDULER: dict[str, tuple[Any, ...]] = {
    "_class_name": ("DPMSolverMultistepScheduler",),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "prediction_type": ("flow_prediction",),
    "use_flow_sigmas": (True,),
    "final_sigmas_type": ("zero",),
    "num_train_timesteps": (1000,),
    "thresholding": (False,),
}
AUTOENCODER: dict[str, tuple[Any, ...]] = {"_class_name": ("AutoencoderDC",)}


@dataclass(frozen=True)
class ConnectorSizes:
    """The layers between the queries and the transformer: ``width`` in, ``out`` numbers out."""

    width: int
    inner: int
    layers: int
    heads: int
    out: int


@dataclass(frozen=True)
class OpenUniConfig:
    """Everything needed to build the parts. ``transformer``, ``autoencoder``, ``scheduler``: fields as diffusers
    writes them."""

    internvl: InternVLConfig
    queries: int
    connector: ConnectorSizes
    transformer: Mapping[str, Any]
    autoencoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    side: int  # of the images that it was trained on, in pixels
    raw: dict[str, Any]

    @property
    def vocabulary(self) -> int:
        """Tokens that the language model tells apart."""
        return int(self.internvl.text_config.vocab_size)

    @property
    def channels(self) -> int:
        """Of a latent."""
        return int(self.transformer["in_channels"])

    @property
    def shrinks(self) -> int:
        """Pixels per latent and side."""
        return shrinks(self.autoencoder)

    @property
    def seen_side(self) -> int:
        """Pixels of an image as the language model sees it."""
        return int(self.internvl.vision_config.image_size[0])

    @property
    def seen_tokens(self) -> int:
        """Of an image that is seen: four patches make one."""
        return (self.seen_side // int(self.internvl.vision_config.patch_size[0]) // 2) ** 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as peft asks a model's config for."""
        return self.raw

    @classmethod
    def from_folder(cls, folder: Path, headers: Headers) -> OpenUniConfig:
        """Read a checkpoint folder. Raises ModelError for one of another model, and for what is missing."""
        raw = _read(folder / INTERNVL / "config.json", CHAT)
        overrides = raw_overrides(folder)
        transformer = _read(folder / SANA / "transformer" / "config.json", TRANSFORMER, ("in_channels", "sample_size"))
        autoencoder = _read(folder / DC_AE / "config.json", AUTOENCODER, ("latent_channels",))
        if transformer["in_channels"] != autoencoder["latent_channels"]:
            raise ModelError(
                f"{folder}: {SANA}/transformer/config.json draws latents of {transformer['in_channels']} channels and "
                f"{DC_AE}/ decodes those of {autoencoder['latent_channels']}: they are not of one Sana"
            )
        queries, _ = headers.shapes["meta_queries"]
        return cls(
            internvl=_internvl(folder / INTERNVL / "config.json", raw),
            queries=queries,
            connector=_connector(folder, headers, overrides),
            transformer=transformer,
            autoencoder=autoencoder,
            scheduler=_read(folder / SANA / "scheduler" / "scheduler_config.json", SCHEDULER),
            side=overrides.get("image_size") or transformer["sample_size"] * shrinks(autoencoder),
            raw=raw,
        )


def shrinks(autoencoder: Mapping[str, Any]) -> int:
    """Pixels per latent and side of an autoencoder of these fields."""
    return int(2 ** (len(autoencoder["encoder_block_out_channels"]) - 1))


def raw_overrides(folder: Path) -> dict[str, Any]:
    """What a checkpoint of other sizes says beside its configs; nothing of the published ones."""
    for name in OVERRIDE_FILES:
        if (folder / name).is_file():
            overrides: dict[str, Any] = read_json(folder / name)
            return overrides
    return {}


def _read(path: Path, fixed: Mapping[str, tuple[Any, ...]], whole: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a config. Raises JsonError, and ModelError for a value that is not supported."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected an object")
    require_values(path, values, fixed)
    if "_class_name" in fixed and "_class_name" not in values:
        raise ModelError(f"{path} is no config of a {fixed['_class_name'][0]}")
    if wrong := [name for name in whole if type(values.get(name)) is not int]:
        raise ModelError(f"{path}: {wrong[0]}: expected a whole number, got {values.get(wrong[0])!r}")
    return values


def _internvl(path: Path, raw: Mapping[str, Any]) -> InternVLConfig:
    """InternVL's config in transformers' terms. Raises ModelError for one of another layout, and naming a field."""
    if raw.get("model_type") != "internvl_chat":
        raise ModelError(
            f"{path}: model_type: {raw.get('model_type')!r}, expected 'internvl_chat', as OpenGVLab/InternVL3-1B has it"
        )
    vision, text = (raw.get(name) for name in ("vision_config", "llm_config"))
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise ModelError(f"{path}: vision_config and llm_config: expected objects")
    for part, values, sizes in (("vision_config", vision, VISION_SIZES), ("llm_config", text, TEXT_SIZES)):
        if wrong := [name for name in sizes if type(values.get(name)) is not int]:
            raise ModelError(f"{path}: {part}.{wrong[0]}: expected a whole number, got {values.get(wrong[0])!r}")
    require_values(path, text, TEXT)
    require_values(path, vision, VISION)
    require_heads(path, text)
    require_heads(path, vision)
    text = with_rope(path, text, ROPE)
    tied = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    try:
        return InternVLConfig(
            vision_config={name: vision[name] for name in (*VISION_SIZES, "patch_size", "layer_norm_eps")}
            | {"attention_bias": vision["qkv_bias"], "use_qk_norm": False, "use_mean_pooling": True},
            text_config=Qwen2Config(**{name: value for name, value in text.items() if name not in NOT_OURS}),
            tie_word_embeddings=tied,
        )
    except KeyError as error:
        raise ModelError(f"{path}: vision_config has no {error.args[0]}") from None
    except Exception as error:  # of transformers' checks, which have several types
        raise ModelError(f"{path}: {' '.join(str(error).split())[:200]}") from None


def _connector(folder: Path, headers: Headers, overrides: Mapping[str, Any]) -> ConnectorSizes:
    """Read off the tensors, but for the number of heads. Raises ModelError where there are none."""
    inner, width = _shape(folder, headers, "connector.layers.0.mlp.fc1.weight")
    out, _ = _shape(folder, headers, "projector.weight")
    own = overrides.get("connector")
    heads = own.get("num_attention_heads") if isinstance(own, dict) else width // HEAD_WIDTH
    if type(heads) is not int or heads < 1 or width % heads:
        raise ModelError(
            f"{folder}: {heads!r} heads do not divide the connector's width of {width}; a model of a size of its own "
            f'says in {OVERRIDE_FILES[0]} {{"connector": {{"num_attention_heads": ...}}, "image_size": ...}}'
        )
    return ConnectorSizes(width, inner, headers.count("connector.layers."), heads, out)


def _shape(folder: Path, headers: Headers, name: str) -> tuple[int, ...]:
    """Of a matrix that sizes are read off. Raises ModelError where it is missing or empty, or no matrix."""
    shape = headers.shapes.get(name, ())
    if len(shape) != 2 or 0 in shape:
        raise ModelError(f"{folder}: its tensors do not fit its config: {name} is missing, or of another shape")
    return shape
