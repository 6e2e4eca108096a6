"""Cases of the original scorers (tests/golden/benchmarks)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "golden" / "benchmarks"


@cache
def cases(name: str) -> list[dict[str, Any]]:
    """The lines of NAME_cases.jsonl."""
    return [json.loads(line) for line in (FOLDER / f"{name}_cases.jsonl").read_text(encoding="utf-8").splitlines()]
