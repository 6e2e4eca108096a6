"""What a checkpoint folder says of itself, and the values that it leaves to the code (docs/specs/bagel.md, 1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from srum.errors import ModelError

# The official folder has no file for these values; a checkpoint of another size carries one of these two.
OVERRIDE_FILES = ("bagel_config.json", "fixture_config.json")

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
# RvR's interface (docs/specs/rvr.md, 2), byte for byte. Its published weights were trained with the first text before
# the image and are drawn from with the second.
REFINE_SYSTEM = (
    "Analyze the potential misalignment between the generated image and the user's prompt. "
    "Then, re-generate the image to precisely align with the user's prompt.\n"
)
REFINE_SYSTEM_RELEASED = REFINE_SYSTEM + "\nHere is the generated image:\n"
REFINE_USER = "Here is the user's prompt: {prompt}. "
REFLECT_STOP = "No further edit needed."
REFLECT_QUESTION = (
    "The image was made for this prompt: {prompt}\n"
    "Compare the two. Reply with one line that tells an image editor what to change so that the image matches the "
    f"prompt, or with the line: {REFLECT_STOP}"
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
        """Read a checkpoint folder. Raises ModelError naming the missing file."""
        raw: dict[str, Any] = {}
        for name in ("llm_config.json", "vit_config.json"):
            path = folder / name
            if not path.is_file():
                raise ModelError(f"{folder} is no BAGEL checkpoint: {name} is missing")
            raw[name] = json.loads(path.read_text())
        overrides: dict[str, Any] = {}
        for name in OVERRIDE_FILES:
            if (folder / name).is_file():
                raw[name] = overrides = json.loads((folder / name).read_text())
                break
        return cls(llm=raw["llm_config.json"], vit=raw["vit_config.json"], raw=raw, **overrides)

    def write(self, folder: Path) -> None:
        """Write the config files back as they were read."""
        for name, content in self.raw.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
