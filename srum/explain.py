"""What a field of a config is: its type and range by pydantic's schema, its default, and what is said beside it.

``srum config --explain`` prints it, ``srum init`` writes it beside the values, and the site's reference lists it all.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from srum.config import ConfigError, RunConfig, Section, config_class, suggestion
from srum.plugins import names

WORDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "keys and values",
}
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Explained:
    """A field by its dotted name: what values it takes, its default as YAML, its meaning in words."""

    name: str
    values: str
    default: str
    meaning: str

    def __str__(self) -> str:
        return f"{self.name}: {self.values}; by default {self.default}\n  {self.meaning}"


def explain(kind: type[RunConfig], name: str) -> list[Explained]:
    """The field of that dotted name, or all fields of a section. Raises ConfigError for a name that there is not."""
    found = [field for field in fields(kind) if f"{field.name}.".startswith(f"{name}.")]
    if not found:
        raise ConfigError(f"unknown key {name}{suggestion(name.split('.'), kind)}")
    return found


def fields(kind: type[RunConfig]) -> Iterator[Explained]:
    """All fields of a config, in order, those of sections after one another."""
    return _fields(kind, kind().model_dump(mode="json"), "")


def _fields(kind: type[Section], defaults: Mapping[str, Any], prefix: str) -> Iterator[Explained]:
    schema, said = kind.model_json_schema()["properties"], meanings(kind)
    for name, field in kind.model_fields.items():
        if (section := section_of(field.annotation)) is not None:
            yield from _fields(section, defaults[name], f"{prefix}{name}.")
        else:
            yield Explained(prefix + name, values(schema[name]), plain(defaults[name]), said.get(name, ""))


def section_of(annotation: Any) -> type[Section] | None:
    """The annotation of a field, where it is a section of further fields."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def values(schema: Mapping[str, Any]) -> str:
    """A field's part of a JSON schema in words, such as ``number > 0`` or ``none, fp32 or bf16``."""
    if "anyOf" in schema:
        return " or ".join(values(one) for one in schema["anyOf"])
    if "enum" in schema:
        *first, last = map(str, schema["enum"])
        return f"{', '.join(first)} or {last}"
    if "prefixItems" in schema:
        return f"[{'; '.join(values(one) for one in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {values(schema['items'])}"
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in BOUNDS.items() if bound in schema]
    word = WORDS.get(schema["type"], schema["type"])
    return f"{word} {', '.join(bounds)}" if bounds else word


def plain(value: Any) -> str:
    """A value as YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip() or "''"


@cache
def meanings(kind: type[Section]) -> dict[str, str]:
    """What the comments beside and below the fields of a class say; without one, that of its base class counts."""
    said: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Section) and base is not Section:
            said |= _comments(base)
    return said


def _comments(kind: type[Section]) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(kind))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    ends = [node.lineno for node in body[1:]] + [source.count("\n") + 2]
    said = {
        node.target.id: " ".join(lines[line] for line in range(node.lineno, end) if line in lines)
        for node, end in zip(body, ends, strict=True)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return {name: meaning for name, meaning in said.items() if meaning}


def reference() -> str:
    """All fields as a page of Markdown: those of every run, by section, then each shipped method's own."""
    shared = list(fields(RunConfig))
    sections = [
        (name, kind) for name, field in RunConfig.model_fields.items() if (kind := section_of(field.annotation))
    ]
    parts = [_table("Of the run", RunConfig, [field for field in shared if "." not in field.name])]
    for name, kind in sections:
        parts.append(_table(f"`{name}`", kind, [field for field in shared if field.name.startswith(f"{name}.")]))
    for method in names("method"):
        own = [field for field in fields(config_class(method)) if field.name not in {one.name for one in shared}]
        if own:
            parts.append(_table(f"Of `method: {method}`", config_class(method), own))
    return "\n".join(parts)


def _table(title: str, kind: type[Section], rows: list[Explained]) -> str:
    lines = [
        f"## {title}\n",
        f"{inspect.getdoc(kind)}\n",
        "| field | values | default | meaning |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = (f"`{row.name}`", row.values, f"`{row.default}`", row.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])
