"""YAML that people write: read so that whatever is wrong with it is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from srum.errors import SrumError


class YamlError(SrumError, ValueError):
    """What is no YAML, or no file; the message says where."""


def parse_yaml(text: str, where: str) -> Any:
    """The value of a text. Raises YamlError for what is none, also a date, with ``where`` it is from, and the place."""
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark
        raise YamlError(f"{where}:{mark.line + 1}:{mark.column + 1}: not YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        raise YamlError(f"{where}: not YAML: {error.reason}: #x{error.character:04x}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise YamlError(f"{where}: not YAML: {error}") from None


def read_yaml(path: Path) -> Any:
    """The value in a file in UTF-8, whatever the locale. Raises YamlError, naming the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise YamlError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise YamlError(f"{path} is not YAML in UTF-8: {error}") from None
    return parse_yaml(text, str(path))
