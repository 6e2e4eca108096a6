"""The official file layout: which tensors belong to which part, how a part is filled, how all is written back
(docs/specs/blip3o.md, 2)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from srum.errors import ModelError
from srum.models import checkpoints
from srum.models.blip3o.config import DECODER, Blip3oConfig
from srum.models.blip3o.generator import Blip3oGenerator
from srum.models.blip3o.tower import EvaTower
from srum.models.checkpoints import Headers, fill_frozen, link, require_fit
from srum.tensors import read_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Names in our parts and the official ones, by their beginnings; of the first that fits. Every tensor must match.
QWEN = {"model.visual.": "visual.", "model.language_model.": "model.", "lm_head.": "lm_head."}
GENERATOR = {"latent_queries": "model.latent_queries", "dit.": "model.dit.model."}
TOWER = {"": "model.gen_vision_tower.vision_tower.model."}
UNREAD = "model.vae."  # a leftover of training that is carried along
EVA_SOURCE = "jiuhai/eva_clip_vision_tower on the hub (pytorch_model.bin, the same names without the prefix)"


def official_name(name: str, beginnings: Mapping[str, str]) -> str:
    """What a part's tensor is called in the files."""
    ours = next(ours for ours in beginnings if name.startswith(ours))
    return beginnings[ours] + name[len(ours) :]


def read_headers(folder: Path) -> Headers:
    """Those of all files of a folder, under official names also where transformers 5 has written the language model.

    Raises ModelError where there is no file, or a shard is missing.
    """
    return Headers.of(weight_files(folder), _official)


def weight_files(folder: Path) -> list[Path]:
    """One file, or all shards of an index. Raises ModelError."""
    return checkpoints.weight_files(folder, [WEIGHTS])


def _official(stored: str) -> str:
    return official_name(stored, QWEN) if stored.startswith(tuple(QWEN)) else stored


def empty_qwen(config: Blip3oConfig) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL without storage, but for the tables that are computed."""
    with init_empty_weights(include_buffers=False):
        return Qwen2_5_VLForConditionalGeneration._from_config(config.qwen, attn_implementation="sdpa")


def empty_generator(config: Blip3oConfig) -> Blip3oGenerator:
    """What draws, without storage."""
    with torch.device("meta"):
        return Blip3oGenerator(config)


def empty_tower(folder: Path, config: Blip3oConfig) -> EvaTower:
    """The EVA tower without storage. Raises ModelError where the folder has none."""
    if config.tower is None:
        raise ModelError(f"{folder} has no EVA tensors ({TOWER['']}*), which encode images: they are in {EVA_SOURCE}")
    with torch.device("meta"):
        return EvaTower(config.tower)


def check(folder: Path, config: Blip3oConfig, headers: Headers) -> None:
    """Raises ModelError unless every tensor belongs to a part and has its shape; all of the EVA tower's may lack."""
    parts: list[tuple[nn.Module, Mapping[str, str]]] = [
        (empty_qwen(config), QWEN),
        (empty_generator(config), GENERATOR),
    ]
    if config.tower is not None:
        parts.append((empty_tower(folder, config), TOWER))
    expected = {
        official_name(name, beginnings): tuple(parameter.shape)
        for part, beginnings in parts
        for name, parameter in part.named_parameters()
    }
    if _tied(config, headers):
        expected.pop("lm_head.weight", None)
    read = {name: shape for name, shape in headers.shapes.items() if not name.startswith(UNREAD)}
    require_fit(folder, replace(headers, shapes=read), expected)


def load_qwen(
    config: Blip3oConfig, headers: Headers, device: torch.device, dtype: torch.dtype
) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL, frozen."""
    qwen = empty_qwen(config)
    _fill(qwen, QWEN, headers, device, dtype)
    if _tied(config, headers):
        qwen.lm_head.weight = qwen.model.language_model.embed_tokens.weight
    return qwen


def _tied(config: Blip3oConfig, headers: Headers) -> bool:
    """Whether the language model's head is its embedding: where the config allows it and the files have no other."""
    return config.raw.get("tie_word_embeddings", False) and "lm_head.weight" not in headers.shapes


def load_tower(
    folder: Path, config: Blip3oConfig, headers: Headers, device: torch.device, dtype: torch.dtype
) -> EvaTower:
    """The EVA tower, frozen. Raises ModelError where the folder has none."""
    tower = empty_tower(folder, config)
    _fill(tower, TOWER, headers, device, dtype)
    return tower


def _fill(
    part: nn.Module, beginnings: Mapping[str, str], headers: Headers, device: torch.device, dtype: torch.dtype
) -> None:
    def read(name: str) -> Tensor | None:
        official = official_name(name, beginnings)
        return headers.read(official) if official in headers.files else None  # a tied head is not

    fill_frozen(part, read, device, dtype)


def save_checkpoint(source: Path, folder: Path, headers: Headers, weights: Mapping[str, Tensor]) -> None:
    """Write the official layout: ``weights`` of the generator, by its names, in place of those of ``source``.

    Files in which nothing changed are the same files, linked where that is possible: shards without trained weights,
    configs, tokenizer and the decoder, without which the authors' code draws badly. Raises ModelError for the folder
    that is read from.
    """
    if folder.resolve() == source.resolve():
        raise ModelError(f"{folder} is where the weights are read from: save to another folder")
    changed = {official_name(name, GENERATOR): tensor for name, tensor in weights.items()}
    renamed = {name for name, own in headers.stored.items() if name != own}
    rewritten = {headers.files[name] for name in changed.keys() | renamed}
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(set(headers.files.values())):
        if path in rewritten:
            own = read_tensors(path)
            there = [name for name, file in headers.files.items() if file == path]
            tensors = {name: changed.get(name, own[headers.stored[name]]).contiguous() for name in there}
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        else:
            link(path, folder / path.name)
    if (source / INDEX).is_file():
        _write_index(folder, headers)
    kept = {path.name for path in headers.files.values()} | {INDEX}
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt", ".md") and path.name not in kept:
            shutil.copyfile(path, folder / path.name)
    for path in (source / DECODER).rglob("*"):
        if path.is_file():
            link(path, folder / path.relative_to(source))


def _write_index(folder: Path, headers: Headers) -> None:
    files = sorted({path.name for path in headers.files.values()})
    size = sum((folder / name).stat().st_size for name in files)
    weight_map = {name: headers.files[name].name for name in sorted(headers.files)}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2))
