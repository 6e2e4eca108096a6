"""What a checkpoint folder says of itself, and the values that it leaves to the code (docs/specs/bagel.md, 1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from srum.errors import ModelError
from srum.json_files import read_json
from srum.models.base import REFINE_SYSTEM, REFINE_USER, REFLECT_QUESTION, REFLECT_STOP
from srum.models.checkpoints import require_heads, require_values, with_rope

# The official folder has no file for these values; a checkpoint of another size carries one of these two.
OVERRIDE_FILES = ("bagel_config.json", "fixture_config.json")

# Fields that change numbers and have one value here: anything else is refused. The reference overwrites qk_norm and
# tie_word_embeddings; what a bias or an expert is, the tensors say.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llm_config.json": {
        "hidden_act": ("silu",),
        "partial_rotary_factor": (None, 1, 1.0),
        "use_sliding_window": (None, False),
        "attention_multiplier": (None,),
        "logits_soft_cap": (None,),
        "is_causal": (None, True),
    },
    "vit_config.json": {
        "hidden_act": ("gelu_pytorch_tanh",),
        "num_channels": (None, 3),
        "rope": (None, False),
    },
    "bagel": {
        "interpolate_pos": (None, False),
        "connector_act": ("gelu_pytorch_tanh",),
        "vit_select_layer": (None, -2),
    },
}
CHECKED = {"rope_parameters", "rope_scaling", "head_dim", "layer_types"}  # fields that are read to be refused

PLAN_INSTRUCTION = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, "
    "i.e. <think> planning process here </think> image here"
)
THINK_INSTRUCTION = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, "
    "i.e. <think> reasoning process here </think> answer here"
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class LlmConfig(_Part):
    """The language model: fields of ``llm_config.json`` that the network uses."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int | None = None  # of a row: each token of a text, and each image, takes one position

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class VitConfig(_Part):
    """The understanding encoder. One layer fewer than ``num_hidden_layers`` is built: the last is not used."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    layer_norm_eps: float = 1e-6


class AutoencoderConfig(_Part):
    """The FLUX autoencoder; levels have ``ch * ch_mult`` channels. latent = scale * (z - shift)."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)


class ResizeLimits(_Part):
    """Limits of the resize rule (``srum.models.bagel.images``), in pixels."""

    max_image_size: int
    min_image_size: int
    image_stride: int


class BagelConfig(_Part):
    """Everything needed to build the network and its inputs."""

    llm: LlmConfig
    vit: VitConfig
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    vae_transform: ResizeLimits = ResizeLimits(max_image_size=1024, min_image_size=512, image_stride=16)
    vit_transform: ResizeLimits = ResizeLimits(max_image_size=980, min_image_size=224, image_stride=14)
    transform_max_pixels: int = 14 * 14 * 9 * 1024
    plan_instruction: str = PLAN_INSTRUCTION
    think_instruction: str = THINK_INSTRUCTION
    refine_system: str = REFINE_SYSTEM
    refine_user: str = REFINE_USER
    reflect_question: str = REFLECT_QUESTION
    reflect_stop: str = REFLECT_STOP
    raw: dict[str, Any] = Field(default_factory=dict, description="the files as read, written back on save")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as peft asks a model's config for."""
        return self.model_dump()

    @property
    def latent_dim(self) -> int:
        """Numbers per latent token."""
        return self.latent_patch_size**2 * self.autoencoder.z_channels

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of pixels that one latent token covers."""
        return self.latent_patch_size * self.autoencoder.downsample

    @classmethod
    def from_folder(cls, folder: Path) -> BagelConfig:
        """Read a checkpoint folder.

        Raises ModelError, naming file and field, for a missing file, for a value of the wrong kind and for one that
        changes numbers and that the network does not compute with: nothing of that is ignored.
        """
        raw: dict[str, Any] = {}
        for name in ("llm_config.json", "vit_config.json"):
            if not (folder / name).is_file():
                raise ModelError(f"{folder} is no BAGEL checkpoint: {name} is missing")
            raw[name] = read_json(folder / name)
        overrides: dict[str, Any] = {}
        for name in OVERRIDE_FILES:
            if (folder / name).is_file():
                raw[name] = overrides = read_json(folder / name)
                break
        for name, values in raw.items():
            require_values(folder / name, values, _fixed(name))
        llm = with_rope(folder / "llm_config.json", raw["llm_config.json"])
        for name, values in (("llm_config.json", llm), ("vit_config.json", raw["vit_config.json"])):
            require_heads(folder / name, values)
        try:
            return cls.model_validate({"llm": llm, "vit": raw["vit_config.json"], "raw": raw} | overrides)
        except ValidationError as error:
            detail = error.errors()[0]
            part, *rest = map(str, detail["loc"])
            files = {"llm": "llm_config.json", "vit": "vit_config.json"}
            field = ".".join(rest or [part])
            raise ModelError(f"{folder / files.get(part, next(reversed(raw)))}: {field}: {detail['msg']}") from None

    def without_effect(self) -> dict[str, list[str]]:
        """Per file the fields that are not read: they change nothing here."""
        read: dict[str, type[_Part]] = {"llm_config.json": LlmConfig, "vit_config.json": VitConfig}
        unread = {
            name: sorted(set(values) - set(read.get(name, BagelConfig).model_fields) - set(_fixed(name)) - CHECKED)
            for name, values in self.raw.items()
        }
        return {name: fields for name, fields in unread.items() if fields}

    def write(self, folder: Path) -> None:
        """Write the config files back as they were read."""
        for name, content in self.raw.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


PUBLISHED = {
    "ByteDance-Seed/BAGEL-7B-MoT": BagelConfig(
        llm=LlmConfig(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064,
        ),
        vit=VitConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14,
        ),
    )
}  # fmt: skip
# of published weights (docs/specs/bagel.md, 1): what can be said of them before they are fetched


def _fixed(name: str) -> Mapping[str, tuple[Any, ...]]:
    return FIXED.get(name, FIXED["bagel"])
