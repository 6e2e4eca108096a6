"""The notebooks run: their code on the fake model always, as they are in a kernel among the slow tests."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from srum import models
from tests.fakes import FakeModel

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [
    "a_chain_by_hand",
    "inspect_reward_maps",
    "plug_in_a_grounder",
    "refine_by_regeneration",
    "the_loop_by_hand",
]
MINUTES = 3


def path_of(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def run_cell(source: str, namespace: dict[str, object]) -> None:
    """A code cell without a kernel: ``%%writefile`` writes, line magics are passed over."""
    first, _, rest = source.partition("\n")
    if first.startswith("%%writefile "):
        Path(first.removeprefix("%%writefile ")).write_text(rest)
    else:
        exec(re.sub(r"^%.*$", "", source, flags=re.M), namespace)


def test_all_notebooks_are_tested() -> None:
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_code_runs_on_the_fake_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(models, "load", FakeModel.load)
    namespace: dict[str, object] = {"display": lambda *shown: None}
    for cell in nbformat.read(path_of(name), as_version=4).cells:
        if cell.cell_type == "code":
            run_cell(cell.source, namespace)
    plt.close("all")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_hold_no_error_and_no_path_of_the_machine(name: str) -> None:
    notebook = nbformat.read(path_of(name), as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)  # they are red boxes
    assert not re.search(r"/(home|root|tmp|Users)/", path_of(name).read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_executes_on_the_embedded_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path_of(name), as_version=4)
    start = time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=60 * MINUTES, kernel_name="python3").execute(cwd=str(tmp_path))
    assert time.perf_counter() - start < 60 * MINUTES
