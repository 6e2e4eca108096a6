"""Fixed tables: 2-D sin-cos positions, timestep sinusoids, rotary angles (docs/specs/bagel.md, sections 5, 6 and 8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srum.errors import ModelError


def sincos_table(side: int, width: int) -> Tensor:
    """(side * side, width) float32; row-major ids, the first half encodes the column, the second half the row."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    code = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns = code[None, :, :].expand(side, side, -1)
    rows = code[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(side * side, width).float()


def grid_ids(grid: tuple[int, int], side: int) -> Tensor:
    """Position ids of an (h, w) grid in a table of ``side`` per row: id = row * side + column. (h * w,)"""
    h, w = grid
    if h > side or w > side:
        raise ModelError(f"grid {h}x{w} exceeds the position table of side {side}")
    return (torch.arange(h)[:, None] * side + torch.arange(w)).flatten()


def interpolated_grid_ids(grid: tuple[int, int], side: int) -> Tensor:
    """Ids that stretch the grid over the whole table (``interpolate_pos``; not used by the release). (h * w,)

    Fractions and boundaries are stepped in float32, as in the reference, so that exact ties fall the same way.
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    rows, columns = (torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / n), boundaries, right=True) for n in grid)
    return (rows[:, None] * side + columns).flatten()


def timestep_sinusoid(t: Tensor, width: int = 256) -> Tensor:
    """(N,) timesteps in [0, 1] to (N, width) float32, cosines first; t is not multiplied by 1000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (N, head_dim) in float32 for integer positions (N,), half-split layout."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (N, heads, head_dim) by angles (N, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
