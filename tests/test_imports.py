"""Imports run one way: srum <- grounding, judging <- train <- loop <- cli."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {"srum": 0, "grounding": 1, "judging": 1, "train": 2, "srum.loop": 3, "srum.sweep": 3, "srum.cli": 4}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("srum", "grounding", "judging", "train")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def floor(module: str) -> int:
    return FLOORS.get(module, FLOORS[module.partition(".")[0]])


def imported(node: ast.AST) -> Iterator[str]:
    """What a piece of code imports of this project, at its top or in its functions, but for types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        names = [alias.name for alias in child.names] if isinstance(child, ast.Import) else []
        if isinstance(child, ast.ImportFrom):
            assert child.module and not child.level
            names = [child.module, *(f"{child.module}.{alias.name}" for alias in child.names)]
        yield from (name for name in names if name in MODULES)
        yield from imported(child)


IMPORTS = {module: set(imported(ast.parse(path.read_text(encoding="utf-8")))) for module, path in MODULES.items()}


def test_no_module_imports_what_stands_above_it() -> None:
    assert [(a, b) for a, names in IMPORTS.items() for b in names if floor(b) > floor(a)] == []


def test_grounding_and_judging_are_unaware_of_each_other() -> None:
    pairs = [(a.partition(".")[0], b.partition(".")[0]) for a, names in IMPORTS.items() for b in names]
    assert ("srum", "srum") in pairs and {("grounding", "judging"), ("judging", "grounding")}.isdisjoint(pairs)


def test_a_method_is_a_page_of_its_own() -> None:
    pages = {module for module in MODULES if module.startswith("train.methods.")} - {"train.methods.base"}
    assert len(pages) >= 3
    assert [(a, b) for a in pages for b in IMPORTS[a] & pages] == []
