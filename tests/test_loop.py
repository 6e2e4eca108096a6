"""The loop on a fake model: what it writes, and that a kill at any moment changes nothing in the end."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from srum import loop, models
from srum.config import ConfigError, RunConfig, load_config
from srum.errors import TrainingError
from srum.evaluation.accuracy import Accuracy, EvalResult
from srum.evaluation.comparison import summarize
from srum.grounding.base import ground as ground_images
from srum.grounding.relevance import RelevanceFilter
from srum.judging.self_judge import SelfJudge
from srum.judging.stage import load_judge
from srum.loop import evaluate_arms, perform, run_loop
from srum.models.base import MissingAbility
from srum.records import Candidate, Failure, Grounding, Judgement, LayoutJudgement, Region, RegionJudgement, RewardMap
from srum.run import Run
from srum.run_dir import RunError, claim_run, read_records
from srum.stages import ROLLOUT
from srum.stages.outcomes import count_outcomes
from srum.stages.reward_map import Skipped, centred, usual_scores
from srum.train import tracking
from srum.train.trainer import train as train_arm
from srum.views.reading import read_round
from srum.views.report import to_come
from tests.fakes import FakeModel, run_on_fakes

METHODS = "give one of sft, srum, region_nft, reca, rvr, flow_grpo, r3, process or module:Name"
SMALL = [
    "rounds=2",
    "prompt_count=5",
    "candidates_per_prompt=2",
    "rollout.batch_size=4",
    "ground.batch_size=4",
    "judge.batch_size=4",
    "reward.on_failure=keep",
    "train.steps=4",
    "train.batch_size=4",
    "train.checkpoint_every=2",
    "eval.count=7",
    "eval.batch_size=3",
]
ARMS = ["base", "sft", "srum", "region_nft"]
STAGES = ("rollout", "ground", "judge", "rasterize", "train")


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", FakeModel.load)
        run_loop(load_config(None, SMALL), folder)
    yield folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a run by name, but for those that say when or how long or bear the number of a save."""
    unlike = {"timings.json", "report.html", "made_with.json", ".metadata"}
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in unlike)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def test_a_run_leaves_the_files_of_the_design(whole: Path) -> None:
    names = files_of(whole).keys()
    for k in ("round-000", "round-001"):
        stages = ["prompts", "candidates", "regions", "judgements", "rewards"]
        assert {f"{k}/{name}.jsonl" for name in stages} | {f"{k}/counts.json"} <= names
        assert {f"{k}/train/{arm}/model/ema.safetensors" for arm in ARMS[1:]} <= names
        assert {f"{k}/train/{arm}/metrics.jsonl" for arm in ARMS[1:]} <= names
        candidates = read_records(whole / k / "candidates.jsonl", Candidate)
        assert (
            len(candidates) == 10
            and {name for c in candidates for name in (f"{k}/{c.image}", f"{k}/{c.latent}")} <= names
        )
        assert {f"{k}/{r.values}" for r in read_records(whole / k / "rewards.jsonl", RewardMap)} <= names
    assert {f"eval/{arm}/verdicts.jsonl" for arm in ARMS} | {"config.yaml", "summary.json"} <= names
    assert not [name for name in names if ".parts" in name or ".partial" in name]
    assert (whole / "report.html").stat().st_size > 10_000
    assert {"round-000/rollout", "round-001/train", "eval region_nft"} <= json.loads(
        (whole / "timings.json").read_text()
    ).keys()


def test_the_summary(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert list(summary) == ARMS
    for arm, values in summary.items():
        assert 0 <= values["interval"][0] <= values["accuracy"] <= values["interval"][1] <= 100
        assert (values["n"], values["seed"]) == (7, 0)
        assert sum(category["n"] for category in values["per_category"].values()) == 7
        assert ("difference_to_base" in values) == (arm != "base")


def test_rounds_draw_new_prompts_with_new_weights(whole: Path) -> None:
    first, second = (read_records(whole / k / "candidates.jsonl", Candidate) for k in ("round-000", "round-001"))
    assert {c.prompt for c in first} != {c.prompt for c in second}
    weights = [(whole / k / "train/region_nft/model/ema.safetensors").read_bytes() for k in ("round-000", "round-001")]
    assert weights[0] != weights[1]
    run = Run(whole, load_config(whole / "config.yaml"))
    assert run.weights("region_nft", 0) == run.newest(0) == run.weights("base", 2) == "srum-tiny"
    assert run.newest(1) == str(whole / "round-000/train/region_nft/model")
    assert run.weights("sft", 2) == str(whole / "round-001/train/sft/model")


def test_counts_are_those_of_the_records(whole: Path) -> None:
    counts = json.loads((whole / "round-000/counts.json").read_text())
    judgements = read_records(whole / "round-000/judgements.jsonl", Judgement)
    rewards = read_records(whole / "round-000/rewards.jsonl", RewardMap)
    failed = [r for j in judgements for r in j.regions if r.failure]
    assert counts["candidates"] == 10 and counts["reward_maps"] == len(rewards) == 10 - sum(counts["skipped"].values())
    assert sum(counts["region_failures"].values()) == len(failed)
    assert sum(counts["layout_failures"].values()) == sum(j.layout.failure is not None for j in judgements)


class Killed(BaseException):
    """Stands for a kill: nothing in the code handles it."""


def kill_before(patch: pytest.MonkeyPatch, place: str) -> None:
    """Die when the file or folder ``place`` of the run is about to take its name."""
    for method in ("replace", "rename"):
        original = getattr(Path, method)

        def dying(path: Path, target: Any, original: Any = original) -> Any:
            if str(target).endswith(place):
                raise Killed
            return original(path, target)

        patch.setattr(Path, method, dying)


PLACES = [
    "run/config.yaml",
    "round-000/prompts.jsonl",
    "round-000/latents/train-0002-1.safetensors",
    "round-000/candidates.parts/00001.jsonl",
    "round-000/candidates.jsonl",
    "round-000/regions.parts/00002.jsonl",
    "round-000/judgements.parts/00001.jsonl",
    "round-000/judgements.jsonl",
    "round-000/rewards.jsonl",
    "round-000/counts.json",
    "round-000/train/sft/checkpoints/step-00000004",
    "round-000/train/region_nft/checkpoints/step-00000002",
    "round-000/train/region_nft/model",
    "round-001/judgements.parts/00002.jsonl",
    "round-001/train/srum/checkpoints/step-00000004",
    "eval/base/verdicts.parts/00002.jsonl",
    "eval/region_nft/images/held_out-0004.png",
    "run/summary.json",
    "run/report.html",
]


def test_kills_at_any_moment_change_no_file(whole: Path, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", load_config(None, SMALL)
    for place in PLACES:
        with pytest.MonkeyPatch.context() as patch:
            kill_before(patch, place)
            with pytest.raises(Killed):
                run_loop(config, folder, resume=True)
    run_loop(config, folder, resume=True)
    expected, found = files_of(whole), files_of(folder)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_stages_one_by_one_are_the_round(whole: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, load_config(None, SMALL))
    for name in STAGES:
        perform(run, name, 0)
    assert files_of(tmp_path / "round-000") == files_of(whole / "round-000")


def test_a_torn_file_is_mended_by_the_stage_that_writes_it_alone(whole: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, load_config(None, SMALL))
    folder = run.round(0)
    perform(run, "rollout", 0)
    prompts = (folder / "prompts.jsonl").read_bytes()
    (folder / "prompts.jsonl").write_bytes(prompts[:-40])
    with pytest.raises(RunError, match=r"prompts\.jsonl:5 is torn; run `srum rollout` again"):
        list(read_round(folder))
    perform(run, "rollout", 0)
    assert (folder / "prompts.jsonl").read_bytes() == prompts
    torn = {"candidates": ("rollout", "ground", "regions"), "regions": ("ground", "judge", "judgements")}
    for name, (owner, reader, made) in torn.items():
        perform(run, owner, 0)
        path = folder / f"{name}.jsonl"
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(RunError, match=rf"{name}\.jsonl:10 is torn; run `srum {owner}` again"):
            perform(run, reader, 0)
        assert not (folder / f"{made}.jsonl").exists()
        with pytest.warns(UserWarning, match="torn line"):
            perform(run, owner, 0)
        assert path.read_bytes() == (whole / f"round-000/{name}.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("stage", "name"), [("judge", "regions"), ("rasterize", "regions"), ("rasterize", "judgements")]
)
def test_a_file_that_lacks_a_candidate_is_named(whole: Path, tmp_path: Path, stage: str, name: str) -> None:
    folder = Path(shutil.copytree(whole / "round-000", tmp_path / "round-000"))
    (folder / {"judge": "judgements.jsonl", "rasterize": "rewards.jsonl"}[stage]).unlink()
    *lines, last = (folder / f"{name}.jsonl").read_text().splitlines(keepends=True)
    (folder / f"{name}.jsonl").write_text("".join(lines))
    with pytest.raises(
        RunError, match=rf"{name}\.jsonl holds nothing about {json.loads(last)['candidate_id']}; delete"
    ):
        perform(Run(tmp_path, load_config(None, SMALL)), stage, 0)


def test_a_stage_needs_the_one_before_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"candidates\.jsonl is missing"):
        perform(Run(tmp_path, load_config(None, SMALL)), "ground", 0)


def test_no_error_of_the_report_hides_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_report", lambda folder: {}["no such key"])
    with pytest.raises(RunError, match="a full disk"), loop._ending(Run(tmp_path, load_config(None, SMALL))):
        raise RunError("a full disk")


@pytest.mark.parametrize(
    "override",
    [
        "prompts=no_such_set",
        "eval.prompts=nowhere.jsonl",
        "ground.grounder=no.such:Thing",
        "judge.instructions=x",
        "judge.view=whole",
        "judge.think=true",
        "device=spread",
        "rollout.size=[60, 64]",
        "eval.size=[60, 64]",
        "eval.size=[32, 32]",
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path, override: str) -> None:
    with pytest.raises((ValueError, OSError)):
        run_loop(load_config(None, [*SMALL, override]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_training_would_miss_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setattr(tracking, "filter_trackers", lambda names, folder: [])
    for overrides, message in (
        (["train.memory.optimizer=int8", "train.eps=1e-8"], "int8 needs torchao"),
        (["train.tracker=trackio"], "trackio is not installed"),
    ):
        with pytest.raises(TrainingError, match=message):
            run_loop(load_config(None, [*SMALL, *overrides]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "loaded"), [("self", "newest"), ("start", "srum-tiny"), ("a/model", "a/model")])
def test_who_judges(monkeypatch: pytest.MonkeyPatch, name: str, loaded: str) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        models, "load", lambda weights, device, dtype, empty: asked.append((weights, device)) or FakeModel()
    )
    monkeypatch.setattr(models, "find_device", torch.device)  # as if it were here
    overrides = [f"judge.model={name}", "judge.soft=false", "judge.retries=3", "device=cuda:1"]
    judge = load_judge(load_config(None, overrides), "newest", 5)
    assert asked == [(loaded, "cuda:1")]
    assert (judge.soft, judge.retries, judge.seed, judge.decoding.max_tokens) == (False, 3, 5, 256)


def test_every_stage_that_runs_the_network_compiles_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per model that it loads, on the device asked for: three arms are trained, and four evaluated."""
    compiled: list[str] = []
    devices: list[str] = []

    def load(weights: str, device: str, *others: Any, **options: Any) -> FakeModel:
        devices.append(device)
        return FakeModel.load(weights, device, *others, **options)

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(FakeModel, "abilities", FakeModel.abilities | {"compile"})
    monkeypatch.setattr(FakeModel, "compile", lambda model: compiled.append(stage))
    run = Run(tmp_path, load_config(None, [*SMALL, "compile=true", "device=cpu"]))
    for stage in ("rollout", "ground", "judge", "rasterize", "train"):
        perform(run, stage, 0)
    stage = "eval"
    evaluate_arms(run, 1, tmp_path / "eval")
    assert compiled == ["rollout", "ground", "judge", *["train"] * 3, *["eval"] * 4]
    assert devices == ["cpu"] * (len(compiled) + 1)  # and the rasterizer's, of which it takes the latent grid


def test_which_weights_each_stage_takes_and_with_which_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main arm's newest make and judge the candidates; every arm goes on from its own, and is evaluated so.

    Weights that made the candidates have to make the probes again: all of round 0, then the main arm's alone. No seed
    of one round serves in the other.
    """
    loaded: dict[tuple[str, int], list[str]] = {}
    trained: list[tuple[str, bool]] = []
    seeds: dict[str, set[int]] = {"judge": set(), "train": set()}

    class Judge(SelfJudge):
        def __init__(self, *arguments: Any, seed: int, **options: Any) -> None:
            seeds["judge"].add(seed)
            super().__init__(*arguments, seed=seed, **options)

    def load(weights: str, *arguments: Any, **options: Any) -> FakeModel:
        loaded.setdefault((stage, k), []).append(weights)
        return FakeModel.load(weights, *arguments, **options)

    def train(*arguments: Any, reproduces: bool, **named: Any) -> Any:
        *_, folder, seed = arguments
        trained.append((folder.name, reproduces))
        seeds["train"].add(seed)
        return train_arm(*arguments, reproduces=reproduces, **named)

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr("srum.train.stage.train", train)
    monkeypatch.setattr("srum.judging.stage.SelfJudge", Judge)
    run = Run(tmp_path, load_config(None, [*SMALL, "train.steps=1", "seed=3", "eval.plan=true"]))
    for k in (0, 1):
        for stage in STAGES:
            perform(run, stage, k)
    stage = "eval"
    monkeypatch.setattr("srum.evaluation.comparison.evaluate", lambda *arguments: arguments[2:])
    evaluated = evaluate_arms(run, 2, tmp_path / "eval")
    assert evaluated == {arm: (run.config.eval, tmp_path / "eval" / arm, 3) for arm in ARMS}

    before_training = ("rollout", "ground", "judge", "rasterize")
    after_one, after_two = ([str(run.train_dir(arm, k) / "model") for arm in ARMS[1:]] for k in (0, 1))
    assert loaded == {
        **{(stage, 0): ["srum-tiny"] for stage in before_training},
        ("train", 0): ["srum-tiny"] * 3,
        **{(stage, 1): [str(tmp_path / "round-000/train/region_nft/model")] for stage in before_training},
        ("train", 1): after_one,
        ("eval", 1): ["srum-tiny", *after_two],
    }
    assert trained == [(arm, True) for arm in ARMS[1:]] + [("sft", False), ("srum", False), ("region_nft", True)]
    assert [len(drawn) for drawn in seeds.values()] == [2, 2]


def test_no_field_of_grounding_and_rasterizing_is_lost_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field away from its default; the maps are made of scores centred over the candidates of a prompt."""
    ground = {"max_regions": 3, "min_area": 0.01, "max_area": 0.9, "max_overlap": 0.5}
    reward = {"mapping": "unit", "overlap": "mean", "shape": "box", "background": "neutral", "on_failure": "keep"}
    fields = [f"ground.{name}={value}" for name, value in ground.items()]
    fields += [f"reward.{name}={value}" for name, value in reward.items()]
    run = Run(tmp_path, load_config(None, [*SMALL, *fields, "ground.min_relevance=0.25", "reward.centred=true"]))
    limits: list[dict[str, Any]] = []
    made_of: dict[str, Judgement] = {}

    def grounding(*images: Any, **given: Any) -> list[Any]:
        limits.append(given)
        return ground_images(*images, max_regions=8)

    def rasterizing(candidate: Candidate, grounding: Grounding, judgement: Judgement, grid: Any, **given: Any) -> Any:
        assert given == reward and grid == (8, 8)
        made_of[candidate.id] = judgement
        return Skipped.NOTHING_JUDGED

    monkeypatch.setattr("srum.grounding.stage.ground", grounding)
    monkeypatch.setattr("srum.stages.rasterize.rasterize", rasterizing)
    for stage in ("rollout", "ground", "judge", "rasterize"):
        perform(run, stage, 0)
    assert len(limits) == 3
    for given in limits:
        relevant = given.pop("relevant")
        assert given == ground and isinstance(relevant, RelevanceFilter) and relevant.threshold == 0.25
    candidates = read_records(run.round(0) / "candidates.jsonl", Candidate)
    judgements = read_records(run.round(0) / "judgements.jsonl", Judgement)
    prompts = [candidate.prompt_id for candidate in candidates]
    usual = usual_scores(judgements, prompts)
    assert list(made_of.values()) == [centred(j, usual[p]) for j, p in zip(judgements, prompts, strict=True)]


def test_layers_in_several_places_are_not_trained(tmp_path: Path) -> None:
    run = Run(tmp_path, load_config(None, [*SMALL, "device=spread", "compare=[]"]))
    for stage in ("rollout", "ground", "judge", "rasterize"):
        perform(run, stage, 0)
    with pytest.raises(RunError, match="device: spread layers can sample and judge, not train"):
        perform(run, "train", 0)


@pytest.mark.parametrize("override", ["reward.centred=true", "reward.binary=true", "reward.mapping=reference"])
def test_rules_of_the_map_change_the_maps_and_not_the_scores(whole: Path, tmp_path: Path, override: str) -> None:
    run = Run(tmp_path, load_config(None, [*SMALL, override]))
    for name in ("rollout", "ground", "judge", "rasterize"):
        perform(run, name, 0)
    found, expected = (read_records(f / "round-000/rewards.jsonl", RewardMap) for f in (tmp_path, whole))
    assert [(r.candidate_id, r.alpha, r.sample_score) for r in found] == [
        (r.candidate_id, r.alpha, r.sample_score) for r in expected
    ]
    assert {r.mapping for r in found} == {"unit" if "reference" in override else "signed"}
    assert all(
        (tmp_path / "round-000" / r.values).read_bytes() != (whole / "round-000" / r.values).read_bytes() for r in found
    )


def test_judgements_from_before_a_field_are_read(tmp_path: Path) -> None:
    (tmp_path / "judgements.jsonl").write_text(
        '{"schema": 1, "candidate_id": "a", "regions": [{"score": 0.5, "reason": null, "failure": null, "raw": "x", '
        '"attempts": 1, "region_id": 1, "label": null}], "layout": {"score": null, "reason": null, '
        '"failure": "no_score", "raw": "", "attempts": 2}}\n'
    )
    (judgement,) = read_records(tmp_path / "judgements.jsonl", Judgement)
    assert judgement.regions[0].confidence is None and judgement.layout.attempts == 2


def test_arms_differ_in_their_method_alone(tmp_path: Path) -> None:
    """What methods share is the run's; the fields of their own have their defaults, but for the run's method."""
    run = Run(tmp_path, load_config(None, ["train.steps=9", "beta=0.7", "rounds=3"]))
    assert [(name, arm.config.method) for name, arm in run.arms.items()] == [(name, name) for name in ARMS[1:]]
    shared = RunConfig.model_fields.keys() - {"method"}
    for arm in run.arms.values():
        assert arm.config.model_dump(include=shared) == run.config.model_dump(include=shared)
        assert type(arm.config) is arm.method.Config
    assert run.arms["srum"].config.constraint_weight == 0.5  # type: ignore[attr-defined]
    assert run.arms["region_nft"].config is run.config and run.config.beta == 0.7  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["method=sft"], ["srum", "sft"]),
        (["method=srum"], ["sft", "srum"]),
        (["method=srum", "constraint_weight=0.3", "compare=[srum, region_nft]"], ["region_nft", "srum"]),
        (["compare=[sft, sft]"], ["sft", "region_nft"]),
        (["compare=[]"], ["region_nft"]),
    ],
)
def test_every_method_is_trained_once_and_the_runs_own_last(
    tmp_path: Path, overrides: list[str], names: list[str]
) -> None:
    run = Run(tmp_path, load_config(None, overrides))
    assert list(run.arms) == names and run.arms[run.method.name].config is run.config


SAME_NAME = "from srum.train.methods.srum import Srum\n\nclass Mine(Srum):\n    pass\n"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["compare=[ppo]"],
            f"compare: ppo: no method 'ppo': {METHODS}",
        ),
        (
            ["method=sft", "compare=[region_nft]", "candidates_per_prompt=1"],
            "compare: region_nft: .*candidates_per_prompt: region_nft compares",
        ),
        (["compare=[srum, 'same_name:Mine']"], "compare: srum and same_name:Mine are both named srum"),
        (["compare=['same_name:Mine']", "method=srum"], "compare: same_name:Mine and srum are both named srum"),
    ],
)
def test_methods_that_cannot_be_compared_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    (tmp_path / "same_name.py").write_text(SAME_NAME)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run_loop(load_config(None, [*SMALL, *overrides]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides", [["method=sft", "compare=[]"], ["compare=[sft]"]])
def test_a_method_that_needs_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    monkeypatch.setattr("srum.train.methods.sft.Sft.needs", frozenset({"train", "explore"}))
    with pytest.raises(MissingAbility, match="method sft needs a model with the ability explore: FakeModel has none"):
        run_loop(load_config(None, [*SMALL, *overrides]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_of_no_method_of_the_run_is_refused(tmp_path: Path) -> None:
    known = "its stages are rollout, ground, judge, rasterize, train"
    with pytest.raises(RunError, match=f"region_nft has no stage 'dream'; {known}"):
        perform(Run(tmp_path, load_config(None, SMALL)), "dream", 0)


def test_failures_are_counted_by_kind() -> None:
    background = Region(id=0, box=(0, 0, 8, 8), area=64, source="background")
    layout = LayoutJudgement(score=0.5)
    groundings = [
        Grounding(candidate_id="a", regions=[background]),
        Grounding(candidate_id="b", regions=[], error="broken"),
    ]
    failed = RegionJudgement(region_id=0, score=None, failure=Failure.NO_SCORE)
    judgements = [
        Judgement(candidate_id="a", regions=[failed], layout=layout),
        Judgement(candidate_id="b", regions=[], layout=layout),
    ]
    assert count_outcomes(groundings, judgements, ["nothing_judged", "grounding_failed"]) == {
        "candidates": 2,
        "grounding_errors": 1,
        "without_regions": 1,
        "regions_judged": 1,
        "region_failures": {"no_score": 1},
        "layout_failures": {},
        "skipped": {"grounding_failed": 1, "nothing_judged": 1},
        "reward_maps": 0,
    }


def test_summarize_compares_with_base() -> None:
    def result(correct: list[bool]) -> EvalResult:
        accuracy = Accuracy(100 * sum(correct) / len(correct), (0.0, 100.0), len(correct))
        return EvalResult(accuracy, {"colors": accuracy}, 3, correct)

    summary = summarize({"base": result([True, False] * 50), "srum": result([True] * 100)})
    assert summary["base"] == {
        "accuracy": 50.0,
        "interval": (0.0, 100.0),
        "n": 100,
        "seed": 3,
        "per_category": {"colors": {"accuracy": 50.0, "interval": (0.0, 100.0), "n": 100}},
    }
    difference = summary["srum"]["difference_to_base"]
    assert difference["points"] == 50.0 and 35 < difference["interval"][0] < 45 < 55 < difference["interval"][1] < 65


def test_an_image_that_breaks_costs_its_candidate_alone(tmp_path: Path) -> None:
    """Its file is damaged after the rollout: grounding and judging say so, training goes on with the others."""
    run = Run(run_on_fakes(tmp_path, "rounds=1"), load_config(tmp_path / "config.yaml"))
    folder = run.round(0)
    first, *others = [candidate.id for candidate in read_records(folder / "candidates.jsonl", Candidate)]
    (folder / f"images/{first}.png").write_bytes(b"no picture")
    for name in ("regions.jsonl", "judgements.jsonl", "rewards.jsonl", "counts.json"):
        (folder / name).unlink()
    for stage in ("ground", "judge", "rasterize"):
        perform(run, stage, 0)
    judged = {j.candidate_id: j for j in read_records(folder / "judgements.jsonl", Judgement)}
    assert list(judged) == [first, *others]
    assert judged[first].layout.failure == Failure.NO_IMAGE and f"{first}.png" in judged[first].layout.raw
    assert first not in {reward.candidate_id for reward in read_records(folder / "rewards.jsonl", RewardMap)}
    counts = json.loads((folder / "counts.json").read_text())
    assert counts["grounding_errors"] == 1 and counts["layout_failures"]["unreadable_image"] == 1
    assert counts["skipped"]["grounding_failed"] == 1


def test_the_report_grows_with_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its path is printed first; then it is written after the first batch, each of 5 stages and at the end, and by a
    resumed run anew at the start and the end alone."""
    left: list[int] = []

    def written(folder: Path, running: bool = False) -> Path:
        left.append(len(to_come(Run(folder, load_config(folder / "config.yaml")))))
        return folder / "report.html"

    monkeypatch.setattr(loop, "write_report", written)
    config = load_config(None, [*SMALL, "rounds=1", "eval.count=0"])
    run_loop(config, tmp_path / "run")
    assert left == [1, 1, 1, 1, 1, 1, 0, 0]
    assert capsys.readouterr().out.startswith("the report, written again after every stage: ")
    left.clear()
    run_loop(config, tmp_path / "run", resume=True)
    assert left == [0, 0]


def test_the_report_has_pictures_as_soon_as_a_batch_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 of 10 candidates after the first batch, then all; a report of what has finished alone has none before."""
    shown, written = [], loop.write_report

    def write(folder: Path, running: bool = False) -> Path:
        finished = written(folder).read_text().count('"pixelated":')
        page = written(folder, running)
        shown.append((finished, page.read_text().count('"pixelated":')))
        return page

    monkeypatch.setattr(loop, "write_report", write)
    config = load_config(None, SMALL)
    claim_run(tmp_path / "run", config)
    loop.advance(Run(tmp_path / "run", config), ROLLOUT, 0)
    assert shown == [(0, 4), (10, 10)]
