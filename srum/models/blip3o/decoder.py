"""Features to pixels: Emu2-Gen's decoder, a diffusion model of its own (docs/specs/blip3o.md, 10)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from srum.models.blip3o.config import DECODER

Steps = list[tuple[Tensor, Tensor]]


class Decoder:
    """UNet, autoencoder and schedule. Its images follow from features, noise, steps and guidance alone."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        parts = folder / DECODER
        self.unet = _part(UNet2DConditionModel, parts / "unet", device, dtype)
        self.autoencoder = _part(AutoencoderKL, parts / "vae", device, dtype)
        self.scheduler = EulerDiscreteScheduler.from_pretrained(parts / "scheduler")
        self.device, self.dtype, self.side = device, dtype, usual_side(folder)

    def noise(self, size: tuple[int, int], seed: int) -> Tensor:
        """Standard normal (4, H / 8, W / 8) of an image of (H, W) pixels, from the seed alone."""
        shape = (self.unet.config.in_channels, size[0] // self.shrinks, size[1] // self.shrinks)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @property
    def shrinks(self) -> int:
        """Pixels per latent and side."""
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    def latents(
        self,
        features: Tensor,
        blank: Tensor | None,
        noise: Tensor,
        size: tuple[int, int],
        steps: int,
        guidance: float,
        steps_out: Steps | None = None,
    ) -> Tensor:
        """Unscaled latents (B, 4, H / 8, W / 8) of features (B, N, C). ``guidance`` > 1 compares with the features of
        a ``blank`` prompt (N, C); ``steps_out`` receives the UNet's input and output of every step."""
        guided = guidance > 1
        given = features
        if guided:
            assert blank is not None
            given = torch.cat([blank.expand_as(features), features])
        height, width = size
        time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float, device=self.device)
        added = {"text_embeds": given.mean(dim=1).to(self.dtype), "time_ids": time_ids.expand(len(given), -1)}
        self.scheduler.set_timesteps(steps, device=self.device)
        x = noise.to(self.device) * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(x.repeat(2, 1, 1, 1) if guided else x, t)
            predicted = self.unet(
                scaled.to(self.dtype), t, encoder_hidden_states=given.to(self.dtype), added_cond_kwargs=added
            ).sample.float()
            if steps_out is not None:
                steps_out.append((scaled, predicted))
            if guided:
                without, wanted = predicted.chunk(2)
                predicted = without + guidance * (wanted - without)
            x = self.scheduler.step(predicted, t, x).prev_sample
        return x / self.autoencoder.config.scaling_factor

    def images(self, latents: Tensor) -> list[Image.Image]:
        """Images of unscaled latents (B, 4, h, w); pixels are rounded."""
        pixels = self.autoencoder.decode(latents.to(self.dtype)).sample.float()
        levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return [Image.fromarray(np.asarray(x)) for x in levels.permute(0, 2, 3, 1).cpu()]


def usual_side(folder: Path) -> int:
    """Of a decoder's usual images, in pixels, as its configs say."""
    unet, vae = (json.loads((folder / DECODER / part / "config.json").read_text()) for part in ("unet", "vae"))
    return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)


def _part(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A network of diffusers, frozen; its file may carry the variant of its type in its name."""
    variant = "bf16" if any(folder.glob("*.bf16.safetensors")) else None
    return kind.from_pretrained(folder, variant=variant, torch_dtype=dtype).to(device).eval().requires_grad_(False)
