"""Imports run one way: srum <- grounding, judging <- train <- loop <- cli."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {  # of a module: that of the longest of these names that it is under
    "srum": 0,
    "srum.grounding": 1,
    "srum.judging": 1,
    "srum.train": 2,
    "srum.loop": 3,
    "srum.plan": 3,
    "srum.sweep": 3,
    "srum.views.report": 3,
    "srum.views.ui": 3,
    "srum.cli": 4,
}
HOUSES = {"srum": "srum", "srum.grounding": "grounding", "srum.judging": "judging", "srum.train": "train"}
MODULES = {
    ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for package, folder in HOUSES.items()
    for path in sorted((ROOT / folder).rglob("*.py"))  # which enters no link
}


def house(module: str) -> str:
    """The longest name of ``FLOORS`` that the module is under."""
    return max((name for name in FLOORS if f"{module}.".startswith(f"{name}.")), key=len)


def floor(module: str) -> int:
    return FLOORS[house(module)]


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
    pairs = {(house(a), house(b)) for a, names in IMPORTS.items() for b in names}
    assert ("srum.judging", "srum") in pairs
    assert {("srum.grounding", "srum.judging"), ("srum.judging", "srum.grounding")}.isdisjoint(pairs)


def test_a_method_is_a_page_of_its_own() -> None:
    pages = {module for module in MODULES if module.startswith("srum.train.methods.")} - {"srum.train.methods.base"}
    assert len(pages) >= 3
    assert [(a, b) for a in pages for b in IMPORTS[a] & pages] == []


def test_folders_of_a_user_are_not_taken_for_ours(tmp_path: Path) -> None:
    """A script beside folders ``train``, ``judging`` and ``grounding`` of its own imports those."""
    for name in ("train", "judging", "grounding"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"mine = {name!r}\n")
    own = "import train, judging, grounding; print(train.mine, judging.mine, grounding.mine)"
    ours = "from srum.plugins import find; print(find('method', 'sft').__module__)"
    (tmp_path / "script.py").write_text(f"{own}\n{ours}\n")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["train judging grounding", "srum.train.methods.sft"]
