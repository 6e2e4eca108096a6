"""What draws: queries, and the diffusion transformer that turns what a language model says of them into features
(docs/specs/blip3o.md, 5 and 7 to 9)."""

from __future__ import annotations

import torch
from diffusers import LuminaNextDiT2DModel
from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_rotary_pos_embed_lumina
from torch import Tensor, nn

from srum.models.blip3o.config import Blip3oConfig, TransformerSizes
from srum.models.queries.generator import Generator, ticks


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


class Blip3oGenerator(Generator):
    """All that may be trained: the queries and the diffusion transformer."""

    def __init__(self, config: Blip3oConfig) -> None:
        super().__init__()
        self.latent_queries = nn.Parameter(torch.zeros(1, config.queries, config.transformer.condition))
        self.dit = DiffusionTransformer(config.transformer, config.grid)

    @property
    def queries(self) -> nn.Parameter:
        """(1, Q, H)."""
        return self.latent_queries

    def forward(self, x: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        """As the transformer does it."""
        velocity: Tensor = self.dit(x, t, conditions)
        return velocity
