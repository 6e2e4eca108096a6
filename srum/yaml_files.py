"""YAML that people write: read so that whatever is wrong with it is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from srum.errors import SrumError, first_fault

M = TypeVar("M", bound=BaseModel)


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


def load_named(kind: type[M], name: str, folder: Path, error: type[SrumError]) -> M:
    """What a YAML file holds: one of ``folder``, by its name there, or a user's, by its path. Raises ``error``, with
    the names that there are, or naming file and field."""
    shipped = folder / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(one.stem for one in folder.glob("*.yaml")))
        raise error(f"no {kind.__name__.lower()} {name!r}: give one of {names}, or a .yaml file")
    try:
        return kind.model_validate(read_yaml(path))
    except YamlError as fault:
        raise error(str(fault)) from None
    except ValidationError as fault:
        raise error(f"{path}: {first_fault(fault)}") from None
