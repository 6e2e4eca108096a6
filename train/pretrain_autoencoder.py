"""Pretraining of the embedded model's autoencoder: reconstruct rendered scenes, foreground pixels weighted.

Shapes cover a tenth of an image; with a plain loss the autoencoder learns the background first and the shapes late
(docs/specs/srum.md, section 7), so every pixel that differs from the background counts ``FOREGROUND`` times.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from srum.models.bagel.autoencoder import build_autoencoder, load_official, official_state
from srum.models.bagel.config import AutoencoderConfig
from srum.run_dir import atomic
from srum.shapes.render import BACKGROUND, render, render_distorted
from srum.shapes.scenes import random_scene
from srum.train.pretrain_data import loaded, pickled

FOREGROUND = 6.0
KL_WEIGHT = 1e-4
BATCH = 32
PEAK_LR = 1.5e-3


def scene_pixels(rng: np.random.Generator) -> np.ndarray:
    """A random image of the world, uint8 (64, 64, 3): 0-5 things, one in eight badly drawn."""
    scene = random_scene(int(rng.integers(0, 6)), rng, allow_held_out=True)
    return render_distorted(scene, rng).image if rng.random() < 0.125 else render(scene)


class SceneBatches(Dataset[bytes]):
    """``steps`` pickled batches (BATCH, 64, 64, 3) uint8; batch k depends on the seed and k alone."""

    def __init__(self, seed: int, steps: int) -> None:
        self.seed, self.steps = seed, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, k: int) -> bytes:
        rng = np.random.default_rng((self.seed, k))
        return pickled(torch.from_numpy(np.stack([scene_pixels(rng) for _ in range(BATCH)])))


def as_pixels(batch: Tensor, device: torch.device) -> Tensor:
    """(N, 3, 64, 64) in [-1, 1] of uint8 (N, 64, 64, 3)."""
    return batch.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def loss_of(autoencoder: AutoencoderKL, x: Tensor) -> Tensor:
    """Weighted absolute plus squared error, and a small KL term that keeps the latent smooth."""
    posterior = autoencoder.encode(x).latent_dist
    y = autoencoder.decode(posterior.sample()).sample.float()
    background = torch.tensor(BACKGROUND, dtype=torch.float32, device=x.device).view(1, 3, 1, 1) / 127.5 - 1
    foreground = ((x - background).abs().amax(1, keepdim=True) > 0.02).float()
    weight = 1 + (FOREGROUND - 1) * F.max_pool2d(foreground, 3, stride=1, padding=1)
    error = (y - x).abs() + 2 * (y - x).square()
    return (weight * error).mean() + KL_WEIGHT * posterior.kl().float().mean() / 64


def pretrain_autoencoder(
    folder: Path, config: AutoencoderConfig, steps: int, seed: int = 0, device: str = "cpu", workers: int = 0
) -> AutoencoderConfig:
    """Train for ``steps`` (resuming from ``folder``), write ``ae.safetensors`` and return the config, its scale
    and shift set so that latents have zero mean and unit variance."""
    torch.manual_seed(seed)
    place = torch.device(device)
    autoencoder = build_autoencoder(config).to(place)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.0)
    state_file = folder / "autoencoder_state.pt"
    done = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True, map_location=place)
        autoencoder.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    progress = tqdm(range(done, steps), initial=done, total=steps, desc="autoencoder", disable=None)
    for step, batch in zip(progress, loaded(SceneBatches(seed, steps), done, workers), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x = as_pixels(batch, place)
        torch.manual_seed((seed << 32) + step)
        with torch.autocast(place.type, dtype=torch.bfloat16):
            loss = loss_of(autoencoder, x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 300 == 0 or step + 1 == steps:
            print(f"autoencoder step {step + 1} loss {loss.item():.4f}", flush=True)
            state = {"model": autoencoder.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            with atomic(state_file) as partial:
                torch.save(state, partial)
    return _finish(autoencoder.eval(), config, folder, seed)


@torch.no_grad()
def _finish(autoencoder: AutoencoderKL, config: AutoencoderConfig, folder: Path, seed: int) -> AutoencoderConfig:
    device = next(autoencoder.parameters()).device
    samples = (as_pixels(batch, device) for batch in loaded(SceneBatches(seed + 1, 8), 0, 0))
    means = torch.cat([autoencoder.encode(x).latent_dist.mean for x in samples])
    shift, scale = means.mean().item(), 1 / means.std().item()
    save_file({name: x.cpu() for name, x in official_state(autoencoder, config).items()}, folder / "ae.safetensors")
    return config.model_copy(update={"shift_factor": shift, "scale_factor": scale})


def read_autoencoder(folder: Path, config: AutoencoderConfig) -> AutoencoderKL:
    """The autoencoder that ``pretrain_autoencoder`` wrote."""
    autoencoder = build_autoencoder(config)
    load_official(autoencoder, load_file(folder / "ae.safetensors"))
    return autoencoder.eval().requires_grad_(False)
