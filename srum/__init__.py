"""SRUM: a unified multimodal model looks at its own images, judges them region by region, and is trained on that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srum.views.reading import RunView

__version__ = "0.1.0"


def open_run(path: str | Path) -> RunView:
    """The run in the folder ``path``, to read (``srum.views.reading``). Raises RunError for a folder that is no run."""
    from srum.views.reading import RunView  # here, so that importing srum stays fast

    return RunView(Path(path))
