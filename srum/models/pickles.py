"""Pickled weights, as authors publish them: they are not read where a model is loaded, since a pickle may run code, but
turned into safetensors once, by torch's reader that admits tensors alone."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from srum.errors import ModelError
from srum.models import shipped_architecture
from srum.models.checkpoints import PICKLES, link
from srum.tensors import read_tensors

WRAPPED = ("model", "state_dict", "module")  # where a trainer puts the tensors among other things


def pickled(folder: Path) -> list[Path]:
    """The pickles of a folder and its folders, but for what a download leaves in hidden ones."""
    return [path for path in _files(folder) if path.suffix in PICKLES]


def convert(source: Path, out: Path) -> list[Path]:
    """Make ``out``: a folder with all of ``source``, its pickles as safetensors; or of a file a file of the other kind,
    safetensors of a pickle, and of safetensors the pickle that the authors' code reads.

    A pickle of a folder keeps its name, unless the architecture that marks the folder wants another (``renamed`` of its
    module). Returns what was converted. Raises ModelError where there is nothing to convert, where ``out`` exists, and
    for a pickle of more than tensors.
    """
    if out.exists():
        raise ModelError(f"{out} exists: convert into a new one")
    if source.is_file():
        return [_converted(source, out)]
    found = pickled(source)
    if not found:
        raise ModelError(f"{source} has no pickled weights ({', '.join(PICKLES)}): there is nothing to convert")
    renamed = getattr(shipped_architecture(source), "renamed", lambda path: f"{path.stem}.safetensors")
    targets = {path: path.relative_to(source).with_name(renamed(path.relative_to(source))) for path in found}
    if len(set(targets.values())) < len(targets):
        raise ModelError(f"{source}: {' and '.join(str(p) for p in targets)} would become one file: leave one of them")
    for path in _files(source):
        if path not in targets:
            link(path, out / path.relative_to(source))
    return [_converted(path, out / target) for path, target in targets.items()]


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _converted(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in PICKLES and target.suffix == ".safetensors":
        save_file(_apart(read_pickle(source)), target, metadata={"format": "pt"})
    elif source.suffix == ".safetensors" and target.suffix in PICKLES:
        torch.save(read_tensors(source), target)
    else:
        raise ModelError(f"{source} to {target}: one has to be .safetensors, the other one of {', '.join(PICKLES)}")
    return target


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by name, also where they stand under one of ``WRAPPED`` among other things.

    Raises ModelError for a damaged file, and for one that holds more than tensors and plain values.
    """
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except pickle.UnpicklingError as error:
        fault = str(error).splitlines()[0][:200] or "it holds more than tensors"
        raise ModelError(f"{path} is no pickle of tensors alone, and is not read: {fault}") from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:  # torch's, of an archive that is cut off
        raise ModelError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
    for name in WRAPPED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()) or not found:
        raise ModelError(f"{path} holds no tensors by name, as a state dict has them")
    return dict(found)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors with storage of their own: tied weights are written twice."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in seen else tensor.contiguous()
        seen.add(storage)
    return out
