"""What an architecture computes in."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def computing(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which products are of bfloat16, whatever the type of the weights; nothing for ``fp32``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
