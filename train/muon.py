"""Muon over stacks of matrices: what ``torch.optim.Muon`` does, one call for all matrices of a shape.

A small network has many small matrices; taken one by one, launching the kernels of their Newton-Schulz steps takes a
good part of a training step on a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that torch uses
STEPS = 5


class Muon:
    """Muon for the matrices of the layers that repeat, AdamW without decay for the rest (docs/lab-notes.md, 12).

    Two optimisers behind what the trainer asks of one.
    """

    def __init__(
        self, named: Mapping[str, Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        matrices = [p for name, p in named.items() if p.ndim == 2 and ".layers." in name]
        rest = [p for name, p in named.items() if p.ndim != 2 or ".layers." not in name]
        kinds: list[torch.optim.Optimizer] = []
        if matrices:
            kinds.append(StackedMuon(matrices, lr, momentum=0.95, weight_decay=weight_decay))
        if rest:
            kinds.append(torch.optim.AdamW(rest, lr, betas, eps, weight_decay=0.0, fused=True))
        self.kinds = kinds
        self.param_groups = [group for kind in kinds for group in kind.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        """The tensors of every parameter that has been moved."""
        return {parameter: tensors for kind in self.kinds for parameter, tensors in kind.state.items()}

    def step(self) -> None:
        """Move all parameters."""
        for kind in self.kinds:
            kind.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for kind in self.kinds:
            kind.zero_grad()


class StackedMuon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the update scaled to the size of AdamW's (0.2 sqrt of the longer side)."""

    def __init__(
        self, params: Iterable[Parameter], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            stacks = defaultdict[torch.Size, list[Tensor]](list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    stacks[parameter.shape].append(parameter)
            for shape, matrices in stacks.items():
                self._move(matrices, group, 0.2 * max(shape) ** 0.5)

    def _move(self, matrices: list[Tensor], group: dict[str, Any], scale: float) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        updates = orthogonal(torch.stack(list(ahead))).to(matrices[0].dtype)
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(updates.unbind()), alpha=-group["lr"] * scale)


def orthogonal(stack: Tensor) -> Tensor:
    """(N, rows, columns) with all singular values of each matrix near 1, in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = stack.shape[1] > stack.shape[2]
    x = (stack.mT if tall else stack).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
