"""What work takes, entered while it is done on tensors that have a shape and a type but no numbers.

Such tensors are torch's FakeTensor: each kernel is asked only what it would return. What touches one gives another, so
that a network whose weights are fakes runs as it is, while what lays out its inputs (positions, masks, noise) stays
real. Of a fake, numbers that the host asks for are ones: losses are finite, and no token ends a text.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srum.errors import ModelError

try:  # torch promises none of these
    from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry
except ImportError as error:
    raise ModelError(f"torch {torch.__version__} has no tensors without numbers: {error}") from None

aten = torch.ops.aten
PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
WITHOUT_NUMBERS = (aten.empty.memory_format, aten.empty_strided.default)
COLLECTIVES = ("c10d", "_c10d_functional")


class Ledger(TorchDispatchMode):
    """Within the block every operation of torch is entered.

    ``held``: bytes of the tensors that are alive, ``peak`` the most so far. ``operations``: floating-point operations
    of products, convolutions and attentions, by torch's formulas. ``sent``: bytes that collectives carry between this
    process and ``others``, by a ring: of a tensor of n bytes shared by p processes n (p - 1) / p, of a sum twice that.

    Tensors made without values (``torch.empty``, ``to_empty``) have none; all others made of numbers are real.
    """

    def __init__(self, processes: int = 1) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.processes = processes
        self.held = self.peak = self.operations = self.sent = 0
        self._sizes: dict[int, int] = {}  # of a storage's id
        self._ends: dict[int, weakref.ref[Any]] = {}
        self._patches = ExitStack()
        self._aside = False

    def start(self) -> None:
        """Count from here on; what is held stays."""
        self.peak, self.operations, self.sent = self.held, 0, 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the block nothing is entered and all tensors are real: what the host does, such as reading files."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def __enter__(self) -> Ledger:
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP's way to free and take memory again
            result = resize(storage, size)
            if id(storage) in self._sizes:
                self._set(id(storage), size)
            return result

        self._patches.enter_context(patch.object(torch.UntypedStorage, "resize_", resized))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(kind not in PLAIN for kind in types):
            return NotImplemented  # a shared tensor: its parts come here by themselves
        if self._aside or _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # in a fake mode a shared tensor asks what its parts will look like
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fake = any(isinstance(tensor, FakeTensor) for tensor in given)
        if func is aten._local_scalar_dense.default and fake:
            return 1
        if func is aten.index.Tensor and fake:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        if fake:
            kwargs.pop("generator", None)  # there is nothing to draw
        if func in WITHOUT_NUMBERS or (func is aten.empty_like.default and given[0].is_meta):
            with self.fakes:
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        self._enter(func, args, kwargs, result)
        return result

    def _enter(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.operations += int(count(*args, **kwargs, out_val=result))
        if func.namespace in COLLECTIVES:
            self.sent += carried(func, tree_leaves((args, result)), self.processes)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._hold(tensor.untyped_storage())

    def _hold(self, storage: torch.UntypedStorage) -> None:
        name = id(storage)
        if name not in self._sizes:
            self._ends[name] = weakref.ref(storage, lambda _: self._let_go(name))
            self._sizes[name] = 0
            self._set(name, storage.nbytes())

    def _set(self, name: int, size: int) -> None:
        self.held += size - self._sizes[name]
        self._sizes[name] = size
        self.peak = max(self.peak, self.held)

    def _let_go(self, name: int) -> None:
        self.held -= self._sizes.pop(name)
        del self._ends[name]


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A mask as the indices of what it chooses, which a fake could not count; other indices as they are."""
    return index.nonzero(as_tuple=True) if isinstance(index, Tensor) and index.dtype == torch.bool else (index,)


def carried(func: Any, tensors: Sequence[Any], processes: int) -> int:
    """Bytes that this process sends in a collective over its largest tensor, by a ring."""
    name = func.__name__.replace("_", "")
    if not name.startswith(("allgather", "reducescatter", "allreduce")):
        return 0
    largest = max(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
    return (2 if name.startswith("allreduce") else 1) * largest * (processes - 1) // processes
