"""Own prompts have an outcome: a share held out of every round, drawn by all arms, judged by a judge that stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srum import models
from srum.config import load_config
from srum.fork import fork_run
from srum.loop import run_loop
from srum.own import JudgedImage, gain, lowest, mean_score, summary
from srum.records import Candidate
from srum.run import Run
from srum.run_dir import RunError, claim_run, read_records
from srum.stages.rollout import own_prompts, round_prompts
from srum.views.report import OFF, to_come
from tests.fakes import FakeModel


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Forty prompts, of which two lines say the same."""
    path = tmp_path / "own.txt"
    path.write_text("".join(f"thing number {n % 39}\n" for n in range(40)))
    return path


def judged(*scores: float | None) -> list[JudgedImage]:
    return [JudgedImage(prompt_id=f"p{n}", prompt="p", score=score, said="") for n, score in enumerate(scores)]


def test_no_round_has_a_held_out_prompt(prompts: Path) -> None:
    config = load_config(None, [f"prompts={prompts}", "prompt_count=1000", "eval.own_share=0.25"])
    held_out = {prompt.text for prompt in own_prompts(config)}
    assert len(held_out) in (9, 10)
    for k in range(3):
        assert held_out.isdisjoint(prompt.text for prompt in round_prompts(config, k))
    again = config.model_copy(update={"seed": 7})
    assert own_prompts(again) == own_prompts(config)


def test_what_is_held_out_stays_so_whatever_becomes_of_the_file(prompts: Path, tmp_path: Path) -> None:
    config = load_config(None, [f"prompts={prompts}", "prompt_count=1000", "eval.own_share=0.25", "eval.count=0"])
    held_out, trained = own_prompts(config), round_prompts(config, 0)
    run = Run(tmp_path / "run", config)
    claim_run(run.folder, config)
    prompts.write_text("a new first line\n" + prompts.read_text())
    assert own_prompts(config) != held_out, "another share of the file"
    claim_run(run.folder, config, resume=True)
    assert own_prompts(run.pinned) == held_out and round_prompts(run.pinned, 0) == trained
    fork_run(run.folder, tmp_path / "fork", "rollout", config, 0)
    prompts.unlink()
    moved = Run(run.folder.rename(tmp_path / "moved"), config)
    for there in (moved, Run(tmp_path / "fork", config)):
        assert own_prompts(there.pinned) == held_out
        claim_run(there.folder, config, resume=True)
    assert "your held-out prompts: base, sft, srum, region_nft" in to_come(moved)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [(["eval.own_share=0"], 0), (["eval.own_share=0.5", "eval.own_limit=3"], 3), ([], 4), (["prompts=train"], 0)],
)
def test_how_many_are_held_out(prompts: Path, overrides: list[str], count: int) -> None:
    assert len(own_prompts(load_config(None, [f"prompts={prompts}", *overrides]))) == count


def test_a_file_of_one_text_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("a cat\n" * 20)
    with pytest.raises(RunError, match=r"same\.txt: every prompt is held out; set eval\.own_share=0"):
        round_prompts(load_config(None, [f"prompts={tmp_path / 'same.txt'}"]), 0)


def test_the_judge_is_frozen_where_it_would_be_trained_along() -> None:
    judges = {"self": "start", "start": "start", "models/other": "models/other"}
    for named, frozen in judges.items():
        assert load_config(None, [f"judge.model={named}"]).judge.frozen().model == frozen


def test_means_and_differences_are_of_what_has_a_score() -> None:
    """Base 0, 1, none, 0; the arm 1, 1, 1, none: the means are 1/3 and 1, and of the two pairs one gains 1."""
    base, arm = judged(0.0, 1.0, None, 0.0), judged(1.0, 1.0, 1.0, None)
    means = [mean_score(images) for images in (base, arm)]
    assert [mean and pytest.approx(mean.value) for mean in means] == [1 / 3, 1.0]
    above = gain(arm, base)
    assert above is not None and (above.value, above.prompts) == (0.5, 2) and 0 <= above.low < 0.5 < above.high <= 1
    values = summary("a judge", {"base": base, "sft": arm, "none": judged(None)})
    assert values["arms"]["none"] == {"images": 1, "failed": 1}
    assert values["arms"]["sft"]["difference_to_base"]["pairs"] == 2
    assert "difference_to_base" not in values["arms"]["base"]


def test_what_was_found_lowest_is_said() -> None:
    assert lowest([("2 star", -1.0, "not asked for"), ("layout", 0.5, "fine")]) == "2 star: not asked for"
    assert lowest([("layout", None, "no_score")]) == "layout: no_score"


def test_a_run_of_own_prompts_ends_in_scores_of_the_weights_that_entered(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All arms on the same held-out prompts, judged by srum-tiny as it entered; again, nothing is drawn or judged."""
    loaded: list[str] = []

    def load(name: str, *arguments: Any, **options: Any) -> FakeModel:
        loaded.append(str(name))
        return FakeModel.load(name, *arguments, **options)

    monkeypatch.setattr(models, "load", load)
    sets = [f"prompts={prompts}", "rounds=1", "prompt_count=4", "candidates_per_prompt=2", "train.steps=1"]
    config = load_config(None, [*sets, "compare=[]", "eval.count=0", "reward.on_failure=keep", "train.batch_size=2"])
    folder = tmp_path / "run"
    run_loop(config, folder)
    assert loaded[-1] == "srum-tiny"
    asked = {prompt.text for prompt in own_prompts(config)}
    for arm in ("base", "region_nft"):
        assert {image.prompt for image in read_records(folder / "own" / arm / "scores.jsonl", JudgedImage)} == asked
    assert asked.isdisjoint(c.prompt for c in read_records(folder / "round-000/candidates.jsonl", Candidate))
    values = json.loads((folder / "own.json").read_text())
    assert values["judge"] == "the model itself, with the weights that entered the run"
    assert list(values["arms"]) == ["base", "region_nft"]
    page = (folder / "report.html").read_text()
    assert "On your own prompts" in page and OFF not in page and page.count('class="compare"') == 4
    assert to_come(Run(folder, config)) == []
    loaded.clear()
    run_loop(config, folder, resume=True)
    assert loaded == ["srum-tiny"] * 3  # to check the config
    assert json.loads((folder / "own.json").read_text()) == values
    before = read_records(folder / "own/region_nft/scores.jsonl", JudgedImage)
    loaded.clear()
    prompts.unlink()
    run_loop(config.model_copy(update={"rounds": 2}), folder, resume=True)
    assert str(folder / "round-001/train/region_nft/model") in loaded, "what it draws is that of the new last weights"
    assert json.loads((folder / "round-000/own.json").read_text()) == values
    assert read_records(folder / "round-000/own/region_nft/scores.jsonl", JudgedImage) == before
    assert {"own", "own.json"} <= {path.name for path in folder.iterdir()}
    assert {image.prompt for image in read_records(folder / "own/region_nft/scores.jsonl", JudgedImage)} == asked


def test_a_run_without_any_evaluation_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)
    sets = ["rounds=1", "prompt_count=3", "candidates_per_prompt=2", "train.steps=1", "eval.count=0", "compare=[]"]
    run_loop(load_config(None, [*sets, "reward.on_failure=keep"]), tmp_path / "run")
    assert "Evaluation is off" in capsys.readouterr().out
    assert OFF in (tmp_path / "run/report.html").read_text()
