"""Pickled weights: what becomes safetensors, and what is refused in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from srum.cli import app
from srum.errors import ModelError
from srum.models.checkpoints import weight_files
from srum.models.pickles import convert, read_pickle

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


class Runs:
    """What a pickle can do to who reads it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("touched"),)  # type: ignore[return-value]


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[n], x) and ours[n].dtype == x.dtype for n, x in theirs.items()
    )


def test_a_folder_keeps_all_else(tmp_path: Path) -> None:
    """Also views, tied tensors, a state dict among other things, and folders within it."""
    (tmp_path / "old" / "vq").mkdir(parents=True)
    (tmp_path / "old" / "config.json").write_text("{}")
    tied = WEIGHTS | {"head": WEIGHTS["a.weight"], "column": WEIGHTS["a.weight"][:, 1]}
    torch.save(tied, tmp_path / "old" / "pytorch_model.bin")
    torch.save({"model": WEIGHTS, "epoch": 3}, tmp_path / "old" / "vq" / "kl16.ckpt")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "old"), "--out", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    files = {str(p.relative_to(tmp_path / "new")) for p in (tmp_path / "new").rglob("*") if p.is_file()}
    assert files == {"config.json", "pytorch_model.safetensors", "vq/kl16.safetensors"}
    assert same(load_file(tmp_path / "new" / "pytorch_model.safetensors"), tied)
    assert same(load_file(tmp_path / "new" / "vq" / "kl16.safetensors"), WEIGHTS)
    again = CliRunner().invoke(app, ["convert", str(tmp_path / "old"), "--out", str(tmp_path / "new")])
    assert again.exit_code == 2 and "exists: convert into a new one" in again.output


def test_a_file_goes_both_ways(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pth")
    convert(tmp_path / "b.pth", tmp_path / "c.safetensors")
    assert same(load_file(tmp_path / "c.safetensors"), WEIGHTS)
    with pytest.raises(ModelError, match=r"one has to be \.safetensors"):
        convert(tmp_path / "b.pth", tmp_path / "c.bin")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (pickle.dumps({"a": Runs()}), "no pickle of tensors alone"),
        (b"", "damaged"),
        (b"PK\x03\x04cut off", "damaged"),
        (b"neither", "no pickle of tensors alone"),
    ],
)
def test_what_is_no_pickle_of_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.bin").write_bytes(content)
    with pytest.raises(ModelError, match=named) as raised:
        read_pickle(Path("bad.bin"))
    assert "bad.bin" in str(raised.value) and "\n" not in str(raised.value) and not Path("touched").exists()


def test_other_things_than_tensors_by_name_are_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="no tensors by name"):
        read_pickle(tmp_path / "list.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="nothing to convert"):
        convert(tmp_path / "empty", tmp_path / "out")


def test_pickles_are_named_where_weights_are_looked_for(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle, .* srum convert"):
        weight_files(tmp_path, ["model.safetensors"])
