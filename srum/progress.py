"""How far a run is: in a terminal a bar, without one a line every half minute, with the time that is left in all.

A ``part`` names what is being done, such as "round 1/4 - train region_nft"; ``counting`` tells how far it is. What the
parts of a whole run are expected to take (``srum.plan``) is given once, to ``expecting``; those that are done correct
it. One thread of one process: what is going on is kept in this module.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines where there is no terminal
TELLING = 0.1  # share of a part from which on its own speed says how long the rest of it takes
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@dataclass
class Timed:
    """How long a part took: seconds in all, and when how many of its items were done."""

    seconds: float = 0.0
    marks: list[tuple[int, float]] = field(default_factory=list)

    @property
    def items(self) -> int:
        """How many were done."""
        return self.marks[-1][0] - self.marks[0][0] if self.marks else 0

    @property
    def each(self) -> float:
        """Seconds per item; the first mark is warming up where there are two more."""
        counted = self.marks[1:] if len(self.marks) > 2 else self.marks
        (first, began), (last, ended) = counted[0], counted[-1]
        return (ended - began) / (last - first) if last > first else 0.0

    @property
    def once(self) -> float:
        """Seconds that do not grow with the items: what is read before and written after them."""
        return max(0.0, self.seconds - self.each * self.items)


@dataclass
class Outlook:
    """What the parts of a run take, in seconds, by label; those that are done leave it.

    ``factors``: how much longer than expected the last part of a kind, the first word of its name, has taken.
    """

    expected: dict[str, float]
    factors: dict[str, float] = field(default_factory=dict)

    def finish(self, label: str, seconds: float) -> None:
        """A part is done, after so many seconds."""
        if expected := self.expected.pop(label, None):
            self.factors[kind(label)] = seconds / expected

    def left(self, label: str, share: float, seconds: float) -> float:
        """Seconds that are left, of which the part ``label`` has done a share in so many."""
        others = sum(self._of(other) for other in self.expected if other != label)
        return others + (remaining(share, seconds) if share > TELLING else max(0.0, self._of(label) - seconds))

    def _of(self, label: str) -> float:
        return self.expected.get(label, 0.0) * self.factors.get(kind(label), 1.0)


_label = ""
_act: Callable[[], object] | None = None
_outlook: Outlook | None = None
_times: dict[str, Timed] | None = None


def kind(label: str) -> str:
    """``train`` of "round 1/4 - train region_nft"."""
    return label.rpartition(" - ")[2].partition(" ")[0]


def remaining(share: float, seconds: float) -> float:
    """Seconds that the rest takes where a share has taken so many."""
    return seconds * (1 - share) / share


@contextmanager
def expecting(seconds: Mapping[str, float]) -> Iterator[None]:
    """Within the block the time left in all is told, as these parts are expected to take it."""
    global _outlook
    _outlook = Outlook(dict(seconds))
    try:
        yield
    finally:
        _outlook = None


@contextmanager
def timing() -> Iterator[dict[str, Timed]]:
    """Within the block the times of all parts are kept, by label, and nothing is told."""
    global _times
    _times = {}
    try:
        yield _times
    finally:
        _times = None


@contextmanager
def part(label: str) -> Iterator[None]:
    """Within the block this is being done."""
    global _label
    around, _label, start = _label, label, time.monotonic()
    try:
        yield
        seconds = time.monotonic() - start
        if _outlook is not None:
            _outlook.finish(label, seconds)
        if _times is not None:
            _times.setdefault(label, Timed()).seconds = seconds
    finally:
        _label = around


@contextmanager
def after_first_batch(act: Callable[[], object]) -> Iterator[None]:
    """Within the block ``act`` is called once: when the first of what is counted is done."""
    global _act
    _act = act
    try:
        yield
    finally:
        _act = None


@contextmanager
def counting(name: str, total: int, done: int = 0, told: bool = True) -> Iterator[Callable[[int, str], None]]:
    """Tell how far ``total`` items are, of which some are ``done``; what is yielded takes how many more, and facts.

    ``name`` stands where no part is named. Where not ``told``, another process tells.
    """
    label, start, said = _label or name, time.monotonic(), time.monotonic()
    marks = [] if _times is None else _times.setdefault(label, Timed()).marks
    before = marks[-1][0] - done if marks else 0  # of a part that counts twice
    marks.append((before + done, start))
    count, told = done, told and _times is None
    silent = not told or not sys.stderr.isatty()
    with tqdm(total=total, initial=done, desc=label, disable=silent, bar_format=BAR) as bar:

        def advance(more: int, facts: str = "") -> None:
            nonlocal count, said
            global _act
            count, now = count + more, time.monotonic()
            marks.append((before + count, now))
            share, seconds = (count - done) / max(1, total - done), now - start
            in_all = "" if _outlook is None else f"{in_words(_outlook.left(label, share, seconds))} left in all"
            bar.set_postfix_str(", ".join(filter(None, [facts, in_all])), refresh=False)
            bar.update(more)
            if told and silent and now - said >= EVERY and count < total:
                said = now
                left = f"{in_words(remaining(share, seconds))} left"
                words = [f"{label}: {count:,} of {total:,}", facts, left, in_all]
                print(", ".join(filter(None, words)), flush=True)
            if _act is not None and count < total:
                act, _act = _act, None
                act()

        yield advance


def in_words(seconds: float) -> str:
    """``50 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
