"""What an image is worth to a policy, by whom; a failure is never a reward. Alarms, and when training ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from srum.config import ConfigError, load_config
from srum.records import Failure, Grounding, Judgement, LayoutJudgement, Prompt, Region, RegionJudgement
from srum.run import Run, find_method
from srum.train import rewards
from srum.train.alarms import WINDOW, alarms, widened
from srum.train.metrics import keep_rows
from srum.train.online import OnlineSource
from srum.train.policy import group_advantages
from srum.train.reason import Reason, figures
from srum.train.rewards import QuestionReward, Value, checker_value
from srum.train.trainer import train
from tests.fakes import FakeModel
from tests.train.test_flow_grpo import PROMPTS, SMALL, brightness, tiny

BLANK = Image.new("RGB", (64, 64), "white")


def test_a_question_that_failed_leaves_no_value() -> None:
    reward = QuestionReward.__new__(QuestionReward)
    reward.right_at = 0.9
    assert reward._value([1.0, 0.5]) == Value(0.75) and reward._value([1.0, 0.9]) == Value(1.0)
    assert reward._value([1.0, Failure.NO_REPLY]) == Value(None, failure="no_reply")
    assert reward._value([]) == Value(None, failure="no_questions")


def test_failures_are_counted_by_kind_and_have_no_advantage() -> None:
    values = [Value(1.0), Value(None, failure="no_reply"), Value(0.0), Value(None, failure="no_questions")]
    told = figures(values, [0, 0, 1, 1])
    assert (told["failed_values"], told["failed_no_reply"], told["value"]) == (0.5, 0.25, 0.5)
    assert group_advantages([one.value for one in values], [0, 0, 1, 1]) == [0.0] * 4


@pytest.mark.parametrize(
    ("rules", "value", "lowest"),
    [
        ([], None, None),
        (["reward.on_failure=keep"], 0.0, -1.0),
        (["reward.on_failure=keep", "reward.overlap=max", "reward.mapping=unit"], 0.0, 1.0),
    ],
)
def test_the_judges_reward_follows_the_rules_of_the_config(
    rules: list[str], value: float | None, lowest: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A good region, a bad one within it, and one whose judgement failed; the map is signed whatever the mapping."""
    boxes = {1: (0, 0, 64, 64), 2: (0, 0, 32, 32), 3: (32, 32, 64, 64)}
    regions = [Region(id=i, box=box, area=(box[2] - box[0]) ** 2, source="test") for i, box in boxes.items()]
    said = [RegionJudgement(region_id=i, score=score) for i, score in ((1, 1.0), (2, -1.0))]
    said.append(RegionJudgement(region_id=3, score=None, failure=Failure.NO_REPLY))
    judgement = Judgement(candidate_id="image", regions=said, layout=LayoutJudgement(score=1.0))
    grounding = Grounding(candidate_id="image", regions=regions)
    monkeypatch.setattr(rewards, "load_model", lambda *_: FakeModel())
    monkeypatch.setattr(rewards, "image_judge", lambda *_: lambda images, *_: [(grounding, judgement)] * len(images))
    config = load_config(None, [*SMALL, *rules])
    (one,) = rewards.JudgeReward(Run(tmp_path, config), 0, config, 0.9)([BLANK], PROMPTS[:1])
    assert one.value == value and (one.failure is None) == (value is not None)
    assert lowest is None or (one.reward_map is not None and float(one.reward_map.min()) == lowest)


def test_questions_are_asked_of_the_weights_that_entered(tmp_path: Path) -> None:
    """An empty image is worth what its right counts of zero are; a prompt without facts has none."""
    config = load_config(None, [*SMALL, "value=questions"])
    reward = QuestionReward(Run(tmp_path, config), 0, config, 0.9, hard=True)
    blank, unasked = reward([BLANK] * 2, [PROMPTS[0], Prompt(id="x", text="a city at night")])
    assert blank.value is not None and 0 < blank.value < 0.9 and unasked.failure == "no_questions"
    of_geneval = Prompt(id="x", text="a city", metadata={"tag": "single_object", "include": [{"class": "city"}]})
    assert [one.value for one in checker_value([BLANK] * 2, [PROMPTS[0], of_geneval])] == [0.0, None]


@pytest.mark.parametrize("wrong", ["value=questions credit=region", "second=judge"])
def test_opinions_that_cannot_be(wrong: str) -> None:
    with pytest.raises(ConfigError, match="value"):
        load_config(None, [*SMALL, *wrong.split()])


def test_alarms_wait_for_a_window_and_name_the_figure() -> None:
    rows = [{"zero_spread_groups": 0.9, "formed": 1.0}] * WINDOW
    assert alarms(rows[1:]) == [] and [a.startswith("of 90%") for a in alarms(rows)] == [True]
    assert alarms([*rows, *[{"zero_spread_groups": 0.0}] * WINDOW]) == []


def test_a_reward_that_leaves_its_second_opinion_behind() -> None:
    rows = [{"second_gap": 0.1}, {}, {"second_gap": 0.25}]
    assert widened(rows, 0.2) == "" and "0.15" in widened(rows, 0.1) and widened(rows[:1], 0.01) == ""


def test_training_ends_when_the_second_opinion_is_left_behind(tmp_path: Path) -> None:
    """A second opinion that thinks less of every further step: it ends after the third, and again when run again."""
    settings = ["rollout.plan=false", "train.precision=fp32", "train.steps=5", "second=checker", "second_every=1"]
    config = load_config(None, [*SMALL, *settings, "stop_gap=0.25"])
    looks = iter(range(9))

    def sinking(images, prompts):  # type: ignore[no-untyped-def]
        lost = 0.15 * next(looks)
        return [Value((one.value or 0) - lost) for one in brightness(images, prompts)]

    def learn() -> tuple[int, str, Path]:
        source = OnlineSource(lambda m: Reason(m, brightness, PROMPTS, config, 3, sinking), PROMPTS, "")
        objective = find_method("flow_grpo").objective(config)
        result = train(tiny(), source, objective, config.train, tmp_path, seed=5, progress=False)
        return result.steps, result.stopped, result.model

    steps, why, model = learn()
    assert steps == 3 and "0.30 on the second opinion" in why and (model / "ema.safetensors").exists()
    rows = keep_rows(tmp_path / "metrics.jsonl", 9)
    assert [round(row["second_gap"], 2) for row in rows] == [0.0, 0.15, 0.3]
    assert learn()[:2] == (3, why)
