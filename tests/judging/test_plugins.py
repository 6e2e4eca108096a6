"""Judges and rewards of a user's own: named ``module:Name``, found in the current directory, run by ``srum run``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from srum import models
from srum.config import ConfigError, load_config
from srum.judging.rewards import Reward, RewardError
from srum.judging.stage import load_judge, load_judging
from srum.loop import run_loop
from srum.plugins import PluginError
from srum.records import Failure, Judgement, Region
from srum.run_dir import read_records
from tests.fakes import FakeModel

IMAGES = [Image.new("RGB", (8, 8), grey) for grey in ("black", "white")]
REGIONS = [[Region(id=1, box=(0, 0, 4, 4), area=16, source="here")], []]
SMALL = ["rounds=1", "prompt_count=3", "candidates_per_prompt=2", "train.steps=2", "eval.count=4", "compare=[]"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that is the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", FakeModel.load)
    for name in ("my_reward", "my_judge"):
        sys.modules.pop(name, None)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return tmp_path


def reward(here: Path, body: str, parameters: str = "images, prompts, metadata") -> Reward:
    (here / "my_reward.py").write_text(f"def score({parameters}):\n    {body}\n")
    return Reward("my_reward:score")


def test_a_score_of_the_image_is_that_of_its_layout_and_regions(here: Path) -> None:
    bright = reward(here, "return [sum(x.getpixel((0, 0))) / 382.5 - 1 for x in images]")
    (dark, light) = bright.judge(IMAGES, ["a", "b"], [{}, {}], REGIONS)
    assert (dark[1].score, light[1].score) == (-1, 1)
    assert [(region.region_id, region.score) for region in dark[0]] == [(1, -1)] and light[0] == []


def test_a_reward_may_score_regions_and_read_metadata(here: Path) -> None:
    by_region = reward(
        here,
        "return [(m['of_image'], [len(p) / 10 for _ in own]) for m, p, own in zip(metadata, prompts, regions)]",
        "images, prompts, metadata, regions",
    )
    (first, second) = by_region.judge(IMAGES, ["abc", "d"], [{"of_image": 0.5}, {"of_image": -0.5}], REGIONS)
    assert first[1].score == 0.5 and [region.score for region in first[0]] == [0.3]
    assert second[1].score == -0.5 and second[0] == []


def test_no_score_is_a_failure_and_never_a_number(here: Path) -> None:
    ((regions, layout), _) = reward(here, "return [None, 1.0]").judge(IMAGES, ["a", "b"], [{}, {}], REGIONS)
    assert layout.score is None and layout.failure == Failure.NO_SCORE == regions[0].failure


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [0.0]", "my_reward:score returned 1 scores for 2 images"),
        ("return [0.0, 1.5]", r"returned 1.5; a score is a number in \[-1, 1\]"),
        ("return [0.0, float('nan')]", "returned nan"),
    ],
)
def test_nonsense_is_one_line(here: Path, body: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        reward(here, body).judge(IMAGES, ["a", "b"], [{}, {}], REGIONS)


def test_a_reward_runs_to_a_report(here: Path) -> None:
    (here / "my_reward.py").write_text(
        "def score(images, prompts, metadata):\n"
        "    assert all('tag' in facts for facts in metadata)\n"
        "    return [hash(x.tobytes()) % 21 / 10 - 1 for x in images]\n"
    )
    run_loop(load_config(None, [*SMALL, "judge.reward=my_reward:score"]), here / "run")
    judgements = read_records(here / "run/round-000/judgements.jsonl", Judgement)
    assert len(judgements) == 6 and all(judgement.layout.score is not None for judgement in judgements)
    assert (here / "run/round-000/train/region_nft/model").is_dir()
    assert "my_reward:score" in (here / "run/report.html").read_text()


def test_a_judge_runs_to_a_report(here: Path) -> None:
    (here / "my_judge.py").write_text(
        "from srum.records import LayoutJudgement, RegionJudgement\n"
        "class Mine:\n"
        "    def __init__(self, model, strictness=0.0):\n"
        "        self.strictness = strictness\n"
        "    def judge(self, images, prompts, regions):\n"
        "        levels = [sum(x.resize((1, 1)).getpixel((0, 0))) / 765 - self.strictness for x in images]\n"
        "        return [([RegionJudgement(region_id=r.id, score=level) for r in own], LayoutJudgement(score=level))\n"
        "                for own, level in zip(regions, levels)]\n"
    )
    overrides = [*SMALL, "judge.by=my_judge:Mine", "judge.options.strictness=0.5"]
    run_loop(load_config(None, overrides), here / "run")
    judgements = read_records(here / "run/round-000/judgements.jsonl", Judgement)
    assert all(-0.5 <= (judgement.layout.score or 0.0) <= 0.5 for judgement in judgements)
    assert list(json.loads((here / "run/summary.json").read_text())) == ["base", "region_nft"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["judge.by=my_judge:Gone"], "judge 'my_judge:Gone': my_judge has no 'Gone'"),
        (["judge.by=my_judge:NoJudge"], "NoJudge has no method judge"),
        (["judge.by=my_judge:Plain", "judge.options.strict=1"], "its options are: none"),
        (["judge.reward=nothing"], "no reward 'nothing': give module:Name"),
    ],
)
def test_what_cannot_judge_is_named(here: Path, overrides: list[str], message: str) -> None:
    (here / "my_judge.py").write_text("class NoJudge: ...\nclass Plain:\n    def judge(self, *_): ...\n")
    with pytest.raises(PluginError, match=message):
        load_judging(load_config(None, overrides), "srum-tiny", 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["judge.reward=a:b", "judge.by=c:D"], "judge.reward: a:b stands in for a judge"),
        (["judge.options.x=1"], "judge.options: they are those of a judge of your own"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_the_models_judge_is_the_default(here: Path) -> None:
    assert type(load_judge(load_config(), "srum-tiny", 0)).__name__ == "SelfJudge"
