"""What a run is made with: the code, the libraries, the device; ``made_with.json`` in its folder.

An entry is added by the first launch in the folder, and by every later one that changes something: that brings other
code, libraries or another device, or another value of a field that may change while a run goes on.
"""

from __future__ import annotations

import platform
import subprocess
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import srum
from srum.json_files import read_json_list

LIBRARIES = ("torch", "transformers", "diffusers", "numpy")
APART = ("date", "notes")  # of an entry: what may differ without being told of


def next_entry(entries: Sequence[dict[str, Any]], device: str, notes: Sequence[str]) -> dict[str, Any] | None:
    """The entry that this launch adds to those there are, with what else there is to note of it; None for no change.

    ``device`` as in a config. Warns, in one line, of what differs from the entry before it.
    """
    facts = made_with(device)
    different = differences(entries[-1], facts) if entries else []
    if different:
        warnings.warn(f"this run goes on with other means than before: {'; '.join(different)}", stacklevel=2)
    if entries and not different and not notes:
        return None
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), **facts, "notes": list(notes)}


def made_with(device: str) -> dict[str, Any]:
    """The facts of an entry: versions, the commit and whether files were changed since (in a git checkout), device."""
    versions = {name: version(name) for name in LIBRARIES}
    return {
        "srum": srum.__version__,
        **_commit(Path(srum.__file__).parents[1]),
        **versions,
        "python": platform.python_version(),
        "device": device_name(device),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """``torch 2.13.0 in place of 2.11.0`` for every fact that differs between two entries."""
    names = [name for name in before | now if name not in APART and before.get(name) != now.get(name)]
    return [f"{name} {now.get(name, 'unknown')} in place of {before.get(name, 'unknown')}" for name in names]


def described(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The entries in words, a line each: the first whole, of the others what differs from the one before."""
    lines = []
    for before, entry in zip([{}, *entries], entries, strict=False):
        facts = differences(before, entry) if before else [_fact(k, v) for k, v in entry.items() if k not in APART]
        begun = "went on" if before else "made"
        lines.append(f"{entry['date'][:10]}, {begun} with {', '.join([*facts, *entry['notes']])}")
    return lines


def _fact(name: str, value: Any) -> str:
    if name == "changed":
        return "files changed since" if value else "no file changed since"
    return f"{name} {value[:12]}" if name == "commit" else f"{name} {value}"


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a ``made_with.json``; none where there is no such file. Raises JsonError."""
    return read_json_list(path) if path.exists() else []


def device_name(device: str) -> str:
    """The name of the device that ``device`` of a config means on this machine."""
    if device in ("auto", "spread"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    module = torch.get_device_module(device.partition(":")[0])
    if device != "cpu" and module.is_available() and hasattr(module, "get_device_name"):
        return str(module.get_device_name(torch.device(device)))
    return _processor() if device == "cpu" else device


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def _commit(folder: Path) -> dict[str, Any]:
    """The commit of the checkout in ``folder`` and whether its tracked files differ from it; {} where there is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        git(
            "ls-files", "--error-unmatch", "srum/__init__.py"
        )  # else it is installed within a checkout of something else
        return {"commit": git("rev-parse", "HEAD").strip(), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
