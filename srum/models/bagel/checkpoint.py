"""The official file layout: configs, weights in one file or in shards, ``ae.safetensors``, tokenizer.

The network's weights are ``ema.safetensors`` or ``model.safetensors``, or the shards that such a name followed by
``.index.json`` lists.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import (
    align_module_device,
    get_balanced_memory,
    get_max_memory,
    has_offloaded_params,
    set_module_tensor_to_device,
)
from diffusers import AutoencoderKL
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from srum.errors import ModelError
from srum.models import checkpoints
from srum.models.bagel.autoencoder import build_autoencoder, load_official, official_state
from srum.models.bagel.config import BagelConfig
from srum.models.bagel.network import BagelNetwork
from srum.models.bagel.positions import sincos_table
from srum.models.checkpoints import Headers, Official, official_names, require_fit
from srum.tensors import fill, open_tensors, read_tensors

WEIGHT_FILES = ("ema.safetensors", "model.safetensors")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")
Place = torch.device | str  # of a layer: a device, or "disk"
TABLES = ("vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed")  # fixed, so that a checkpoint may lack them


def load_network(
    folder: Path,
    config: BagelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    layers: Sequence[Place] | Literal["auto"] | None = None,
) -> BagelNetwork:
    """The network with the folder's weights, filled tensor by tensor: no second copy of the weights exists at any time.

    ``layers`` says where each decoder layer goes, a device or "disk"; the rest goes to ``device``, where layers from
    disk and their inputs are brought to be run. "auto" spreads them over all GPUs, then the host's memory, then disk.
    Raises as :func:`empty_network` does.
    """
    network = empty_network(folder, config, dtype)
    if layers is None:
        read_weights(folder, network.to_empty(device=device))
        return network
    places = spread(network, dtype) if layers == "auto" else layers
    device_map = _device_map(network, device, places)
    on_disk: dict[str, dict[str, str]] = {}

    def place_of(name: str) -> Place:
        return next(place for part, place in device_map.items() if name.startswith(f"{part}."))

    for path in weight_files(folder):
        with open_tensors(path) as tensors:
            for name, stored in official_names(tensors.keys(), official(config)):
                if place_of(name) == "disk":
                    kind = str(dtype).removeprefix("torch.")
                    on_disk[name] = {"safetensors_file": str(path), "weight_name": stored, "dtype": kind}
                else:
                    set_module_tensor_to_device(network, name, place_of(name), tensors.get_tensor(stored), dtype)
    for name in TABLES:
        if network.get_parameter(name).is_meta:
            set_module_tensor_to_device(network, name, place_of(name), position_table(config, name), dtype)
    main = torch.device(device)
    network.decoder.devices = [main if str(place) in ("cpu", "disk") else torch.device(place) for place in places]
    dispatch_model(network, device_map, str(main), offload_index=on_disk or None, force_hooks=True)
    return network


def empty_network(folder: Path, config: BagelConfig, dtype: torch.dtype = torch.float32) -> BagelNetwork:
    """The network without storage (meta device), in shape to be filled by :func:`read_weights`.

    Raises ModelError without a weight file or a shard, and naming missing, unexpected or misshapen
    tensors. The two fixed position tables may be missing: they are computed.
    """
    with torch.device("meta"):
        network = BagelNetwork(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    require_fit(folder, Headers.of(weight_files(folder), official(config)), shapes, optional=TABLES)
    return network.to(dtype)


@torch.no_grad()
def read_weights(folder: Path, network: BagelNetwork) -> None:
    """Fill the network with the folder's weights in its own types, tensor by tensor.

    Of a tensor that processes share (``fully_shard``) each reads its own part alone. peft's adapters stay as they are.
    """
    lacking = {name.replace(".base_layer.", "."): tensor for name, tensor in network.named_parameters()}
    device = str(next(iter(lacking.values())).device)
    for path in weight_files(folder):
        with open_tensors(path, device) as tensors:
            for name, stored in official_names(tensors.keys(), official(network.config)):
                fill(lacking.pop(name), tensors.get_slice(stored))
    for name in TABLES:
        if name in lacking:
            fill(lacking[name], position_table(network.config, name))


def spread(network: BagelNetwork, dtype: torch.dtype) -> list[Place]:
    """A place for every decoder layer, by accelerate: the GPUs evenly, the first of which also holds all else."""
    layers, kept = network.decoder.layers, torch.finfo(dtype).bits // 8
    memory = get_max_memory()
    elsewhere = sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in layers.parameters())
    first = next(iter(memory))
    memory[first] = max(0, memory[first] - kept * elsewhere)
    memory = get_balanced_memory(layers, memory, ["Layer"], dtype)
    device_map = infer_auto_device_map(layers, memory, ["Layer"], dtype)
    places = [device_map.get("", device_map.get(str(index))) for index in range(len(layers))]
    return [torch.device("cuda", place) if isinstance(place, int) else place for place in places]


def _device_map(network: BagelNetwork, device: torch.device | str, layers: Sequence[Place]) -> dict[str, Place]:
    """A place for every part of the network, by its name."""
    decoder = "language_model.model"
    outer = [name for name, _ in network.named_children() if name != "language_model"]
    outer += [f"{decoder}.{name}" for name, _ in network.decoder.named_children() if name != "layers"]
    rest = {name: device for name in [*outer, "language_model.lm_head"]}
    return rest | {f"{decoder}.layers.{index}": place for index, place in enumerate(layers)}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the network's tensors: one, or all shards of an index. Raises ModelError."""
    return checkpoints.weight_files(folder, WEIGHT_FILES)


def official(config: BagelConfig) -> Official:
    """The network's name of a tensor: the language model may stand alone, and what the ViT has beyond the layer that is
    used may be there (docs/specs/bagel.md, 2)."""
    unused = (
        f"vit_model.vision_model.encoder.layers.{config.vit.num_hidden_layers - 1}.",
        "vit_model.vision_model.head.",
    )

    def name(stored: str) -> str | None:
        if stored.startswith(("model.layers.", "model.embed_tokens.", "model.norm", "lm_head.")):
            stored = f"language_model.{stored}"
        return None if stored.startswith(unused) else stored

    return name


def position_table(config: BagelConfig, name: str) -> Tensor:
    """One of the ``TABLES``, computed."""
    sides = dict(zip(TABLES, (config.vit_max_num_patch_per_side, config.max_latent_size), strict=True))
    return sincos_table(sides[name], config.llm.hidden_size)


def load_autoencoder(folder: Path, config: BagelConfig) -> AutoencoderKL:
    """The autoencoder in float32. Raises TensorError, and ModelError for tensors that do not fit its config."""
    autoencoder, path = build_autoencoder(config.autoencoder), folder / "ae.safetensors"
    weights = {name: value.float() for name, value in read_tensors(path).items()}
    try:
        load_official(autoencoder, weights)
    except (RuntimeError, LookupError, ValueError) as error:  # torch's of a strict load, diffusers' of the names
        raise ModelError(f"{path} does not fit its config: {' '.join(str(error).split())[:200]}") from None
    return autoencoder.eval().requires_grad_(False)


def save_checkpoint(
    folder: Path,
    config: BagelConfig,
    weights: Mapping[str, Tensor],
    autoencoder: AutoencoderKL,
    tokenizer_folder: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "1TB",
) -> None:
    """Write the official layout; ``weights`` are the network's, ``tokenizer_folder`` has the tokenizer's files.

    Weights above ``max_shard_size`` (bytes, or such as "5GB") become shards with an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.write(folder)
    save_torch_state_dict(
        {k: v.detach().to("cpu", dtype).contiguous() for k, v in weights.items()},
        folder,
        filename_pattern="ema{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    save_file(official_state(autoencoder, config.autoencoder), folder / "ae.safetensors")
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file() and tokenizer_folder != folder:
            shutil.copyfile(tokenizer_folder / name, folder / name)


def stored_weights(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``network``, with what accelerate leaves on disk until it is needed."""
    weights: dict[str, Tensor] = network.state_dict()
    for name, module in network.named_modules():
        if has_offloaded_params(module):
            with align_module_device(module, torch.device("cpu")):
                weights |= {f"{name}.{own}": x.detach() for own, x in module.named_parameters(recurse=False)}
    return weights


def official_weights(network: nn.Module, merge: bool) -> dict[str, Tensor]:
    """The weights under official names, with ``merge`` those that peft's adapters make of them.

    The network keeps its adapters and its own weights; those on disk are read into the host's memory. Raises ModelError
    for adapters that are not to be merged, since the official layout has no place for them, and for adapters of layers
    on disk.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # an import of weight, which only saving needs

    adapted: dict[str, Any] = {
        name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)
    }
    if adapted and not merge:
        raise ModelError(f"{len(adapted)} layers have adapters, which the official layout cannot hold: save with merge")
    inside = tuple(f"{name}." for name in adapted)
    weights = {name: x for name, x in stored_weights(network).items() if not name.startswith(inside)}
    for name, module in adapted.items():
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ModelError(f"{name} is on disk, where no adapter can be merged: load the model onto one device")
        merged: Any = copy.deepcopy(module)
        merged.merge()
        weights |= {f"{name}.{own}": x for own, x in merged.get_base_layer().state_dict().items()}
    return weights
