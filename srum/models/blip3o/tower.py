"""The EVA-CLIP tower whose pooled tokens are the features that are generated (docs/specs/blip3o.md, 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srum.models.blip3o.config import TowerSizes

EPS = 1e-6


class Attention(nn.Module):
    """Of all tokens to all tokens; queries, keys and values come from one linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) -> (B, N, W)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Normalised after, not before: x + LN(attention(x)), then x + LN(mlp(x))."""

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        self.attn, self.norm1 = Attention(sizes.width, sizes.heads), nn.LayerNorm(sizes.width, EPS)
        self.mlp, self.norm2 = Mlp(sizes.width, sizes.inner), nn.LayerNorm(sizes.width, EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class PatchEmbed(nn.Module):
    """Non-overlapping patches of pixels to tokens."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, width), row-major."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class EvaTower(nn.Module):
    """Pixels to tokens; no norm, head or projection after the last block."""

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.patch_embed = PatchEmbed(sizes.width, sizes.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, sizes.side**2 + 1, sizes.width))
        self.blocks = nn.ModuleList([Block(sizes) for _ in range(sizes.layers)])

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> (B, N, W), without the class token."""
        x = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


def pool(tokens: Tensor, stride: int) -> Tensor:
    """Tokens (B, N, W) of a square image -> features (B, W, h, w), the mean of ``stride`` x ``stride`` tokens each."""
    side = int(tokens.shape[1] ** 0.5)
    return F.avg_pool2d(tokens.transpose(1, 2).unflatten(2, (side, side)), stride)
