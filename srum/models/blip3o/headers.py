"""The headers of a checkpoint's files: which tensor is where, and its shape. No weight is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from srum.errors import ModelError
from srum.tensors import open_tensors, shards

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Headers:
    """Of every tensor by its official name: its file and its shape; ``types`` counts the types on disk."""

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    types: Counter[str]

    @classmethod
    def of(cls, folder: Path) -> Headers:
        """Those of all files of a folder. Raises ModelError as :func:`weight_files` does."""
        headers = cls({}, {}, Counter())
        for path in weight_files(folder):
            with open_tensors(path) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    entry = tensors.get_slice(name)
                    headers.files[name], headers.shapes[name] = path, tuple(entry.get_shape())
                    headers.types[entry.get_dtype()] += 1
        return headers

    def count(self, prefix: str) -> int:
        """How many numbered modules follow a prefix."""
        return len({name[len(prefix) :].split(".")[0] for name in self.shapes if name.startswith(prefix)})


def weight_files(folder: Path) -> list[Path]:
    """One file, or all shards of an index. Raises ModelError where there is none, or a shard is missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise ModelError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    return shards(index)
