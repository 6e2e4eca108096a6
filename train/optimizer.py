"""AdamW, its averages in float32 or in 8 bits: how it is made, its learning rate, and its tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from srum.config import TrainConfig
from srum.errors import TrainingError
from srum.train.muon import Muon


def make_optimizer(named: Mapping[str, Parameter], config: TrainConfig) -> Optimizer | Muon:
    """What ``optimizer`` and ``memory.optimizer`` name. Raises TrainingError where what it needs is not installed."""
    if config.optimizer == "muon":
        return Muon(named, config.lr, config.betas, config.eps, config.weight_decay)
    parameters = list(named.values())
    if config.memory.optimizer == "fp32":
        # foreach: loops over many tensors at once do not take sharded ones
        return torch.optim.AdamW(parameters, config.lr, config.betas, config.eps, config.weight_decay, foreach=False)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise TrainingError(f"train.memory.optimizer: int8 needs torchao (pip install torchao): {error}") from None
    return AdamW8bit(parameters, config.lr, config.betas, config.eps, config.weight_decay)


def set_rate(optimizer: Optimizer | Muon, lr: float) -> None:
    """Set the learning rate, which torchao keeps in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def optimizer_state(optimizer: Optimizer | Muon, parameters: Mapping[str, Parameter]) -> dict[str, dict[str, Tensor]]:
    """The optimiser's tensors by the names of the parameters that it has moved."""
    return {name: optimizer.state[p] for name, p in parameters.items() if p in optimizer.state}


def start_optimizer(optimizer: Optimizer | Muon, parameters: Mapping[str, Parameter]) -> None:
    """Make the optimiser's tensors for ``parameters``, which stay as they are: a step without gradient, of length 0."""
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    set_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad()
