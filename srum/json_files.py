"""Files of JSON that people can edit: read so that one that is cut, empty or only a pointer is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from srum.errors import SrumError

POINTER = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins, in place of the file
POINTER_TO = "is a Git LFS pointer, not the file: fetch it with `git lfs pull`, or download it again"


class JsonError(SrumError, ValueError):
    """A file that is no whole JSON, or of something else; the message names it."""


def as_unicode(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair: JSON can hold that, a file in UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises JsonError, naming the file, where there is none; a BOM is passed over."""
    return _object(_value(_content(path), str(path)), str(path))


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """The list of objects in a file. Raises JsonError as ``read_json``."""
    values = _value(_content(path), str(path))
    if not isinstance(values, list):
        raise JsonError(f"{path} is no JSON list but a {type(values).__name__}")
    return [_object(value, f"{path}: entry {n}") for n, value in enumerate(values, 1)]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The object of each line; what follows the last line's end is being written, and left out. Raises JsonError."""
    lines = _content(path).split(b"\n")[:-1]
    return [_object(_value(line, f"{path}: line {n}"), f"{path}: line {n}") for n, line in enumerate(lines, 1)]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise JsonError(f"cannot read {path}: {error.strerror}") from None


def _value(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        what = "is empty" if not data.strip() else f"is not whole JSON: {error}"
        raise JsonError(f"{where} {POINTER_TO if data.startswith(POINTER) else what}") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise JsonError(f"{where} is no JSON object but a {type(value).__name__}")
    return value
