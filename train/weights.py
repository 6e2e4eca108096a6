"""The trained weights: which they are, second sets of their values, their checksum, and how they are published."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from srum.disk import writing
from srum.errors import TrainingError
from srum.models import mark
from srum.models.base import TrainableModel, name_of
from srum.processes import Processes
from srum.train.sharding import gathered, local


@contextmanager
def trainable_parameters(model: TrainableModel, scope: Literal["generation", "all"]) -> Iterator[dict[str, Parameter]]:
    """The trained parameters by name; until the end of the block, the others require no gradients.

    What the model itself holds fixed (position tables, the autoencoder) stays so under either scope. Raises
    TrainingError where nothing is trained.
    """
    free = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    generation = {id(parameter) for _, parameter in model.generation_parameters()}
    chosen = {name: p for name, p in free.items() if scope == "all" or id(p) in generation}
    if not chosen:
        raise TrainingError(f"train.trainable: {name_of(model)} has no weights of their own that draw; set it to all")
    try:
        for name, parameter in free.items():
            parameter.requires_grad_(name in chosen)
        yield chosen
    finally:
        for name, parameter in model.named_parameters():
            if name in free:
                parameter.requires_grad_(True)
                parameter.grad = None


class Copy:
    """A second set of values of some parameters: as they were at the start, or their running average."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = parameters
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the parameters have these values."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Go the share 1 - decay of the way to the parameters."""
        for name, parameter in self.parameters.items():
            local(self.values[name]).lerp_(local(parameter), 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """These values for the parameters', which become these values."""
        for name, parameter in self.parameters.items():
            mine, its = local(self.values[name]), local(parameter)
            if its is parameter:
                parameter.data, self.values[name] = mine, parameter.data
            else:  # a shard's storage belongs to FSDP
                kept = its.clone()
                its.copy_(mine)
                mine.copy_(kept)


def digest(parameters: Mapping[str, Tensor], processes: Processes = Processes()) -> str:  # noqa: B008 (frozen)
    """A checksum of the bits of some tensors, the same on every device and however ``processes`` share them."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    names = sorted(parameters)
    own = [local(parameters[name].detach()).contiguous() for name in names]
    sums = torch.stack([part.view(bits[part.element_size()]).sum(dtype=torch.int64).cpu() for part in own])
    in_all = sums if processes.whole else processes.total(sums)
    return hashlib.sha256(repr(list(zip(names, in_all.tolist(), strict=True))).encode()).hexdigest()


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block the layers keep no activations for the backward pass: it computes them again."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def publish(model: TrainableModel, folder: Path, dtype: torch.dtype, processes: Processes) -> None:
    """Save the model beside ``folder``, then put it in its place; process 0 writes, all take part."""
    weights = gathered(model.network, processes, dtype)
    if processes.rank == 0:
        unfinished = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        with writing(folder):
            model.save(unfinished, dtype, weights=weights)
            mark(unfinished, model)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    processes.wait()
