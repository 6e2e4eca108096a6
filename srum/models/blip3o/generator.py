"""What draws: queries, and the diffusion transformer that turns what a language model says of them into features
(docs/specs/blip3o.md, 5 and 7 to 9)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from diffusers import LuminaNextDiT2DModel
from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_rotary_pos_embed_lumina
from torch import Tensor, nn

from srum import flow
from srum.models.base import Sampling
from srum.models.blip3o.config import Blip3oConfig, TransformerSizes
from srum.models.exploring import Explorer

TICKS = 1000  # the transformer counts time in whole ones of these, noise at the last


class DiffusionTransformer(LuminaNextDiT2DModel):
    """Next-DiT of diffusers over single features, with the projection of its condition; no padding token."""

    def __init__(self, sizes: TransformerSizes, grid: int) -> None:
        super().__init__(
            sample_size=grid,
            patch_size=1,
            in_channels=sizes.channels,
            hidden_size=sizes.width,
            num_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_kv_heads=sizes.kv_heads,
            multiple_of=256,
            learn_sigma=False,
            qk_norm=True,
            cross_attention_dim=sizes.width,
        )
        del self.pad_token
        self.grid, self.rotary_width = grid, sizes.width // sizes.heads
        self.caption_projection = PixArtAlphaTextProjection(sizes.condition, sizes.width)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The velocity (B, C, h, w) at features x_t (B, C, h, w), t (B,) in (0, 1], after conditions (B, Q, H)."""
        caption = self.caption_projection(condition.to(self.caption_projection.linear_1.weight.dtype))
        mask = torch.ones(caption.shape[:2], dtype=torch.int32, device=x.device)
        (velocity,) = super().forward(
            x.to(caption.dtype), ticks(t), caption, mask, self.rotary(x.device), {}, return_dict=False
        )
        return velocity

    def rotary(self, device: torch.device) -> Tensor:
        """Complex rotations (h, w, head width / 2) of the places of the grid."""
        return get_2d_rotary_pos_embed_lumina(self.rotary_width, self.grid, self.grid).to(device)


def ticks(t: Tensor) -> Tensor:
    """t in (0, 1] as the transformer is told it: rounded down to thousandths, but for what float32 loses."""
    return torch.floor(t * TICKS + 1e-3)


def timestep(u: Tensor) -> float:
    """The timestep in (0, 1] of a uniform draw () from [0, 1): a whole thousandth, as in the authors' training."""
    return (TICKS - int(u * TICKS)) / TICKS


class Generator(nn.Module):
    """All that may be trained: the queries and the diffusion transformer."""

    def __init__(self, config: Blip3oConfig) -> None:
        super().__init__()
        self.latent_queries = nn.Parameter(torch.zeros(1, config.queries, config.transformer.condition))
        self.dit = DiffusionTransformer(config.transformer, config.grid)


Steps = list[tuple[Tensor, Tensor]]


def sample(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    conditions: Tensor,
    sampling: Sampling,
    steps_out: Steps | None = None,
    explorer: Explorer | None = None,
) -> Tensor:
    """Features (B, C, h, w) of ``noise`` and ``conditions`` (B, Q, H); guidance compares with a condition of zeros.

    ``steps_out`` receives x_t and the guided velocity of every step; with an ``explorer`` some steps are random.
    """
    x, timesteps = noise.float(), schedule(sampling)
    guided = sampling.guidance > 1
    both = torch.cat([torch.zeros_like(conditions), conditions]) if guided else conditions
    for t, following in pairwise(timesteps.tolist()):
        times = torch.full((len(both),), t, device=x.device)
        v = velocity(x.repeat(2, 1, 1, 1) if guided else x, times, both).float()
        if guided:
            without, given = v.chunk(2)
            v = without + sampling.guidance * (given - without)
        if steps_out is not None:
            steps_out.append((x, v))
        x = flow.euler_step(x, v, following - t) if explorer is None else explorer.step(x, v, t, following)
    return x


def schedule(sampling: Sampling) -> Tensor:
    """Timesteps (timesteps,) from 1 to 0, computed in float64: 600 thousandths may not become 599."""
    even = torch.linspace(1.0, 0.0, sampling.timesteps, dtype=torch.float64)
    return flow.shift_timestep(even, sampling.timestep_shift)
