"""The official file layout: configs, ``ema.safetensors`` (or ``model.safetensors``), ``ae.safetensors``, tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from srum.models.bagel.autoencoder import build_autoencoder, load_official, official_state
from srum.models.bagel.config import BagelConfig
from srum.models.bagel.network import BagelNetwork
from srum.models.bagel.positions import sincos_table

WEIGHT_FILES = ("ema.safetensors", "model.safetensors")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")
TABLES = ("vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed")


def load_network(folder: Path, config: BagelConfig, dtype: torch.dtype = torch.float32) -> BagelNetwork:
    """The network with the folder's weights.

    Raises FileNotFoundError without a weight file, ValueError naming missing, unexpected or misshapen tensors. The two
    fixed position tables may be missing: they are computed.
    """
    path = next((folder / n for n in WEIGHT_FILES if (folder / n).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has none of {', '.join(WEIGHT_FILES)}")
    state = load_file(path)
    with torch.device("meta"):
        network = BagelNetwork(config)
    expected = {k: v.shape for k, v in network.state_dict().items()}
    for name, side in zip(TABLES, (config.vit_max_num_patch_per_side, config.max_latent_size), strict=True):
        if name not in state:
            state[name] = sincos_table(side, config.llm.hidden_size)
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    misshapen = [
        f"{k}: {tuple(state[k].shape)}, expected {tuple(s)}"
        for k, s in expected.items()
        if k in state and state[k].shape != s
    ]
    if missing or unexpected or misshapen:
        faults = f"missing {missing}, unexpected {unexpected}, misshapen {misshapen}"
        raise ValueError(f"{path} does not fit its config; {faults}")
    network.load_state_dict({k: v.to(dtype) for k, v in state.items()}, assign=True)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in TABLES)
    return network


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
    network: BagelNetwork,
    autoencoder: AutoencoderKL,
    tokenizer_folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the official layout; ``tokenizer_folder`` is where the tokenizer's files are copied from."""
    folder.mkdir(parents=True, exist_ok=True)
    config.write(folder)
    save_file(
        {k: v.detach().to("cpu", dtype).contiguous() for k, v in network.state_dict().items()},
        folder / "ema.safetensors",
    )
    save_file(official_state(autoencoder, config.autoencoder), folder / "ae.safetensors")
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file() and tokenizer_folder != folder:
            shutil.copyfile(tokenizer_folder / name, folder / name)
