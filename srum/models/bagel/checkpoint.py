"""The official file layout: configs, weights in one file or in shards, ``ae.safetensors``, tokenizer.

The network's weights are ``ema.safetensors`` or ``model.safetensors``, or the shards that such a name followed by
``.index.json`` lists.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import AutoencoderKL
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from srum.models.bagel.autoencoder import build_autoencoder, load_official, official_state
from srum.models.bagel.config import BagelConfig
from srum.models.bagel.network import BagelNetwork
from srum.models.bagel.positions import sincos_table

WEIGHT_FILES = ("ema.safetensors", "model.safetensors")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")
TABLES = ("vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed")


def load_network(
    folder: Path,
    config: BagelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> BagelNetwork:
    """The network with the folder's weights, filled tensor by tensor: no second copy of the weights exists at any time.

    Raises FileNotFoundError without a weight file or a shard, ValueError naming missing, unexpected or misshapen
    tensors, before anything is read. The two fixed position tables may be missing: they are computed.
    """
    files = weight_files(folder)
    with torch.device("meta"):
        network = BagelNetwork(config)
    absent = _check_fit(files, network)
    for path in files:
        with safe_open(path, "pt", device=str(device)) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                set_module_tensor_to_device(network, name, device, tensors.get_tensor(name), dtype)
    for name, side in zip(TABLES, (config.vit_max_num_patch_per_side, config.max_latent_size), strict=True):
        if name in absent:
            set_module_tensor_to_device(network, name, device, sincos_table(side, config.llm.hidden_size), dtype)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in TABLES)
    return network


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the network's tensors: one, or all shards of an index. Raises FileNotFoundError."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = [folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise FileNotFoundError(f"{index} lists {', '.join(missing)}, which is not there")
            return shards
    names = ", ".join([*WEIGHT_FILES, *(f"{name}.index.json" for name in WEIGHT_FILES)])
    raise FileNotFoundError(f"{folder} has none of {names}")


def _check_fit(files: Sequence[Path], network: BagelNetwork) -> set[str]:
    """The position tables that the files lack; ValueError if they do not fit the network otherwise. Reads headers."""
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, "pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    absent = set(expected) - set(found)
    missing, unexpected = sorted(absent - set(TABLES)), sorted(set(found) - set(expected))
    misshapen = [
        f"{name}: {shape}, expected {expected[name]}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
    if missing or unexpected or misshapen:
        faults = f"missing {missing}, unexpected {unexpected}, misshapen {misshapen}"
        raise ValueError(f"{files[0]} does not fit its config; {faults}")
    return absent & set(TABLES)


def load_autoencoder(folder: Path, config: BagelConfig) -> AutoencoderKL:
    """The autoencoder in float32."""
    autoencoder = build_autoencoder(config.autoencoder)
    load_official(autoencoder, {k: v.float() for k, v in load_file(folder / "ae.safetensors").items()})
    return autoencoder.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE of ``tokenizer.json``; special tokens are parsed in text, nothing is added around it."""
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


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
