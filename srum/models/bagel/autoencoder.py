"""The FLUX autoencoder as diffusers' AutoencoderKL, read from and written to the official key names."""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from srum.models.bagel.config import AutoencoderConfig


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """A fresh autoencoder of this size."""
    levels = len(config.ch_mult)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.ch * m for m in config.ch_mult),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=32,
        scaling_factor=config.scale_factor,
        shift_factor=config.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def load_official(autoencoder: AutoencoderKL, state: dict[str, Tensor]) -> None:
    """Fill from official keys; strict."""
    autoencoder.load_state_dict(convert_ldm_vae_checkpoint(dict(state), autoencoder.config))


def official_state(autoencoder: AutoencoderKL, config: AutoencoderConfig) -> dict[str, Tensor]:
    """The weights under official keys: the inverse of ``load_official``."""
    last = len(config.ch_mult) - 1
    state = {}
    for name, value in autoencoder.state_dict().items():
        key = name.replace("conv_norm_out", "norm_out")
        key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("conv_shortcut", "nin_shortcut")
        if "attentions" in key:
            for ours, official in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")):
                key = key.replace(f".{ours}.", f".{official}.")
            key = key.replace("to_out.0", "proj_out").replace("mid_block.attentions.0", "mid.attn_1")
            value = value[:, :, None, None] if value.ndim == 2 else value
        state[key] = value.contiguous()
    return state


@torch.no_grad()
def encode_mean(autoencoder: AutoencoderKL, pixels: Tensor) -> Tensor:
    """(N, 3, H, W) in [-1, 1] to scaled latents (N, C, h, w), the posterior mean (the reference samples)."""
    config = autoencoder.config
    mean = autoencoder.encode(pixels).latent_dist.mean
    return config.scaling_factor * (mean - config.shift_factor)


@torch.no_grad()
def decode_latents(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents (N, C, h, w) to pixels (N, 3, H, W) in about [-1, 1]."""
    config = autoencoder.config
    return autoencoder.decode(latents / config.scaling_factor + config.shift_factor).sample
