"""BAGEL and SRUM against numbers recorded from the reference at toy size, as benchmarks/parity.py compares them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import parity, parity_recipes
from srum.models.bagel import Bagel

GOLDEN = Path(__file__).parents[1] / "golden" / "bagel"


@pytest.fixture(scope="module")
def model() -> Bagel:
    return Bagel.load(GOLDEN / "checkpoint")


@pytest.mark.parametrize("fixture", parity.CHECKS)
def test_fixture(model: Bagel, fixture: str) -> None:
    found = parity.compare(GOLDEN, fixture, model)
    assert found
    assert [deviation for deviation in found if not deviation.passed] == []


@pytest.mark.parametrize("recipe", ["reca", "rvr"])
def test_recipe(model: Bagel, recipe: str) -> None:
    found = parity.compare(GOLDEN.parent / recipe, recipe, model)
    assert found
    assert [deviation for deviation in found if not deviation.passed] == []


def test_the_true_gradient_is_told_from_the_released_one(model: Bagel) -> None:
    """They differ by 5.6e-4 in the total norm (docs/specs/reca.md, 3), which the tolerance must see."""
    cases = json.loads((GOLDEN.parent / "reca/reca.json").read_text())["cases"]
    true, cut = (cases[name]["total_grad_norm"] for name in ("generation_only_true_gradient", "released_freeze_und"))
    assert not parity.relative("", true, cut, parity_recipes.NORMS).passed


def test_a_recipe_is_compared_with_the_checkpoint_beside_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(GOLDEN.parent / "reca", capsys)
    assert status == 0 and "0 beyond their tolerance" in out and "missing" not in out


# --- the comparison itself


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three fixtures, all that there is to compare."""
    names = ("tokenizer", "srum_loss_pure", "srum_reward")
    monkeypatch.setattr(parity, "CHECKS", {name: parity.CHECKS[name] for name in names})
    (tmp_path / "checkpoint").symlink_to(GOLDEN / "checkpoint")
    for path in GOLDEN.iterdir():
        if path.stem in names:
            shutil.copy(path, tmp_path)
    return tmp_path


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and output of the command."""
    with pytest.raises(SystemExit) as ended:
        parity.main(["--golden", str(folder)])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out


def test_a_complete_folder_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(GOLDEN / "timings.json", folder)  # says something about the recording
    status, out = run(folder, capsys)
    assert status == 0
    assert "7 quantities, 0 beyond their tolerance" in out and "MISS" not in out


def test_a_number_that_is_off_is_a_miss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two misses: ids of one text, and one cell of one map, which is named."""
    tensors = load_file(folder / "srum_reward.safetensors")
    tensors["overlap_max/latent_grid"][0, 0] += 2e-6
    save_file(tensors, folder / "srum_reward.safetensors")
    facts = json.loads((folder / "tokenizer.json").read_text())
    facts[0]["ids"].append(7)
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    status, out = run(folder, capsys)
    missed = [line for line in out.splitlines() if "MISS" in line]
    assert status == 1
    assert len(missed) == 2 and "differs" in missed[0] and "2.0e-06" in missed[1] and "overlap_max" in missed[1]


def test_a_tensor_that_nothing_compares_is_a_miss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(folder / "srum_loss_pure.safetensors") | {"surprise": torch.zeros(1)}
    save_file(tensors, folder / "srum_loss_pure.safetensors")
    status, out = run(folder, capsys)
    assert status == 1 and "compared with nothing" in out and "surprise" in out


def test_missing_and_unknown_files_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").rename(folder / "tokeniser.json")
    status, out = run(folder, capsys)
    assert status == 1
    assert "missing: tokenizer.json" in out and "unknown: tokeniser.json" in out
    assert "6 quantities, 0 beyond their tolerance" in out


@pytest.mark.parametrize(
    ("ours", "theirs", "value"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), 0.5),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), torch.inf),
        (torch.zeros(2), torch.zeros(1, 2), torch.inf),
        (torch.zeros(0), torch.zeros(0), 0.0),
    ],
)
def test_deviations(ours: torch.Tensor, theirs: torch.Tensor, value: float) -> None:
    assert parity.close("", ours, theirs, 1.0).value == value
