"""Safetensors files: how they are opened, so that one that is cut off or none at all is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from srum.errors import ModelError, SrumError
from srum.json_files import POINTER, POINTER_TO, read_json

SHARD = re.compile(r"[\w.-]{1,200}")  # a file beside the index
NAMED = 3  # shards that an error names


class TensorError(SrumError, ValueError):
    """A safetensors file that is not there, or not whole; the message names it."""


@contextmanager
def open_tensors(path: Path, device: str = "cpu") -> Iterator[Any]:
    """The file as safetensors' ``safe_open`` gives it, its tensors on ``device``.

    Raises TensorError, naming the file, where it is damaged, and where there is none.
    """
    try:
        with safe_open(path, "pt", device=device) as tensors:
            yield tensors
    except FileNotFoundError:
        raise TensorError(f"{path} is missing") from None
    except SafetensorError as error:
        raise TensorError(f"{path} {_fault(path, error)}") from None


def _fault(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        begins = file.read(len(POINTER))
    if begins == POINTER:
        return POINTER_TO
    return f"is not a whole safetensors file: {error}" if begins else "is empty"


def shards(index: Path) -> list[Path]:
    """The files beside an ``index`` that it lists. Raises JsonError, and ModelError for one that is not there."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map of tensors to shards")
    names = sorted({*map(str, weight_map.values())})
    if missing := [name[:80] for name in names if not SHARD.fullmatch(name) or not (index.parent / name).is_file()]:
        more = ", ..." if len(missing) > NAMED else ""
        raise ModelError(f"{index} lists {', '.join(map(repr, missing[:NAMED]))}{more}, which is not there")
    return [index.parent / name for name in names]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name. Raises as ``open_tensors`` does."""
    with open_tensors(path) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)


def read_tensor(path: Path) -> Tensor:
    """The one tensor of a file, floating numbers as float32: a copy, since a tensor of a file keeps two maps of it
    open, of which a process may have 65,530. Raises as ``open_tensors`` does."""
    (values,) = read_tensors(path).values()
    return values.to(torch.float32 if values.is_floating_point() else values.dtype, copy=True)


def tensor_shape(path: Path) -> tuple[int, ...]:
    """The shape of the one tensor of a file, whose values are not read. Raises as ``open_tensors`` does."""
    with open_tensors(path) as tensors:
        (name,) = tensors.keys()
        return tuple(tensors.get_slice(name).get_shape())


def fill(tensor: Tensor, whole: Any) -> None:
    """Copy ``whole``, a tensor or one in a file (``get_slice``), or this process's part of it."""
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()
        tensor = tensor.to_local()
        whole = whole[tuple(slice(first, first + size) for first, size in zip(chunk.offsets, chunk.sizes, strict=True))]
    tensor.copy_(whole[...])
