"""A sequence of what is made whenever it is asked for, so that memory does not grow with how much there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

T = TypeVar("T")


class Lazy(Sequence[T]):
    """Items that are made when they are asked for, and not kept: ``make`` of each of the ``places``."""

    def __init__(self, places: Sequence[Any], make: Callable[[Any], T]) -> None:
        self.places, self.make = places, make

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Lazy(self.places[index], self.make)
        return self.make(self.places[index])

    def __iter__(self) -> Iterator[T]:
        return map(self.make, self.places)
