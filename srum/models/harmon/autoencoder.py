"""KL-16, LDM's autoencoder, as diffusers' AutoencoderKL, read from the official names (docs/specs/harmon.md, 5)."""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from srum.models.harmon.config import AutoencoderSizes

PREFIX = "vae."
RENAMED = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # of attention


def build_autoencoder(sizes: AutoencoderSizes) -> AutoencoderKL:
    """A fresh autoencoder: attention in the encoder's last level and in both middles."""
    levels = len(sizes.widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.widths,
        layers_per_block=sizes.layers,
        latent_channels=sizes.channels,
        norm_num_groups=32,
        scaling_factor=sizes.scale,
    )


def official_name(name: str, levels: int) -> str:
    """What a tensor of diffusers' is called in the files."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if "attentions" in name:
        for ours, official in RENAMED.items():
            name = name.replace(f".{ours}.", f".{official}.")
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = name.replace("down_blocks.", "down.").replace("resnets.", "block.").replace("attentions.", "attn.")
    return PREFIX + name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")


@torch.no_grad()
def encode_mean(autoencoder: AutoencoderKL, pixels: Tensor) -> Tensor:
    """(N, 3, H, W) in [-1, 1] to scaled latents (N, C, h, w), the posterior mean."""
    return autoencoder.encode(pixels).latent_dist.mean * autoencoder.config.scaling_factor


@torch.no_grad()
def decode_latents(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents (N, C, h, w) to pixels (N, 3, H, W) in about [-1, 1]."""
    return autoencoder.decode(latents / autoencoder.config.scaling_factor).sample
