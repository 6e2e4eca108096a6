"""Several processes of one launch: who they are, and what they tell each other.

``torchrun`` starts them, or on a CPU the command itself (``srum.cores``); they share the folder of the run. They talk
by gloo, over the network and not through files, because a shared file system may show a new file to other nodes late.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from srum import cores
from srum.cores import LostProcess
from srum.errors import SrumError

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # how long a process waits for the others; torchrun ends it where one of them dies


class LaunchError(SrumError, ValueError):
    """Processes that cannot work on this machine."""


@dataclass(frozen=True)
class Processes:
    """This process among all of the launch. What it asks of the others, all have to ask, in the same order.

    ``whole``: each has the network whole where it is trained, instead of a share of it.
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = field(default=None, repr=False)
    whole: bool = False

    @classmethod
    def here(cls) -> Processes:
        """Those that are ``connected``, or this one alone."""
        return _here

    def once(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in process 0, which alone does it, while the others wait."""
        if self.count == 1:
            return work()
        result = [work() if self.rank == 0 else None]
        with self._others():
            dist.broadcast_object_list(result, src=0, group=self.group)
        return result[0]  # type: ignore[return-value]

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes of a CPU tensor that each has."""
        if self.count > 1:
            with self._others():
                dist.all_reduce(values, group=self.group)
        return values

    def joined(self, values: list[T]) -> list[T]:
        """The lists of all processes, one after the other."""
        if self.count == 1:
            return values
        lists: list[list[T]] = [[] for _ in range(self.count)]
        with self._others():
            dist.all_gather_object(lists, values, group=self.group)
        return [value for own in lists for value in own]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            with self._others():
                dist.barrier(group=self.group)

    @contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo has no type of its own
            reason = str(error).splitlines()[0]
            raise LostProcess(f"process {self.rank} of {self.count} lost another one: {reason}") from None


_here = Processes()


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this process works as if there were no others."""
    global _here
    among, _here = _here, Processes()
    try:
        yield
    finally:
        _here = among


@contextmanager
def connected(count: int = 1) -> Iterator[Processes]:
    """The processes that ``torchrun`` started, on the GPU of each where there is one; without it, ``count`` that share
    the cores of this machine, or this one alone.

    Raises LaunchError where a node has fewer GPUs than processes.
    """
    if _here.count > 1:
        yield _here
    elif cores.STORE in os.environ:
        with _among(cores.join(os.environ), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) as processes:
            yield processes
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with _launched() as processes:
            yield processes
    elif count > 1:
        before = torch.get_num_threads()
        threads = max(1, before // count)
        torch.set_num_threads(threads)
        try:
            with cores.helpers(count, threads) as store, _among(store, 0, count) as processes:
                yield processes
        finally:
            torch.set_num_threads(before)
    else:
        yield _here


@contextmanager
def _launched() -> Iterator[Processes]:
    """Those of ``torchrun``."""
    if torch.cuda.is_available():
        number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= gpus:
            raise LaunchError(f"no GPU for process {number} of this node, which has {gpus}: --nproc-per-node {gpus}")
        torch.cuda.set_device(number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with _ours() as processes:
        yield processes


@contextmanager
def _among(store: Path, rank: int, count: int) -> Iterator[Processes]:
    """Those of one machine, which meet by a file and talk through its loopback."""
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    dist.init_process_group("gloo", store=dist.FileStore(str(store), count), rank=rank, world_size=count)
    with _ours(whole=True) as processes:
        yield processes


@contextmanager
def _ours(whole: bool = False) -> Iterator[Processes]:
    global _here
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    _here = Processes(dist.get_rank(), dist.get_world_size(), group, whole)
    try:
        yield _here
    finally:
        _here = Processes()
    dist.destroy_process_group()  # not after an error: it would wait for the others, and the error be said by nobody
