"""Attention on a CPU: the explicit scores of ``bagel.network.attend`` against torch's fused kernel.

    python benchmarks/attention.py

Both get the same mask. The default size is that of a pretraining step of srum-tiny, forward and backward; the
other rows are a denoising step (64 tokens and their markers) and a decoding step (one token) over a cached prompt, and
a denoising step of four times the tokens, whose scores are formed row by row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from srum.models import keep_memory
from srum.models.bagel.network import additive, attend

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """What ``attend`` would be without its explicit path."""
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


def causal(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The bias of a causal mask, (B, 1, L, L)."""
    return additive(torch.ones(shape[0], 1, shape[2], shape[2], dtype=torch.bool).tril(), dtype)


def forward_backward(attention: Attention, shape: Sequence[int], dtype: torch.dtype) -> Callable[[], None]:
    """One forward and backward pass on random q, k, v of ``shape`` (B, heads, L, d), causal."""
    q, k, v = (torch.randn(*shape, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(*shape, dtype=dtype)
    bias = causal(shape, dtype)

    def run() -> None:
        torch.autograd.grad(attention(q, k, v, bias), (q, k, v), gradient)

    return run


def forward(attention: Attention, shape: Sequence[int], queries: int, dtype: torch.dtype) -> Callable[[], None]:
    """One forward pass of the last ``queries`` of L tokens, shape (B, heads, L, d), causal."""
    q, k, v = (torch.randn(*shape, dtype=dtype) for _ in range(3))
    bias = causal(shape, dtype)[:, :, -queries:]

    def run() -> None:
        attention(q[:, :, -queries:], k, v, bias)

    return run


def seconds(run: Callable[[], None], at_least: float) -> float:
    """The median time of a call, over ``at_least`` so many seconds of calls, with the threads of the process."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=at_least).median


def main(argv: Sequence[str] | None = None) -> None:
    """Print both times and their ratio, in bfloat16 and float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--length", type=int, default=140)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of the ten measurements")
    args = parser.parse_args(argv)
    keep_memory()  # as every model on a CPU does
    shape = (args.batch, args.heads, args.length, args.width)
    work = {
        "forward and backward": lambda kind, dtype: forward_backward(kind, shape, dtype),
        "denoising": lambda kind, dtype: forward(kind, shape, min(66, args.length), dtype),
        "decoding": lambda kind, dtype: forward(kind, shape, 1, dtype),
        "larger image": lambda kind, dtype: forward(kind, (*shape[:2], 298, args.width), 258, dtype),
    }
    table = Table("pass", "precision", "fused ms", "explicit ms", "ratio", title=f"attention {shape}")
    for name, make in work.items():
        for dtype in (torch.bfloat16, torch.float32) if name == "forward and backward" else (torch.bfloat16,):
            plain, ours = (seconds(make(kind, dtype), args.seconds) for kind in (fused, attend))
            table.add_row(name, str(dtype), f"{1e3 * plain:.2f}", f"{1e3 * ours:.2f}", f"{plain / ours:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
