"""Forks: what is shared, what is not, and that a fork that goes on is the run that it would have been."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from srum import models
from srum.config import ConfigError, RunConfig, changed, load_config
from srum.fork import FILES, fork_run
from srum.loop import run_loop
from srum.run import Run
from srum.run_dir import RunError, claim_run, write_text
from tests.fakes import FakeModel, run_on_fakes

CHANGED = ("train.lr=0.001", "train.text_dropout=0.2")  # what only training depends on


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished rounds."""
    return run_on_fakes(tmp_path_factory.mktemp("fork") / "source")


def config_of(source: Path, *overrides: str) -> RunConfig:
    return load_config(source / "config.yaml", overrides)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its name, but for the times."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "timings.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def results(folder: Path) -> dict[str, bytes]:
    """Records, images, arrays and the summary."""
    kinds = (".jsonl", ".png", ".safetensors", "summary.json")
    return {name: content for name, content in contents(folder).items() if name.endswith(kinds)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)
    run_loop(load_config(folder / "config.yaml"), folder, resume=True)


@pytest.mark.parametrize("stage", FILES)
def test_a_fork_has_what_lies_before_the_stage(source: Path, tmp_path: Path, stage: str) -> None:
    fork_run(source, tmp_path / "fork", stage, config_of(source), 0)
    made = Run(source, config_of(source)).stages
    before = [name for name in list(FILES)[: list(FILES).index(stage)] if name in made]
    folder = tmp_path / "fork/round-000"
    assert (names(folder) if folder.exists() else set()) == {file for name in before for file in FILES[name]}
    assert names(tmp_path / "fork") == {"config.yaml", "forked.json"} | ({"round-000"} if before else set())
    expected = {"source": str(source), "stage": stage, "round": 0}
    assert json.loads((tmp_path / "fork/forked.json").read_text()) == expected
    assert names(tmp_path) == {"fork"}


def test_the_last_round_is_forked_by_default_and_those_before_it_are_shared_whole(source: Path, tmp_path: Path) -> None:
    fork_run(source, tmp_path / "fork", "judge", config_of(source))
    assert names(tmp_path / "fork/round-000") == names(source / "round-000")
    for arm in (source / "round-000/train").iterdir():
        assert names(tmp_path / "fork/round-000/train" / arm.name) == names(arm) - {"checkpoints"}
    assert names(tmp_path / "fork/round-001") == {f for name in ("rollout", "ground") for f in FILES[name]}
    fork_run(source, tmp_path / "more", "rollout", config_of(source, "rounds=5"))
    assert names(tmp_path / "more") == {"config.yaml", "forked.json", "round-000", "round-001"}
    assert json.loads((tmp_path / "more/forked.json").read_text())["round"] == 2


@pytest.mark.parametrize("stage", FILES)
def test_a_fork_of_the_same_config_goes_on_to_the_same_end(
    source: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_run(source, tmp_path / "fork", stage, config_of(source))
    go_on(tmp_path / "fork", monkeypatch)
    assert results(tmp_path / "fork") == results(source)


def test_a_fork_of_another_config_is_the_run_of_that_config(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run that it was forked from stays as it is, byte by byte."""
    before = contents(source)
    fork_run(source, tmp_path / "fork", "train", config_of(source, *CHANGED), 0)
    go_on(tmp_path / "fork", monkeypatch)
    run_on_fakes(tmp_path / "fresh", *CHANGED)
    assert results(tmp_path / "fork") == results(tmp_path / "fresh") != results(source)
    assert contents(source) == before


def test_methods_are_compared_on_the_same_candidates(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork by another method trains as that method's arm does beside the run's own."""
    config = changed(config_of(source), ["method=srum", "compare=[]", "rounds=1"])
    fork_run(source, tmp_path / "fork", "train", config, 0)
    go_on(tmp_path / "fork", monkeypatch)
    forked, beside = (results(folder / "round-000/train/srum") for folder in (tmp_path / "fork", source))
    assert forked == beside and forked != results(source / "round-000/train/region_nft")


NOTED = """
from srum.stages import GROUND, ROLLOUT, Stage
from srum.train.methods.sft import Sft


class Noted(Sft):
    name = "noted"
    stages = (ROLLOUT, Stage("note", ("notes",), "my_noted:note", "Note what is seen."), GROUND)
"""


@pytest.mark.parametrize(("stage", "shared"), [("rollout", False), ("ground", True), ("judge", True), ("train", True)])
def test_a_stage_of_a_users_own_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, shared: bool
) -> None:
    """Of the round that is forked where it comes before, of those before that always."""
    (tmp_path / "my_noted.py").write_text(NOTED)
    monkeypatch.syspath_prepend(tmp_path)
    source, config = tmp_path / "source", load_config(None, ["method=my_noted:Noted", "compare=[]", "rounds=2"])
    claim_run(source, config)
    for k in range(2):
        for name in ("prompts", "candidates", "notes", "regions"):
            write_text(source / f"round-{k:03d}/{name}.jsonl", "")
        for name in ("images", "latents", "train/noted/model"):
            (source / f"round-{k:03d}" / name).mkdir(parents=True)
    fork_run(source, tmp_path / "fork", stage, config, 1)
    assert (tmp_path / "fork/round-000/notes.jsonl").exists()
    assert (tmp_path / "fork/round-001/notes.jsonl").exists() == shared
    assert (tmp_path / "fork/round-001/regions.jsonl").exists() == (stage in ("judge", "train"))


def test_what_is_written_once_is_linked_and_the_rest_is_copied(source: Path, tmp_path: Path) -> None:
    """A folder of the name of such a one above the run links nothing."""
    target = tmp_path / "model/fork"
    target.parent.mkdir()
    fork_run(source, target, "judge", config_of(source), 1)
    linked = {path.name for path in target.rglob("*") if path.is_file() and path.stat().st_nlink > 1}
    assert {"ema.safetensors"} < linked and not [name for name in linked if name.endswith((".jsonl", ".yaml"))]
    (image, *_) = (target / "round-000/images").iterdir()
    assert image.samefile(source / "round-000/images" / image.name)


def test_where_links_fail_files_are_copied(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    fork_run(source, tmp_path / "linked", "train", config_of(source))
    monkeypatch.setattr(os, "link", refuse)
    fork_run(source, tmp_path / "copied", "train", config_of(source))
    assert contents(tmp_path / "copied") == contents(tmp_path / "linked")
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "copied").rglob("*") if path.is_file())


def test_a_half_made_fork_is_not_a_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not there, and the same call makes it whole."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fork_run(source, tmp_path / "fork", "train", config_of(source))
    assert not (tmp_path / "fork").exists() and not list(tmp_path.rglob("config.yaml"))
    fork_run(source, tmp_path / "fork", "train", config_of(source))
    assert names(tmp_path) == {"fork"} and (tmp_path / "fork/round-001/rewards.jsonl").exists()


@pytest.mark.parametrize(
    ("stage", "override", "round_", "differs"),
    [
        ("ground", "seed=1", 0, "seed: 0 != 1"),
        ("ground", "rollout.guidance=2.0", 0, "rollout.guidance: 1.0 != 2.0"),
        ("judge", "ground.grounder=grid", 0, "ground.grounder: classical != grid"),
        ("rasterize", "judge.soft=false", 0, "judge.soft: True != False"),
        ("train", "reward.centred=true", 0, "reward.centred: False != True"),
        ("rollout", "train.lr=0.001", 1, "train.lr: 0.0001 != 0.001"),
        ("train", "train.lr=0.001", None, r"train.lr: 0.0001 != 0.001\); fork round 0"),
    ],
)
def test_a_config_that_shared_stages_do_not_have_is_refused(
    source: Path, tmp_path: Path, stage: str, override: str, round_: int | None, differs: str
) -> None:
    with pytest.raises(RunError, match=differs):
        fork_run(source, tmp_path / "fork", stage, config_of(source, override), round_)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("stage", "override", "round_"),
    [
        ("rollout", "seed=1", 0),
        ("ground", "ground.grounder=grid", 0),
        ("judge", "judge.soft=false", 0),
        ("rasterize", "reward.centred=true", 0),
        ("train", "train.lr=0.001", 0),
        ("train", "eval.count=3", 1),
        ("train", "rounds=4", 1),
        ("train", "device=cpu", 1),
    ],
)
def test_what_shared_stages_do_not_depend_on_may_differ(
    source: Path, tmp_path: Path, stage: str, override: str, round_: int
) -> None:
    config = config_of(source, override)
    fork_run(source, tmp_path / "fork", stage, config, round_)
    assert load_config(tmp_path / "fork/config.yaml") == config


def test_what_cannot_be_forked_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    config, target = config_of(source), tmp_path / "fork"
    with pytest.raises(RunError, match="stage: 'tain' is none; expected rollout, ground"):
        fork_run(source, target, "tain", config)
    with pytest.raises(RunError, match="is not the folder of a run"):
        fork_run(tmp_path, target, "train", config)
    with pytest.raises(RunError, match="round 2 cannot be forked: the config asks for 2 rounds"):
        fork_run(source, target, "train", config, 2)
    unfinished = shutil.copytree(source, tmp_path / "unfinished")
    (unfinished / "round-000/judgements.jsonl").write_text('{"schema": 1')
    with pytest.raises(RunError, match=r"train of round 0 .*round-000/judgements.jsonl is missing or unfinished"):
        fork_run(unfinished, target, "train", config)
    shutil.rmtree(next((unfinished / "round-000/train").iterdir()) / "model")
    with pytest.raises(RunError, match=r"rollout of round 1 cannot be forked"):
        fork_run(unfinished, target, "rollout", config, 1)
    target.mkdir()
    with pytest.raises(RunError, match="fork exists; choose another folder"):
        fork_run(source, target, "train", config)


def test_a_change_of_the_method_leaves_the_fields_of_its_own() -> None:
    """What both have stays; beta is region_nft's, lambda_c is srum's."""
    shared = ["train.lr=0.001", "reward.mapping=unit"]
    config = load_config(None, ["beta=0.7", *shared])
    assert changed(config, ["beta=0.5"]) == load_config(None, ["beta=0.5", *shared])
    other = changed(config, ["constraint_weight=0.1", "method=srum"])
    assert other == load_config(None, ["method=srum", "constraint_weight=0.1", *shared])
    with pytest.raises(ConfigError, match="unknown key beta"):
        changed(config, ["method=srum", "beta=0.7"])
