"""What checkpoint folders have in common, whatever the architecture: fields of configs that are read or refused,
weights under the names that others give them, the tokenizer. Every error names the file."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from srum.errors import ModelError
from srum.json_files import read_json
from srum.tensors import fill, open_tensors, shards

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
BUFFERS = re.compile(r"(?:^|\.)(?:inv_freq|position_ids|num_batches_tracked)$")  # computed or not used, if stored
ROPE: Mapping[str, tuple[Any, ...]] = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1.0,),
}
NAMED = 3  # tensors that a message names
PICKLES = (".bin", ".pth", ".pt", ".ckpt")  # how files of weights end that may run code when they are read

Official = Callable[[str], str | None]  # an architecture's name of a stored tensor; None where it does not use it


# --- configs


def require_values(path: Path, values: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    """ModelError for a field that changes numbers and has a value that the network does not compute with."""
    for name, allowed in supported.items():
        if name in values and values[name] not in allowed:
            raise ModelError(f"{path}: {name}: {values[name]!r} is not supported, only {allowed[-1]!r}")
    if other := [kind for kind in values.get("layer_types") or () if kind != "full_attention"]:
        raise ModelError(f"{path}: layer_types: {other[0]!r} is not supported, only 'full_attention'")


def require_heads(path: Path, values: Mapping[str, Any], heads_field: str = "num_attention_heads") -> None:
    """ModelError for heads that do not divide the width, or are of another size than that."""
    width, heads, size = (values.get(name) for name in ("hidden_size", heads_field, "head_dim"))
    if not isinstance(width, int) or not isinstance(heads, int):
        return  # missing, or said to be of the wrong kind where the field is read
    if heads < 1 or width % heads:
        raise ModelError(f"{path}: {heads_field}: {heads} heads do not divide the width of {width}")
    if size not in (None, width // heads):
        raise ModelError(f"{path}: head_dim: {size!r} is not supported, only hidden_size / heads = {width // heads}")


def with_rope(
    path: Path, values: Mapping[str, Any], more: Mapping[str, tuple[Any, ...]] | None = None
) -> dict[str, Any]:
    """The values of a language model with ``rope_theta`` where newer transformers writes ``rope_parameters``.

    Raises ModelError for scaled and partial rope, and for two thetas. ``more``: further fields that an architecture
    reads, with their values; any, where there are none.
    """
    supported = {**ROPE, **(more or {})}
    thetas = {values["rope_theta"]} if values.get("rope_theta") is not None else set()
    for part in ("rope_scaling", "rope_parameters"):
        rope = values.get(part) or {}
        if not isinstance(rope, dict):
            raise ModelError(f"{path}: {part}: expected an object, got {rope!r}")
        for name, value in rope.items():
            allowed = supported.get(name, (None,))
            if name != "rope_theta" and value is not None and allowed and value not in allowed:
                raise ModelError(f"{path}: {part}.{name}: {value!r} is not supported, only rope that is not scaled")
        thetas |= {rope["rope_theta"]} if "rope_theta" in rope else set()
    if len(thetas) > 1:
        raise ModelError(f"{path}: rope_theta is both {' and '.join(map(str, sorted(thetas)))}; leave one")
    return {**values, **({"rope_theta": thetas.pop()} if thetas else {})}


# --- weights


def weight_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files that hold the network's tensors: one of ``names``, or all shards of its index. Raises ModelError, for
    pickles in their place with what to do."""
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return shards(index)
    if pickled := [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLES]:
        raise ModelError(
            f"{folder} has its weights as {', '.join(pickled)}, a pickle, which may run code and is not read: srum "
            "convert makes a folder of safetensors of the model's"
        )
    raise ModelError(f"{folder} has none of {', '.join([*names, *(f'{name}.index.json' for name in names)])}")


def official_names(stored: Iterable[str], official: Official) -> Iterator[tuple[str, str]]:
    """The official name of each tensor of a file, and the file's own, but for what the network does not use.

    What a wrapper put before a name (DDP, torch.compile, FSDP) is taken off; buffers may be there.
    """
    for own in stored:
        name = WRAPPERS.sub("", own)
        if not BUFFERS.search(name) and (known := official(name)) is not None:
            yield known, own


@dataclass(frozen=True)
class Headers:
    """Of every tensor of a checkpoint by its official name: its file, its shape and its name there; no weight is read.

    ``types`` counts the types on disk, ``twice`` has the names that several tensors have.
    """

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    types: Counter[str]
    stored: dict[str, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, paths: Iterable[Path], official: Official) -> Headers:
        """Those of all files. Raises TensorError for one that is damaged."""
        headers = cls({}, {}, Counter())
        for path in paths:
            with open_tensors(path) as tensors:
                for name, own in official_names(tensors.keys(), official):
                    entry = tensors.get_slice(own)
                    headers.twice.extend([name] if name in headers.files else [])
                    headers.files[name], headers.stored[name] = path, own
                    headers.shapes[name] = tuple(entry.get_shape())
                    headers.types[entry.get_dtype()] += 1
        return headers

    def add(self, other: Headers) -> None:
        """Those of ``other``, too, which has other names."""
        self.files.update(other.files)
        self.shapes.update(other.shapes)
        self.types.update(other.types)
        self.stored.update(other.stored)
        self.twice.extend(other.twice)

    def count(self, prefix: str) -> int:
        """How many numbered modules follow a prefix."""
        return len({name[len(prefix) :].split(".")[0] for name in self.shapes if name.startswith(prefix)})

    def read(self, name: str) -> Tensor:
        """A tensor by its official name."""
        with open_tensors(self.files[name]) as tensors:
            tensor: Tensor = tensors.get_tensor(self.stored[name])
        return tensor


def require_fit(
    folder: Path, headers: Headers, expected: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()
) -> None:
    """ModelError, with counts and a few names, unless the tensors are the ``expected`` ones, ``optional`` or not."""
    faults = {
        "missing": sorted(expected.keys() - headers.shapes.keys() - set(optional)),
        "unexpected": sorted(headers.shapes.keys() - expected.keys()),
        "twice": sorted(headers.twice),
        "misshapen": [
            f"{name}: {shape}, expected {expected[name]}"
            for name, shape in sorted(headers.shapes.items())
            if name in expected and shape != expected[name]
        ],
    }
    if named := [f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names]:
        raise ModelError(f"{folder}: its tensors do not fit its config: {'; '.join(named)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(name[:200] for name in names[:NAMED]) + (", ..." if len(names) > NAMED else "")


@torch.no_grad()
def read_into(network: nn.Module, headers: Headers, official: Callable[[str], str]) -> None:
    """Fill a network in its own types, tensor by tensor; ``official`` names each.

    Of a tensor that processes share (``fully_shard``) each reads its own part alone. peft's adapters stay as they are.
    """
    lacking = {name.replace(".base_layer.", "."): tensor for name, tensor in network.named_parameters()}
    lacking = {name: tensor for name, tensor in lacking.items() if ".lora_" not in name}
    for name, tensor in lacking.items():
        with open_tensors(headers.files[official(name)], str(tensor.device)) as tensors:
            fill(tensor, tensors.get_slice(headers.stored[official(name)]))


def fill_frozen(
    part: nn.Module, read: Callable[[str], Tensor | None], device: torch.device, dtype: torch.dtype
) -> None:
    """Give an empty part the weights that ``read`` finds by its names, as ``dtype``, tensor by tensor; None leaves one
    as it is. Its computed tables stay float32. Nothing of it is trained."""
    for name, _ in list(part.named_parameters()):
        if (tensor := read(name)) is not None:
            set_module_tensor_to_device(part, name, device, tensor, dtype)
    for name, _ in list(part.named_buffers()):
        set_module_tensor_to_device(part, name, device)
    part.eval().requires_grad_(False)


def link(source: Path, target: Path) -> None:
    """The same file by another name, or a copy where the file system has no such links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


# --- tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE of ``tokenizer.json``; special tokens are parsed in text, nothing is added around it.

    Raises JsonError, or ModelError, for a file that is none.
    """
    path = folder / "tokenizer.json"
    read_json(path)
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # tokenizers has no type of its own
        raise ModelError(f"{path} is no tokenizer: {' '.join(str(error).split())}") from None
