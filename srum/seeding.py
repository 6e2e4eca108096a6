"""Seeds for everything random: a function of what is drawn, never the state of a global stream."""

from __future__ import annotations

import hashlib


def seed_for(*parts: int | str) -> int:
    """A stable seed in [0, 2**63) of ``parts``, such as (run seed, round, record id, purpose).

    The type and the borders of the parts count: (1, 23), (12, 3) and ("1", "23") differ.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
