"""What a run will cost: what is counted by hand, what is measured in little, what will not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from srum import models, plan
from srum.config import EvalConfig, RefineConfig, load_config
from srum.evaluation.compute import passes_of
from srum.loop import run_loop
from srum.plan import foresee
from srum.processes import Processes
from srum.run import Run
from tests.fakes import FakeModel

SETS = ["rounds=2", "prompt_count=6", "candidates_per_prompt=2", "compare=[sft]", "train.steps=5", "train.batch_size=4"]
SETS += ["eval.count=7", "eval.guidance=2", "eval.timesteps=4", "rollout.timesteps=3", "reward.on_failure=keep"]


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({"guidance": 1.0}, 4),
        ({"guidance": 2.5}, 8),
        ({"guidance": 2.5, "guidance_interval": (0.5, 1.0)}, 6),  # of 1, 3/4, 1/2 and 1/4 the first two are guided
    ],
)
def test_an_image_takes_a_pass_a_step_and_two_where_it_is_guided(fields: dict[str, object], passes: int) -> None:
    assert passes_of(EvalConfig(timesteps=5, timestep_shift=1.0, **fields)) == passes  # type: ignore[arg-type]
    three = RefineConfig(timesteps=5, timestep_shift=1.0, image_guidance=1.5, **fields)  # type: ignore[arg-type]
    assert passes_of(three) == passes + max(0, passes - 4)  # a third branch where there is a second


def test_the_plan_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 rounds of 12 candidates of 2 passes; 3 arms on 7 prompts of 6; 5 steps of 4 examples, forth and back: 3 passes,
    4 where they are compared."""
    monkeypatch.setattr(models, "load", FakeModel.load)
    config = load_config(None, SETS)
    counted = foresee(config, tmp_path)
    assert counted.seconds == {} and counted.memory is None  # too short to be measured
    measured = foresee(config, tmp_path, always=True)
    costs = {cost.label: cost for cost in measured.costs}
    assert [cost.label for cost in counted.costs] == [label for label in costs if label != plan.REPORT]
    rollouts = [costs[f"round {k}/2 - rollout"] for k in (1, 2)]
    assert [(cost.images, cost.passes) for cost in rollouts] == [(12, 24)] * 2
    tested = [costs[f"held-out prompts - eval {arm}"] for arm in ("base", "sft", "region_nft")]
    assert [(cost.images, cost.passes) for cost in tested] == [(7, 42)] * 3
    assert [costs[f"round 1/2 - train {arm}"].passes for arm in ("sft", "region_nft")] == [60, 80]
    assert costs["round 1/2 - judge"].passes >= 2 * 12  # a region or the background, and the layout, of each
    assert measured.seconds.keys() == costs.keys() and all(seconds >= 0 for seconds in measured.seconds.values())
    assert measured.memory and measured.disk and list(tmp_path.iterdir()) == []
    text = measured.lines()[0]
    assert text.startswith("memory 0.") or text.startswith("memory 1.") or text.startswith("memory 2.")


def test_the_disk_that_it_foretells_is_what_the_run_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)
    config = load_config(None, SETS)
    foretold = foresee(config, tmp_path, always=True).disk
    run_loop(config, tmp_path / "run")
    taken = sum(plan.size_of(place) for place in (tmp_path / "run").glob("round-*")) + plan.size_of(
        tmp_path / "run/eval"
    )
    assert foretold == pytest.approx(taken, rel=0.2)


@pytest.mark.parametrize(
    ("sets", "gigabytes", "count"),
    [
        ([], 100, 8),  # a process per core, each of which has a full batch
        (["prompt_count=72", "candidates_per_prompt=4"], 100, 5),  # 288 candidates in batches of 64
        (["prompt_count=4", "eval.count=64"], 100, 1),
        ([], 8, 3),  # of 2.5 GB
        ([], 0, 1),  # nobody says how much there is
        (["processes=3"], 0, 3),
        (["ground.grounder=sam"], 100, 1),  # whose memory the model does not know
        (["method=flow_grpo"], 100, 1),  # which would draw the same images in every process
        (["judge.reward=mine:reward"], 100, 1),  # what it loads nobody knows
    ],
)
def test_a_command_starts_as_many_processes_as_pay(
    sets: list[str], gigabytes: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, ["device=cpu", *sets])
    assert plan.sharing(config) == 1  # here it is a library in another program
    monkeypatch.setattr(plan, "can_be_started_again", lambda: True)
    monkeypatch.setattr("srum.doctor._available_memory", lambda: gigabytes * 10**9)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert plan.sharing(config) == count


def test_the_first_process_has_the_most_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9 batches of 64 five, of 10 of which the last has 24 the same, of 2 batches for 3 processes one."""
    assert plan.own_items(576, 64) == 576
    monkeypatch.setattr("srum.processes._here", Processes(0, 2))
    assert [plan.own_items(count, 64) for count in (576, 600, 640, 70)] == [320, 320, 320, 64]
    monkeypatch.setattr("srum.processes._here", Processes(0, 3))
    assert plan.own_items(70, 64) == 64


def test_what_does_not_fit_is_said_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> FakeModel:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr("srum.doctor._available_memory", lambda: 10**6)
    foretold = foresee(load_config(None, SETS), tmp_path, always=True)
    assert [line.partition(" needs ")[0] for line in foretold.warnings] == [
        f"memory: {stage}" for stage in ("rollout", "judging", "training")
    ]
    assert foretold.seconds == {}


def test_a_full_disk_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)
    monkeypatch.setattr(plan, "free", lambda path: 10)
    foretold = foresee(load_config(None, [*SETS, "compare=[]"]), tmp_path, always=True)
    assert [line.partition(":")[0] for line in foretold.warnings] == ["disk"]


def test_memory_grows_with_the_batch_as_it_did_with_the_miniature() -> None:
    """Judging took 40 MB a candidate from 8 to 32, so 32 more to a batch of 64; what the training of the first one took
    hides the rollout of the second. A single miniature has the architecture's word."""
    config, mega = load_config(None, ["prompt_count=72", "candidates_per_prompt=8"]), 10**6
    kept = {"run": Run(Path(), config), "times": {}, "questions": 1.0, "bytes": {}}
    smaller = plan.Miniature(
        **kept, candidates=8, memory=1200 * mega, peaks={"rollout": 800 * mega, "judge": 840 * mega}
    )
    small = plan.Miniature(
        **kept, candidates=32, memory=1800 * mega, peaks={"rollout": 1200 * mega, "judge": 1800 * mega}
    )
    assert small.grown(smaller) == 40 * mega
    assert plan.Size(config).memory(small, smaller) == 1800 * mega + 32 * 40 * mega
    assert small.memory < plan.Size(config).memory(small, small) < 2 * small.memory
