"""Several processes for tests: real ones, with gloo between them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from srum.processes import connected


def launch(work: Callable[..., None], *arguments: Any) -> None:
    """``work(*arguments)`` in two connected processes; ProcessRaisedException as soon as it raises in one of them.

    ``work`` is a function of a module, and none of a test module.
    """
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("localhost", 0))
        patch.setenv("MASTER_PORT", str(free.getsockname()[1]))
        free.close()
        multiprocessing.spawn(_process, (work, arguments), nprocs=2)


def _process(rank: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    torch.set_num_threads(1)
    with connected():
        work(*arguments)
