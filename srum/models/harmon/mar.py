"""MAR: an encoder of the visible tokens of an image and a decoder over its whole grid (docs/specs/harmon.md, 6 and 8).

An image is a grid (h, w) of n tokens, of which some are hidden; in front of them stand the buffers, which never are.
Rows of several images are padded on the right. D encoder width, E decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from srum.geometry import Size
from srum.models.harmon.config import MarSizes
from srum.models.harmon.head import DiffusionLoss

EPS = 1e-6


@dataclass(frozen=True)
class Masked:
    """An image of which some tokens are hidden: the ``visible`` ones (L, C), row-major, and which those are in the
    ``grid`` (h, w): ``hidden`` (h w,)."""

    visible: Tensor
    hidden: Tensor
    grid: Size

    @classmethod
    def of(cls, latent: Tensor, hidden: Tensor) -> Masked:
        """Of a latent (C, h, w)."""
        return cls(latent.flatten(1).T[~hidden], hidden, (latent.shape[1], latent.shape[2]))

    @classmethod
    def seen(cls, latent: Tensor) -> Masked:
        """A latent (C, h, w) all of whose tokens are visible."""
        return cls.of(latent, torch.zeros(latent[0].numel(), dtype=torch.bool, device=latent.device))


class Attention(nn.Module):
    """Of all tokens of a row to one another; queries, keys and values come from one linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, present: Tensor | None) -> Tensor:
        """(B, L, W) -> (B, L, W)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=present).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Normalised before: x + attention(LN(x)), then x + mlp(LN(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, EPS), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, EPS), Mlp(width)

    def forward(self, x: Tensor, present: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), present)
        return x + self.mlp(self.norm2(x))


class Mar(nn.Module):
    """Encoder, decoder and diffusion head."""

    def __init__(self, sizes: MarSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, decoder_width, cells = sizes.width, sizes.decoder_width, sizes.grid**2
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, sizes.buffers + cells, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, sizes.buffers + cells, decoder_width))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, cells, decoder_width))
        self.z_proj, self.z_proj_ln = nn.Linear(sizes.channels, width), nn.LayerNorm(width, EPS)
        self.encoder_blocks = nn.ModuleList([Block(width, sizes.heads) for _ in range(sizes.depth)])
        self.encoder_norm = nn.LayerNorm(width, EPS)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_blocks = nn.ModuleList(
            [Block(decoder_width, sizes.decoder_heads) for _ in range(sizes.decoder_depth)]
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, EPS)
        self.diffloss = DiffusionLoss(sizes)

    def positions(self, table: Tensor, grid: Size) -> Tensor:
        """Rows of a learned table (1, buffers + cells or cells, W) for a ``grid``: those of the cells resized to it,
        those of the buffers, which stand in front, as they are."""
        side = self.sizes.grid
        buffers, cells = table[0].split([table.shape[1] - side**2, side**2])
        if grid != (side, side):
            plane = cells.float().T.unflatten(1, (side, side))[None]
            cells = F.interpolate(plane, size=grid, mode="bilinear", align_corners=False)[0].flatten(1).T
        return torch.cat([buffers, cells])

    def encoder_inputs(self, image: Masked) -> Tensor:
        """Buffers and visible tokens (buffers + L, D) as the blocks get them."""
        buffers, cells = self.positions(self.encoder_pos_embed_learned, image.grid).split(
            [self.sizes.buffers, image.hidden.numel()]
        )
        visible = self.z_proj(image.visible) + cells[~image.hidden]
        return self.z_proj_ln(torch.cat([self.fake_latent + buffers, visible]))

    def encode(self, images: Sequence[Masked]) -> list[Tensor]:
        """Of each image its buffers and visible tokens (buffers + L, D)."""
        rows = [self.encoder_inputs(image) for image in images]
        x, present = padded(rows)
        for block in self.encoder_blocks:
            x = block(x, present)
        return unpadded(self.encoder_norm(x), rows)

    def decode(self, states: Sequence[Tensor], images: Sequence[Masked]) -> list[Tensor]:
        """Of each image what its tokens, hidden or not, are drawn after (h w, E), from ``states`` (buffers + L, D)."""
        rows = [self._filled(state, image) for state, image in zip(states, images, strict=True)]
        x, present = padded(rows)
        for block in self.decoder_blocks:
            x = block(x, present)
        decoded = unpadded(self.decoder_norm(x), rows)
        return [
            z[self.sizes.buffers :] + self.positions(self.diffusion_pos_embed_learned, image.grid)
            for z, image in zip(decoded, images, strict=True)
        ]

    def _filled(self, state: Tensor, image: Masked) -> Tensor:
        """The decoder's input: buffers and visible tokens in their places, the mask token in those of the hidden."""
        buffers, visible = self.decoder_embed(state).split([self.sizes.buffers, len(image.visible)])
        masks = self.mask_token[0].to(visible.dtype).expand(image.hidden.numel(), -1)
        whole = torch.cat([buffers, masks.index_put((~image.hidden,), visible)])
        return whole + self.positions(self.decoder_pos_embed_learned, image.grid)


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows (L, W) side by side (B, L, W), and, where they are not of one length, which columns hold a token, as a mask
    (B, 1, 1, L) of attention."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    x = pad_sequence(list(rows), batch_first=True)
    if all(len(row) == x.shape[1] for row in rows):
        return x, None
    return x, (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, None, None]


def unpadded(x: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """(B, L, W) as rows of the lengths of ``rows``."""
    return [states[: len(row)] for states, row in zip(x, rows, strict=True)]
