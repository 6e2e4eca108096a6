"""Keys and values of a batch of contexts, preallocated and shared by everything that attends to them.

Rows are contexts of different lengths. Every append takes the same block of columns in all rows; ``valid`` says which
columns hold a token of which row, so that no row is ever moved. A block that is not kept (a denoising step) is written
over by the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """What a layer sees of a cache: keys and values (rows, kv heads, S, head dim), new ones going to ``columns`` (n,).

    Where they go is a tensor so that a step of decoding, which writes one column further each time, is always the same.
    """

    keys: Tensor
    values: Tensor
    columns: Tensor

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put (rows, kv heads, n, head dim) into the columns; returns all keys and values."""
        return self.keys.index_copy_(2, self.columns, k), self.values.index_copy_(2, self.columns, v)


@dataclass
class Kept:
    """What a layer keeps of the beginnings of rows: keys and values (rows, kv heads, S, head dim), those written first.

    What is written later goes on from them and is not kept, so that it may have gradients.
    """

    keys: Tensor | None = None
    values: Tensor | None = None

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, kv heads, n, head dim) behind what is kept; returns all keys and values."""
        if self.keys is None or self.values is None:
            self.keys, self.values = k, v
            return k, v
        return torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)


class Cache:
    """``keys[i]``, ``values[i]``, layer i: (rows, kv heads, capacity, head dim); ``position`` (rows,): next of rope.

    ``layers``: the device of every layer; all else is on ``device``.
    """

    def __init__(
        self,
        layers: Sequence[torch.device],
        rows: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (rows, kv_heads, 0, head_dim)
        self.keys = [torch.zeros(shape, device=own, dtype=dtype) for own in layers]
        self.values = [torch.zeros(shape, device=own, dtype=dtype) for own in layers]
        self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.position = torch.zeros(rows, dtype=torch.long, device=device)
        self.used = 0

    @property
    def rows(self) -> int:
        return self.valid.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Tokens in each row. (rows,)"""
        return self.context.sum(1)

    @property
    def context(self) -> Tensor:
        """Which columns hold a token of each row. (rows, used)"""
        return self.valid[:, : self.used]

    def reserve(self, columns: int) -> None:
        """Make room for ``columns`` more columns."""
        missing = self.used + columns - self.valid.shape[1]
        if missing > 0:
            pad = (0, 0, 0, missing)
            self.keys = [torch.nn.functional.pad(k, pad) for k in self.keys]
            self.values = [torch.nn.functional.pad(v, pad) for v in self.values]
            self.valid = torch.nn.functional.pad(self.valid, (0, missing))

    def memories(self, columns: Tensor, width: int) -> list[Memory]:
        """Of every layer: its first ``width`` columns, ``columns`` (n,) of which are to be written."""
        return [Memory(k[:, :, :width], v[:, :, :width], columns) for k, v in zip(self.keys, self.values, strict=True)]

    def keep(self, present: Tensor, advance: Tensor) -> None:
        """Keep the block just written: ``present`` (rows, n) marks real tokens, ``advance`` (rows,) moves positions."""
        end = self.used + present.shape[1]
        self.valid[:, self.used : end] = present
        self.position = self.position + advance
        self.used = end

    def select(self, rows: Sequence[int] | Tensor) -> Cache:
        """A copy with these rows, in this order, with repetition: one context shared by several continuations."""
        index = torch.as_tensor(rows, device=self.valid.device)
        copy = object.__new__(Cache)
        copy.keys = [k[index.to(k.device), :, : self.used] for k in self.keys]
        copy.values = [v[index.to(v.device), :, : self.used] for v in self.values]
        copy.valid = self.valid[index, : self.used]
        copy.position = self.position[index]
        copy.used = self.used
        return copy

    def rearranged(self, rows: Sequence[int]) -> Cache:
        """``select``, or this cache itself where that would change nothing."""
        return self if list(rows) == list(range(self.rows)) else self.select(rows)
