"""LoRA (peft): low-rank updates of linear layers, trained in float32 beside weights that stay as they are.

peft wraps the layers in place. The model that entered is the same network with the updates scaled by zero, so that
region_nft needs no second set of weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from srum.config import LoraConfig
from srum.errors import TrainingError
from srum.models.base import TrainableModel
from srum.train.examples import generator_for
from srum.train.sharding import local, part, whole

ADAPTER = "default"
PEFT_PREFIX = "base_model.model."  # of the tensors' names in an adapter's file


def targets(model: TrainableModel, trained: Collection[str], config: LoraConfig) -> list[str]:
    """Names of the linear layers, inside the layers that repeat, whose weights are among the ``trained``."""
    inside = {id(part) for layer in model.layers() for part in layer.modules()}
    return [
        name
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) in inside
        and f"{name}.weight" in trained
        and (config.target == "all" or "attn" in name)
    ]


@contextmanager
def adapted(model: TrainableModel, trained: Collection[str], config: LoraConfig) -> Iterator[list[str]]:
    """Within the block the ``trained`` linear layers have updates, which alone require gradients; yields their names.

    They have no values before ``start``; what they hold at the end is lost unless ``merge`` was called. Raises
    TrainingError where there is no such layer.
    """
    names = targets(model, trained, config)
    if not names:
        raise TrainingError(f"train.lora.target: no linear layer of the model is {config.target} and trained")
    with torch.random.fork_rng(devices=[]):  # peft draws values of its own
        peft.inject_adapter_in_model(peft_config(names, config), model.network, ADAPTER)
    try:
        yield [name for name, parameter in model.network.named_parameters() if parameter.requires_grad]
    finally:
        unwrap(model.network)


def unwrap(network: nn.Module) -> None:
    """Put back the layers that peft wrapped."""
    for name, layer in _layers(network):
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
    del network.peft_config


@torch.no_grad()
def start(network: nn.Module, seed: int) -> None:
    """Updates as peft starts them, B zero and A uniform, drawn by ``seed`` and the layer's name alone."""
    for name, layer in _layers(network):
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        drawn = torch.empty(a.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator_for(seed, "lora", name))
        local(a).copy_(part(drawn.to(a.device), a))
        local(b).zero_()


def peft_config(names: list[str], config: LoraConfig) -> peft.LoraConfig:
    """Ours in peft's terms."""
    return peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names)


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """Within the block the network is the one that entered."""
    for _, layer in _layers(network):
        layer.set_scale(ADAPTER, 0.0)
    try:
        yield
    finally:
        for _, layer in _layers(network):
            layer.set_scale(ADAPTER, 1.0)


def beneath(network: nn.Module) -> dict[str, Tensor]:
    """The network's parameters by the names that they have without updates, which are not among them."""
    named = network.named_parameters()
    return {name.replace(".base_layer.", "."): parameter for name, parameter in named if ".lora_" not in name}


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Add the updates to the weights, once; the sum is taken in float32 and has the type of the weights."""
    for _, layer in _layers(network):
        weight = layer.get_base_layer().weight
        delta = layer.scaling[ADAPTER] * whole(layer.lora_B[ADAPTER].weight) @ whole(layer.lora_A[ADAPTER].weight)
        local(weight).copy_(local(weight).float() + part(delta, weight))
        layer.set_scale(ADAPTER, 0.0)


def save_adapter(updates: Mapping[str, Tensor], config: LoraConfig, folder: Path) -> None:
    """Write the updates, by the names of their parameters, as a PEFT adapter."""
    names = sorted({name.partition(".lora_")[0] for name in updates})
    peft_config(names, config).save_pretrained(str(folder))
    tensors = {
        PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.cpu().contiguous() for name, tensor in updates.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def add_adapter(network: nn.Module, folder: Path | str) -> None:
    """Add the updates of a PEFT adapter in ``folder``, such as ``save_adapter`` writes, to the weights."""
    config = peft.LoraConfig.from_pretrained(str(folder))
    peft.inject_adapter_in_model(config, network, ADAPTER)
    values = load_file(Path(folder) / "adapter_model.safetensors")
    own = {name: parameter for name, parameter in network.named_parameters() if ".lora_" in name}
    for name, parameter in own.items():
        parameter.data.copy_(values[PEFT_PREFIX + name.replace(f".{ADAPTER}.", ".")])
    merge(network)
    unwrap(network)


def _layers(network: nn.Module) -> list[tuple[str, Any]]:
    """The layers that peft wrapped (``LoraLayer``), by name."""
    return [(name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer)]
