"""What a run is made with is in its folder and in its report; it may grow, and nothing changes silently."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import srum
from srum import models, provenance
from srum.config import load_config
from srum.json_files import JsonError
from srum.loop import run_loop
from srum.provenance import LIBRARIES, described, device_name, made_with, read_entries
from srum.run_dir import RunError, claim_run
from srum.views.report import write_report
from tests.fakes import FakeModel

SMALL = ["prompt_count=3", "candidates_per_prompt=2", "reward.on_failure=keep", "eval.count=3"]
SMALL += ["train.steps=2", "train.batch_size=2", "train.lr=3e-4"]


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)


def run_of(folder: Path, rounds: int, resume: bool = False) -> dict[str, Any]:
    return run_loop(load_config(None, [*SMALL, f"rounds={rounds}"]), folder, resume)


def with_another(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    today = made_with("cpu") | facts
    monkeypatch.setattr(provenance, "made_with", lambda device: today)


# --- what it is made with


def test_the_first_launch_says_what_the_run_is_made_with(tmp_path: Path) -> None:
    claim_run(tmp_path, load_config())
    (entry,) = read_entries(tmp_path / "made_with.json")
    assert entry["srum"] == srum.__version__ and entry["torch"] == torch.__version__ and entry["device"]
    assert set(LIBRARIES) | {"python", "date"} <= entry.keys() and entry["notes"] == []


def test_the_same_means_add_no_entry_and_no_warning(tmp_path: Path) -> None:
    claim_run(tmp_path, load_config())
    before = (tmp_path / "made_with.json").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        claim_run(tmp_path, load_config(), resume=True)
    assert (tmp_path / "made_with.json").read_bytes() == before


def test_going_on_with_other_means_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim_run(tmp_path, load_config())
    with_another(monkeypatch, torch="9.0", device="another")
    device = device_name("auto")
    with pytest.warns(UserWarning) as warned:
        claim_run(tmp_path, load_config(), resume=True)
    (message,) = {str(warning.message) for warning in warned}
    assert f"torch 9.0 in place of {torch.__version__}; device another in place of {device}" in message
    claim_run(tmp_path, load_config(), resume=True)
    first, second = described(read_entries(tmp_path / "made_with.json"))
    assert f"made with srum {srum.__version__}" in first and f"torch {torch.__version__}" in first
    assert second.endswith(
        f"went on with torch 9.0 in place of {torch.__version__}, device another in place of {device}"
    )


def test_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim_run(tmp_path, load_config())
    with_another(monkeypatch, torch="<b>9.0")
    with pytest.warns(UserWarning):
        claim_run(tmp_path, load_config(), resume=True)
    page = write_report(tmp_path).read_text()
    assert (
        f"made with srum {srum.__version__}" in page and f"torch &lt;b&gt;9.0 in place of {torch.__version__}" in page
    )


def test_a_run_from_before_this_was_recorded(tmp_path: Path) -> None:
    claim_run(tmp_path, load_config())
    (tmp_path / "made_with.json").unlink()
    (tmp_path / "round-000").mkdir()
    claim_run(tmp_path, load_config(), resume=True)
    (entry,) = read_entries(tmp_path / "made_with.json")
    assert entry["notes"] == ["what it was begun with was not recorded"]


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]"])
def test_a_file_that_is_no_list_of_entries_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "made_with.json").write_text(content)
    with pytest.raises(JsonError, match=r"made_with\.json"):
        read_entries(tmp_path / "made_with.json")


def test_the_commit_is_that_of_the_checkout_that_holds_the_code(tmp_path: Path) -> None:
    """Not that of another checkout in which the package happens to be installed."""

    def git(*arguments: str) -> str:
        named = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *named, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    commit = provenance._commit.__wrapped__
    (tmp_path / "srum").mkdir()
    (tmp_path / "srum/__init__.py").touch()
    assert commit(tmp_path) == {}
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "of something else")
    assert commit(tmp_path) == {}
    git("add", "srum")
    git("commit", "-q", "-m", "code")
    assert commit(tmp_path) == {"commit": git("rev-parse", "HEAD").strip(), "changed": False}
    (tmp_path / "srum/__init__.py").write_text("changed")
    assert commit(tmp_path)["changed"]


def test_a_device_has_a_name() -> None:
    assert device_name("cpu") and (torch.cuda.is_available() or device_name("auto") == device_name("cpu"))


# --- a config of older code


def test_a_config_that_lacks_fields_is_completed_in_sight(tmp_path: Path) -> None:
    claim_run(tmp_path, load_config())
    whole = (tmp_path / "config.yaml").read_text()
    values = yaml.safe_load(whole)
    del values["rollout"]["renorm"], values["candidates_per_prompt"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.warns(
        UserWarning, match=r"today's adds the defaults candidates_per_prompt: 8; rollout\.renorm: global"
    ):
        claim_run(tmp_path, load_config(), resume=True)
    assert (tmp_path / "config.yaml").read_text() == whole
    last = read_entries(tmp_path / "made_with.json")[-1]
    assert last["notes"] == [
        f"{field} (default of a field that was not there)"
        for field in ("candidates_per_prompt: 8", "rollout.renorm: global")
    ]


def test_a_field_that_changes_on_the_way_is_noted(tmp_path: Path) -> None:
    claim_run(tmp_path, load_config())
    claim_run(tmp_path, load_config(None, ["device=cpu"]), resume=True)
    assert read_entries(tmp_path / "made_with.json")[-1]["notes"] == ["device: auto -> cpu"]


# --- more rounds


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two rounds."""
    folder = tmp_path_factory.mktemp("two") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", FakeModel.load)
        run_of(folder, 2)
    return folder


def test_a_run_that_grows_ends_as_one_that_was_as_long_from_the_start(tmp_path: Path, two: Path) -> None:
    run = tmp_path / "run"
    run_of(run, 1)
    summary = (run / "summary.json").read_bytes()
    verdicts = {path.relative_to(run): path.read_bytes() for path in run.glob("eval/*/verdicts.jsonl")}
    run_of(run, 2, resume=True)
    assert (run / "summary.json").read_bytes() == (two / "summary.json").read_bytes() != summary
    assert (run / "config.yaml").read_bytes() == (two / "config.yaml").read_bytes()
    assert (run / "round-000/summary.json").read_bytes() == summary
    assert {path: (run / "round-000" / path).read_bytes() for path in verdicts} == verdicts
    assert read_entries(run / "made_with.json")[-1]["notes"] == ["rounds: 1 -> 2"]


class Killed(BaseException):
    """Stands for a kill: nothing in the code handles it."""


@pytest.mark.parametrize(
    "place", ["made_with.json", "round-000/eval", "round-000/summary.json", "config.yaml", "eval/base/verdicts.jsonl"]
)
def test_a_kill_while_it_grows_changes_nothing_in_the_end(
    tmp_path: Path, two: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run = tmp_path / "run"
    run_of(run, 1)

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def replace(path: Path, target: Path) -> Any:
            if Path(target) == run / place:
                raise Killed
            return original(path, target)

        return replace

    with monkeypatch.context() as patch, pytest.raises(Killed):
        for method in ("replace", "rename"):
            patch.setattr(Path, method, dying(getattr(Path, method)))
        run_of(run, 2, resume=True)
    run_of(run, 2, resume=True)
    assert (run / "summary.json").read_bytes() == (two / "summary.json").read_bytes()
    assert (
        json.loads((run / "round-000/summary.json").read_text())
        and (run / "round-000/eval/base/verdicts.jsonl").exists()
    )


def test_rounds_only_grow_and_only_with_resume(tmp_path: Path) -> None:
    claim_run(tmp_path, load_config(None, ["rounds=2"]))
    with pytest.raises(RunError, match="pass --resume"):
        claim_run(tmp_path, load_config(None, ["rounds=3"]))
    with pytest.raises(RunError, match=r"another config \(rounds: 2 != 1\)"):
        claim_run(tmp_path, load_config(None, ["rounds=1"]), resume=True)
    with pytest.raises(RunError, match=r"another config \(seed: 0 != 1\)"):
        claim_run(tmp_path, load_config(None, ["rounds=3", "seed=1"]), resume=True)
    assert load_config(tmp_path / "config.yaml").rounds == 2 and len(read_entries(tmp_path / "made_with.json")) == 1
