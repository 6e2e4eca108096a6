"""How several processes train one network: a share of it each (FSDP2), or the whole and the sum of the gradients.

Sharding is torch's own ``fully_shard``, layer by layer, with frozen and trained parameters mixed; it runs on CUDA
(NCCL) and, for tests, on CPU (gloo). Processes that share the cores of one machine share its memory, too, where a shard
saves nothing: each has the network whole (``srum.processes``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from srum.processes import Processes

T = TypeVar("T")


class Shardable(Protocol):
    """What sharding asks of a model."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    def layers(self) -> list[nn.Module]:
        """The layers that repeat, parts of ``network``."""
        ...


class Root(nn.Module):
    """The root of a sharded network. Its forward pass is whatever ``work`` does with the weights, which are then there.

    ``work`` returns what it computed as tensors, or tuples of tensors, where the backward pass is to be noticed.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, work: Callable[[], T]) -> T:
        return work()


def shard(model: Shardable, processes: Processes, bfloat16: bool) -> Root:
    """Share the network's parameters among the processes, in place: layer by layer, and the rest together.

    With ``bfloat16`` they are gathered in it; gradients are summed in float32. Gradients are means over the processes,
    whatever their number of tokens. The root gives its parameters back after every pass, since their values may change
    between two (``srum.train.weights.Copy``).
    """
    mesh = init_device_mesh(model.device.type, (processes.count,))
    dtype = torch.bfloat16 if bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.layers(), root := Root(model.network)):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    return root


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Give every process the sum over all of the gradients, on the CPU. One that no process has stays None."""
    parameters = list(parameters)
    there = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there, *summed = processes.total(torch.cat([there, *(grad.flatten() for grad in own)])).split(
        [len(parameters), *(parameter.numel() for parameter in parameters)]
    )
    for parameter, count, gradient in zip(parameters, there.tolist(), summed, strict=True):
        parameter.grad = gradient.view_as(parameter) if count else None


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that each has whole, where they share ``like``."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


def gathered(network: nn.Module, processes: Processes, dtype: torch.dtype) -> dict[str, Tensor]:
    """The network's tensors as ``dtype``, whole and on the CPU, in process 0; none elsewhere. All must ask for them."""
    found = {}
    for name, tensor in network.state_dict().items():
        one = whole(tensor)
        if processes.rank == 0:
            found[name] = one.to("cpu", dtype)
    return found
