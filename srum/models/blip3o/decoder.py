"""Features to pixels: Emu2-Gen's decoder, a diffusion model of its own (docs/specs/blip3o.md, 10)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from srum.errors import ModelError
from srum.json_files import read_json
from srum.models.blip3o.config import DECODER
from srum.models.checkpoints import weight_files
from srum.tensors import open_tensors

PARTS = ("unet", "vae")
CONFIGS = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
VARIANT = "diffusion_pytorch_model.bf16"
WEIGHTS = (f"{VARIANT}.safetensors", "diffusion_pytorch_model.safetensors")
FAULTS = ("missing_keys", "mismatched_keys", "error_msgs")  # of what diffusers tells
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


def require_decoder(folder: Path) -> None:
    """Raises JsonError, ModelError or TensorError for a file that is missing or damaged; reads headers alone."""
    for name in CONFIGS:
        read_json(folder / DECODER / name)
    for part in PARTS:
        for path in weight_files(folder / DECODER / part, WEIGHTS):
            with open_tensors(path):
                pass


def usual_side(folder: Path) -> int:
    """Of a decoder's usual images, in pixels, as its configs say."""
    unet, vae = (read_json(folder / DECODER / part / "config.json") for part in PARTS)
    return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)


def _part(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A network of diffusers, frozen; its file may carry the variant of its type in its name. Raises ModelError for
    tensors that do not fit its config, which diffusers would draw by chance where they are missing."""
    (path, *_) = weight_files(folder, WEIGHTS)
    variant = "bf16" if path.name.startswith(VARIANT) else None
    try:
        part, told = kind.from_pretrained(folder, variant=variant, torch_dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, LookupError) as error:  # diffusers has no type of its own
        raise ModelError(f"{folder} does not fit its config: {' '.join(str(error).split())[:200]}") from None
    if faults := [
        f"{len(names)} {fault}: {sorted(names)[0]}" for fault, names in told.items() if names and fault in FAULTS
    ]:
        raise ModelError(f"{folder} does not fit its config: {'; '.join(faults)}")
    return part.to(device).eval().requires_grad_(False)
