"""Files of others that a benchmark reads: of a checkout that the user names, or fetched once, by checksum.

They are never part of this package. Of a Python file, only strings and literals are taken, by its syntax tree; nothing
of it is run.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from srum.errors import SrumError

LONGEST = 50_000_000  # bytes of a file that is fetched


class DataError(SrumError, ValueError):
    """A benchmark's file that is missing, or is not that of the revision that is asked for; the message is one line."""


@dataclass(frozen=True)
class Origin:
    """Where a benchmark's files are from: the repository on GitHub, its commit, and the checksums of those that are
    fetched where no checkout is named."""

    repository: str
    revision: str
    checksums: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"https://github.com/{self.repository} at {self.revision}"


class Data:
    """The files of an ``origin``: in the folder ``checkout``, or fetched into the user's cache.

    A file is found by its path in the repository or, where a folder holds some files alone, by its name.
    """

    def __init__(self, origin: Origin, checkout: Path | None = None) -> None:
        self.origin, self.checkout = origin, checkout
        self.used: dict[str, str] = {}  # checksums
        if checkout is not None and not checkout.is_dir():
            raise DataError(f"{checkout} is no folder; data names a checkout of {origin}")

    @property
    def fingerprint(self) -> str:
        """What tells the files that were read from others."""
        return hashlib.sha256(json.dumps(sorted(self.used.items())).encode()).hexdigest()[:16]

    def path(self, name: str) -> Path:
        """Where the file ``name`` is. Raises DataError."""
        if self.checkout is None:
            return self._fetched(name)
        if (self.checkout / name).is_file():
            return self.checkout / name
        places = sorted(self.checkout.rglob(Path(name).name))
        if len(places) != 1:
            what = "is not" if not places else f"is {len(places)} times"
            raise DataError(f"{name} {what} in {self.checkout}; it is a file of {self.origin}")
        return places[0]

    def text(self, name: str) -> str:
        """A text file. Raises DataError."""
        path = self.path(name)
        try:
            content = path.read_bytes()
            self.used[name] = hashlib.sha256(content).hexdigest()
            return content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None

    def json(self, name: str) -> Any:
        """A JSON file. Raises DataError."""
        return self._parsed(name, self.text(name))

    def lines(self, name: str) -> list[Any]:
        """A file of JSON lines. Raises DataError."""
        lines = self.text(name).split("\n")
        return [self._parsed(f"{name}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]

    def table(self, name: str) -> list[dict[str, str]]:
        """The rows of a CSV file with a header. Raises DataError."""
        return list(csv.DictReader(io.StringIO(self.text(name))))

    def template(self, name: str, marker: str, slots: Mapping[str, str]) -> Template:
        """The longest string or f-string of a Python file with ``marker`` in it; ``slots``: expression -> name."""
        strings = [text for text in _strings(self._tree(name)) if marker in text]
        if not strings:
            raise DataError(f"{name} has no string with {marker!r}: it is not that of {self.origin}")
        return Template(max(strings, key=len), slots)

    def assigned(self, name: str, variable: str) -> Any:
        """The literal that a Python file assigns to ``variable``, anywhere in it. Raises DataError."""
        for node in ast.walk(self._tree(name)):
            if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == variable for t in node.targets):
                try:
                    return ast.literal_eval(node.value)
                except ValueError:
                    continue
        raise DataError(f"{name} assigns no literal to {variable}: it is not that of {self.origin}")

    def require(self, count: int, expected: int, what: str) -> None:
        """Raises DataError where a file does not hold as many things as that of the revision."""
        if count != expected:
            raise DataError(f"{self.checkout} has {count} {what}, not the {expected} of {self.origin}")

    def _tree(self, name: str) -> ast.Module:
        try:
            return ast.parse(self.text(name))
        except SyntaxError as error:
            raise DataError(f"{name}:{error.lineno}: not Python: {error.msg}") from None

    def _parsed(self, where: str, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from None

    def _fetched(self, name: str) -> Path:
        origin = self.origin
        if name not in origin.checksums:
            raise DataError(f"{name} is needed: clone {origin} and name the folder as data")
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "srum" / "benchmarks"
        path = home / origin.repository.replace("/", "--") / origin.revision / name
        if not path.is_file() or _checksum(path.read_bytes()) != origin.checksums[name]:
            _fetch(origin, name, path)
        return path


class Template:
    """A text with slots: ``{expression}`` for each expression of ``slots`` -> its name."""

    def __init__(self, text: str, slots: Mapping[str, str]) -> None:
        self.text, self.slots = text, {f"{{{expression}}}": name for expression, name in slots.items()}
        if missing := [slot for slot in self.slots if slot not in text]:
            raise DataError(f"a judge's template has no slot {missing[0]}: it is of another revision")

    def fill(self, **values: str) -> str:
        """The text with the slots filled; what is put in is not looked at again."""
        pattern = "|".join(re.escape(slot) for slot in self.slots)
        return re.sub(pattern, lambda match: values[self.slots[match[0]]], self.text)


def _strings(tree: ast.AST) -> Iterator[str]:
    """Every string of the tree; the expressions of an f-string stand in braces, as they are unparsed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                f"{{{ast.unparse(part.value)}}}" if isinstance(part, ast.FormattedValue) else str(_literal(part))
                for part in node.values
            )


def _literal(node: ast.expr) -> Any:
    return node.value if isinstance(node, ast.Constant) else ""


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _fetch(origin: Origin, name: str, path: Path) -> None:
    url = f"https://raw.githubusercontent.com/{origin.repository}/{origin.revision}/{name}"
    try:
        with urlopen(url, timeout=30) as response:
            content = response.read(LONGEST)
    except OSError as error:
        raise DataError(f"{name} cannot be fetched ({error}): clone {origin} and name the folder as data") from None
    if _checksum(content) != origin.checksums[name]:
        raise DataError(f"{url} is not the file that is expected: clone {origin} and name the folder as data")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    partial.write_bytes(content)
    partial.replace(path)
