"""The whole loop on a tiny OpenUni with RecA, SFT and region-NFT: what it leaves, and that neither a kill nor a second
process changes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srum.loop import run_loop
from srum.models import openuni
from srum.models.openuni import OpenUni
from srum.models.openuni.checkpoint import WEIGHTS
from tests.interrupted import assert_two_did_what_one_did, killed_in_training
from tests.launch import launch
from tests.openuni_tiny import queries_run, queries_trained, small, tiny, whole_run
from tests.test_loop import files_of

ARMS = ("sft", "reca", "region_nft")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_loop(small(model), folder)
    return folder


def test_what_is_trained_is_the_transformer_alone(whole: Path, model: Path) -> None:
    assert (whole / "report.html").is_file()
    before = load_file(model / WEIGHTS)
    for arm in ARMS:
        folder = whole / "round-000" / "train" / arm / "model"
        after = load_file(folder / WEIGHTS)
        assert after.keys() == before.keys()
        differ = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert differ and all(name.startswith("transformer.") for name in differ)
        assert OpenUni.load(folder).network is not None


@pytest.mark.slow
def test_a_kill_while_judging_and_while_training_changes_nothing(
    whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(OpenUni, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_loop(small(model), folder)
    with killed_in_training(monkeypatch):
        run_loop(small(model), folder, resume=True)
    run_loop(small(model), folder, resume=True)
    ours, theirs = files_of(folder), files_of(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and "checkpoints" not in name] == []


@pytest.mark.slow
def test_two_processes_do_what_one_does(whole: Path, model: Path, tmp_path: Path) -> None:
    launch(whole_run, tmp_path / "two", model)
    assert_two_did_what_one_did(whole, tmp_path / "two", ARMS, WEIGHTS)


@pytest.mark.slow
def test_two_processes_train_the_queries_as_one_does(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RecA on all that its paper trains, the language model beside it in each process, in float32: in bfloat16 what it
    says of a context depends on the batch by its rounding."""
    monkeypatch.setattr(openuni, "native_bfloat16", lambda _: False)
    run_loop(queries_trained(model), tmp_path / "one")
    launch(queries_run, tmp_path / "two", model)
    before = load_file(model / WEIGHTS)
    one, two = (load_file(tmp_path / n / "round-000" / "train" / "reca" / "model" / WEIGHTS) for n in ("one", "two"))
    same = {name for name in before if torch.equal(before[name], one[name])}
    assert all(name.endswith(("k_proj.bias", "to_k.bias")) for name in same)  # of which nothing depends
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_updates_of_low_rank_are_merged(model: Path, tmp_path: Path) -> None:
    run_loop(small(model, **{"train.lora.rank": 4, "compare": "[]"}), tmp_path / "run")
    folder = tmp_path / "run" / "round-000" / "train" / "region_nft"
    before, after = (load_file(path / WEIGHTS) for path in (model, folder / "model"))
    differ = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert differ and all(name.startswith("transformer.transformer_blocks.") for name in differ)
    assert (folder / "adapter").is_dir()
