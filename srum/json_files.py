"""Small files of JSON: read so that one that is cut, empty or only a pointer is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from srum.errors import SrumError

POINTER = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins, in place of the file
POINTER_TO = "is a Git LFS pointer, not the file: fetch it with `git lfs pull`, or download it again"


class JsonError(SrumError, ValueError):
    """A file that is no whole JSON object; the message names it."""


def as_unicode(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair: JSON can hold that, a file in UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises JsonError, naming the file, where there is none; a BOM is passed over."""
    try:
        data = path.read_bytes()
        values = json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise JsonError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        what = "is empty" if not data.strip() else f"is not whole JSON: {error}"
        raise JsonError(f"{path} {POINTER_TO if data.startswith(POINTER) else what}") from None
    if not isinstance(values, dict):
        raise JsonError(f"{path} is no JSON object but a {type(values).__name__}")
    return values
