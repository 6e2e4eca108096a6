"""Average activation strength of the neurons for understanding and for generation (paper, Appendix C, Algorithm 1).

A neuron is a value that enters a ``down_proj``: of every layer, and of both experts, which are one model together; an
expert that no token of a sample takes is at rest, 0. Of the value, silu(gate(x)) up(x), the magnitude is taken: its
sign is a convention (a row of up_proj and the column of down_proj may both change theirs, and the network is the same),
and with signs a cluster's sum would cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Clusters:
    """Which neurons are active in the base model, and more so in which task: masks (N,) bool, disjoint."""

    understanding: Tensor
    generation: Tensor


def mean_activations(network: nn.Module, samples: Iterable[T], use: Callable[[T], Any]) -> Tensor:
    """``mu[n]``, the mean of |a_n(x)| over the samples (Step 1.1): (N,) float32, in the order of the modules.

    a_n(x) is in turn a mean, over all tokens of sample x that the neuron sees while ``use`` runs the network on it.
    Raises ValueError without any sample, and for a compiled network, whose neurons nothing can see.
    """
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in network.modules()):
        raise ValueError("a compiled network hides its neurons: load it with compile=false")
    total, count = torch.zeros(()), 0
    for sample in samples:
        with recorded(network) as seen:
            use(sample)
        total, count = total + seen.mean(), count + 1
    if not count:
        raise ValueError("there are no samples to average over")
    return total / count


class Seen:
    """Sums of |a| over tokens, and the number of tokens, of each ``down_proj``."""

    def __init__(self, projections: Iterable[nn.Linear]) -> None:
        self.sums: dict[nn.Module, Tensor] = {one: torch.zeros(one.in_features) for one in projections}
        self.tokens = dict.fromkeys(self.sums, 0)

    def add(self, projection: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Hook: the values (..., neurons) that enter the projection."""
        values = inputs[0].detach().flatten(0, -2)
        self.sums[projection] += values.abs().sum(0, dtype=torch.float32).cpu()
        self.tokens[projection] += len(values)

    def mean(self) -> Tensor:
        """(N,), 0 where there was no token."""
        return torch.cat([total / max(self.tokens[projection], 1) for projection, total in self.sums.items()])


@contextmanager
def recorded(network: nn.Module) -> Iterator[Seen]:
    """What every ``down_proj`` of the network sees within the block."""
    projections: list[Any] = [own for name, own in network.named_modules() if name.rpartition(".")[2] == "down_proj"]
    seen = Seen(projections)
    hooks = [projection.register_forward_pre_hook(seen.add) for projection in projections]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def find_clusters(understanding: Tensor, generation: Tensor, percentile: float) -> Clusters:
    """Steps 1.2 and 1.3, from the base model's ``mean_activations`` (N,) in the two tasks.

    Active are neurons whose larger mean reaches the ``percentile`` (tau, in [0, 100]) of all such; an active one
    belongs to the task in which its mean is larger, to none where both are the same. Raises ValueError for a cluster
    without neurons.
    """
    larger = torch.maximum(understanding, generation)
    active = larger >= torch.quantile(larger.double(), percentile / 100)
    found = Clusters(active & (understanding > generation), active & (generation > understanding))
    sizes = int(found.understanding.sum()), int(found.generation.sum())
    if not all(sizes):
        raise ValueError(
            f"of {int(active.sum())} active neurons {sizes} are for understanding and generation: lower tau"
        )
    return found


def strength(activations: Tensor, cluster: Tensor) -> float:
    """Eq. 5, S_final: the mean over the cluster (N,) bool of a model's ``mean_activations`` (N,) in a task.

    The mean over neurons and that over samples may change places, so that this is Steps 3 and 4.
    """
    return float(activations[cluster].mean())
