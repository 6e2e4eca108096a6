"""The official file layouts: which tensors belong to which part, how a part is filled, how all is written back
(docs/specs/harmon.md, 2)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from srum.errors import ModelError
from srum.models import checkpoints
from srum.models.checkpoints import PICKLES, Headers, link, require_fit
from srum.models.harmon.autoencoder import PREFIX, build_autoencoder, official_name
from srum.models.harmon.config import HarmonConfig
from srum.models.harmon.mar import Mar
from srum.tensors import read_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
AUTOENCODER = "kl16"  # the file beside MAR's in the layout of the hub's first repository
EMBEDDING, HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"  # the same numbers, the second may lack
# What draws and does not see, by the beginnings of its names.
GENERATION = ("mar.decoder_", "mar.diffloss.", "mar.mask_token", "mar.diffusion_pos_embed_learned", "proj_out.")
UNREAD = "mar.class_emb.weight"  # a leftover of MAR that is carried along, where it is there


class HarmonNetwork(nn.Module):
    """All that may be trained, by its official names."""

    def __init__(self, config: HarmonConfig) -> None:
        super().__init__()
        width, hidden = config.mar.width, config.qwen.hidden_size
        self.llm = nn.ModuleDict({"model": Qwen2Model._from_config(config.qwen, attn_implementation="sdpa")})
        self.mar = Mar(config.mar)
        self.proj_in = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.proj_out = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width))


def weight_files(folder: Path) -> list[Path]:
    """One file with its shards, or that of the network beside that of the autoencoder. Raises ModelError, naming what
    is pickled, what is missing and what is there several times."""
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return checkpoints.weight_files(folder, [WEIGHTS])
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.stem != AUTOENCODER]
    autoencoder = folder / f"{AUTOENCODER}.safetensors"
    if pickled and (not found or not autoencoder.is_file()):
        named = ", ".join(pickled)
        raise ModelError(f"{folder}: {named} are pickles, which may run code: srum convert {folder} --out NEW_FOLDER")
    if not autoencoder.is_file():
        raise ModelError(f"{folder} has none of {WEIGHTS}, {INDEX}, {autoencoder.name}: the autoencoder is missing")
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise ModelError(f"{folder}: one .safetensors beside {autoencoder.name} has to be Harmon's, there is {there}")
    return [*found, autoencoder]


def _official(stored: str) -> str:
    """The autoencoder's tensors have a prefix only where they share a file with the others."""
    alone = stored.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    return PREFIX + stored if alone else stored


def read_headers(folder: Path) -> Headers:
    """Those of all files of a folder, under the names of the layout that is one file. Raises as ``weight_files``."""
    return Headers.of(weight_files(folder), _official)


def empty_network(config: HarmonConfig) -> HarmonNetwork:
    """What may be trained, without storage."""
    with init_empty_weights(include_buffers=False):
        return HarmonNetwork(config)


def check(folder: Path, config: HarmonConfig, headers: Headers) -> None:
    """Raises ModelError unless every tensor belongs to a part and has its shape; what is never read may lack."""
    with torch.device("meta"):
        autoencoder = build_autoencoder(config.autoencoder)
    expected = {name: tuple(p.shape) for name, p in empty_network(config).named_parameters()}
    expected |= {name: shape for name, (_, shape) in _autoencoder_names(autoencoder, config).items()}
    if HEAD in headers.shapes:
        expected[HEAD] = expected[EMBEDDING]
    read = {name: shape for name, shape in headers.shapes.items() if name != UNREAD}
    require_fit(folder, replace(headers, shapes=read), expected)


def _autoencoder_names(autoencoder: AutoencoderKL, config: HarmonConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Diffusers' name and the official shape of each tensor, by its official name: linear layers are convolutions."""
    levels = len(config.autoencoder.widths)
    names = {}
    for name, tensor in autoencoder.state_dict().items():
        shape = tuple(tensor.shape)
        names[official_name(name, levels)] = name, (*shape, 1, 1) if len(shape) == 2 else shape
    return names


def load_autoencoder(config: HarmonConfig, headers: Headers, device: torch.device) -> AutoencoderKL:
    """The autoencoder, frozen, in float32."""
    autoencoder = build_autoencoder(config.autoencoder)
    state = {}
    for official, (name, _) in _autoencoder_names(autoencoder, config).items():
        state[name] = headers.read(official).float().view(autoencoder.state_dict()[name].shape)
    autoencoder.load_state_dict(state)
    return autoencoder.eval().requires_grad_(False).to(device)


@torch.no_grad()
def fill(network: HarmonNetwork, config: HarmonConfig, headers: Headers) -> None:
    """Fill the network in its own types, tensor by tensor, and compute its table of rotations.

    Of a tensor that processes share (``fully_shard``) each reads its own part alone. peft's adapters stay as they are.
    Raises ModelError for a head that is not the embedding.
    """
    network.llm["model"].rotary_emb = Qwen2RotaryEmbedding(config.qwen).to(network.proj_in[0].weight.device)
    checkpoints.read_into(network, headers, lambda name: name)
    if HEAD in headers.files and not torch.equal(headers.read(EMBEDDING), headers.read(HEAD)):
        raise ModelError(f"{headers.files[HEAD]}: {HEAD} is not {EMBEDDING}, which it has to equal")


def save_checkpoint(source: Path, folder: Path, headers: Headers, weights: Mapping[str, Tensor]) -> None:
    """Write the layout of ``source`` with the network's ``weights``, by their names, in place of its own.

    Files in which nothing changed are the same files, linked where that is possible. Raises ModelError for the folder
    that is read from.
    """
    if folder.resolve() == source.resolve():
        raise ModelError(f"{folder} is where the weights are read from: save to another folder")
    changed = dict(weights) | ({HEAD: weights[EMBEDDING].clone()} if HEAD in headers.files else {})
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(set(headers.files.values())):
        there = [name for name, file in headers.files.items() if file == path]
        if changed.keys().isdisjoint(there):
            link(path, folder / path.name)
            continue
        own = read_tensors(path)
        tensors = {headers.stored[name]: changed.get(name, own[headers.stored[name]]).contiguous() for name in there}
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    if (source / INDEX).is_file():
        _write_index(folder, headers)
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt", ".md", ".py") and path.name != INDEX:
            shutil.copyfile(path, folder / path.name)


def _write_index(folder: Path, headers: Headers) -> None:
    files = sorted({path.name for path in headers.files.values()})
    size = sum((folder / name).stat().st_size for name in files)
    weight_map = {headers.stored[name]: headers.files[name].name for name in sorted(headers.files)}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2))
