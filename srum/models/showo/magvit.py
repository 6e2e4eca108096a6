"""MAGVIT-v2: images to ids of 16 x 16 pixels, and back (docs/specs/showo.md, 5). Names are those of its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

from srum.errors import ModelError
from srum.models.checkpoints import Headers

GROUPS, EPS = 32, 1e-6


@dataclass(frozen=True)
class MagvitSizes:
    """The width and the number of blocks of each level of the encoder (``down``) and the decoder (``up``), the finest
    first, and the bits of an id."""

    down: Sequence[tuple[int, int]]
    up: Sequence[tuple[int, int]]
    bits: int

    @classmethod
    def of(cls, headers: Headers) -> MagvitSizes:
        """Read off the tensors. Raises ModelError where they are another model's."""

        def levels(prefix: str) -> list[tuple[int, int]]:
            return [
                (headers.shapes[f"{prefix}{level}.block.0.conv1.weight"][0], headers.count(f"{prefix}{level}.block."))
                for level in range(headers.count(prefix))
            ]

        try:
            sizes = cls(levels("encoder.down."), levels("decoder.up."), headers.shapes["quantize.power_vals"][0])
        except (KeyError, IndexError) as error:
            raise ModelError(f"magvitv2: its tensors are no MAGVIT-v2's: {error}") from None
        if not sizes.down or not sizes.up:
            raise ModelError("magvitv2: its tensors are no MAGVIT-v2's")
        return sizes


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = _norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = _norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, h, w) to (B, after, h, w)."""
        made = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return made + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same."""
        normed = self.norm(x)
        q, k, v = (one(normed).flatten(2).transpose(1, 2) for one in (self.q, self.k, self.v))
        made: Tensor = self.proj_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:]))
        return x + made


class Resampling(nn.Module):
    """Half the sides, with padding on the right and below alone, or twice the sides."""

    def __init__(self, width: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2) if down else nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h / 2, w / 2) or (B, C, 2 h, 2 w)."""
        made: Tensor = self.conv(pad(x, (0, 1, 0, 1)) if self.down else interpolate(x, scale_factor=2.0))
        return made


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=EPS)


def _level(before: int, width: int, blocks: int, resampling: str | None) -> nn.Module:
    level = nn.Module()
    level.block = nn.ModuleList([Block(before if number == 0 else width, width) for number in range(blocks)])
    if resampling:
        level.add_module(resampling, Resampling(width, resampling == "downsample"))
    return level


def _through(level: Any, x: Tensor) -> Tensor:
    for part in (*level.block, getattr(level, "downsample", nn.Identity()), getattr(level, "upsample", nn.Identity())):
        x = part(x)
    return x


def _middle(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"block_1": Block(width, width), "attn_1": Attention(width), "block_2": Block(width, width)})


class Encoder(nn.Module):
    """Pixels in [-1, 1] to the numbers whose signs are the bits of ids."""

    def __init__(self, sizes: MagvitSizes) -> None:
        super().__init__()
        before = sizes.down[0][0]
        self.conv_in = nn.Conv2d(3, before, 3, padding=1)
        self.down = nn.ModuleList()
        for number, (width, blocks) in enumerate(sizes.down, start=1):
            self.down.append(_level(before, width, blocks, "downsample" if number < len(sizes.down) else None))
            before = width
        self.mid = _middle(before)
        self.norm_out = _norm(before)
        self.conv_out = nn.Conv2d(before, sizes.bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(sizes.bits, sizes.bits, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, bits, H / 16, W / 16)."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = _through(level, x)
        for part in self.mid.values():
            x = part(x)
        z: Tensor = self.quant_conv(self.conv_out(silu(self.norm_out(x))))
        return z


class Decoder(nn.Module):
    """Bits of ids as signs to pixels, around [-1, 1]."""

    def __init__(self, sizes: MagvitSizes) -> None:
        super().__init__()
        widest = sizes.up[-1][0]
        befores = [*(width for width, _ in sizes.up[1:]), widest]
        self.post_quant_conv = nn.Conv2d(sizes.bits, sizes.bits, 1)
        self.conv_in = nn.Conv2d(sizes.bits, widest, 3, padding=1)
        self.mid = _middle(widest)
        self.up = nn.ModuleList()
        for number, (before, (width, blocks)) in enumerate(zip(befores, sizes.up, strict=True)):
            self.up.append(_level(before, width, blocks, "upsample" if number else None))
        self.norm_out = _norm(sizes.up[0][0])
        self.conv_out = nn.Conv2d(sizes.up[0][0], 3, 3, padding=1)

    def forward(self, signs: Tensor) -> Tensor:
        """(B, bits, h, w) to (B, 3, 16 h, 16 w)."""
        x = self.conv_in(self.post_quant_conv(signs))
        for part in self.mid.values():
            x = part(x)
        for level in reversed(list(self.up)):
            x = _through(level, x)
        pixels: Tensor = self.conv_out(silu(self.norm_out(x)))
        return pixels


class Magvit(nn.Module):
    """Both, without a table: the code of an id is the signs of its bits, the highest first."""

    def __init__(self, sizes: MagvitSizes) -> None:
        super().__init__()
        self.bits = sizes.bits
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to ids (B, H / 16, W / 16)."""
        return ((self.encoder(pixels) > 0).long() << self._places(pixels.device)).sum(dim=1)

    def decode(self, ids: Tensor) -> Tensor:
        """Ids (B, h, w) to pixels (B, 3, 16 h, 16 w), around [-1, 1]."""
        return self.decoder(self.signs(ids))  # type: ignore[no-any-return]

    def signs(self, ids: Tensor) -> Tensor:
        """Ids (B, h, w) to +1 and -1 (B, bits, h, w)."""
        return (ids[:, None].long() >> self._places(ids.device) & 1).float() * 2 - 1

    def _places(self, device: torch.device) -> Tensor:
        """How far each channel's bit is shifted, (bits, 1, 1)."""
        return torch.arange(self.bits - 1, -1, -1, device=device)[:, None, None]
