"""``srum sweep`` and the compute of arms: every run is made, and the table is that of the statistics."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from rich.console import Console

from srum import models
from srum.config import CONFIG, ConfigError, RunConfig, load_config
from srum.evaluation.accuracy import CheckedImage
from srum.evaluation.comparison import of_base
from srum.evaluation.compute import Compute, compute_tables, passes_of, points, spent
from srum.evaluation.statistics import crossed, difference
from srum.fork import share_folder
from srum.records import Candidate, Judgement
from srum.run import Run
from srum.run_dir import claim_run, read_records, write_records
from srum.sweep import folder_of, settings, sweep, sweep_table
from srum.views.reading import RunView
from tests.fakes import FakeModel, run_on_fakes

SMALL = ["rounds=1", "prompt_count=3", "candidates_per_prompt=2", "reward.on_failure=keep", "compare=[]"]
SMALL += ["train.steps=2", "train.batch_size=2", "eval.count=8"]


def test_settings_are_all_combinations() -> None:
    assert settings([]) == {"as configured": []}
    found = settings(["train.lr=1e-3,0.1", "compare=[],[sft,srum]"])
    assert list(found.values()) == [
        [f"train.lr={lr}", f"compare={arms}"] for lr in ("1e-3", "0.1") for arms in ("[]", "[sft, srum]")
    ]
    for wrong in ("train.lr", "=1", "train.lr=", "train.lr=[1", "train.lr=2026-13-45"):
        with pytest.raises(ConfigError, match="expected field=value,value"):
            settings([wrong])


def quick_run(config: RunConfig, folder: Path, resume: bool, command: str, base: Path | None) -> None:
    """In place of a run: its config, and verdicts by chance. It is offered base's of the first setting and its seed."""
    assert resume == (folder / CONFIG).exists()
    assert base == (
        None if "method=sft" in str(folder) else folder_of(folder.parents[1], "method=sft", config.seed) / "eval/base"
    )
    if not resume:
        claim_run(folder, config)
    for arm in ("base", config.method):
        drawn = random.Random(f"{arm} {config.seed}")
        verdicts = [
            CheckedImage(prompt_id=f"p{n}", prompt="x", category="x", correct=drawn.random() < 0.5, reasons=[])
            for n in range(8)
        ]
        write_records(folder / "eval" / arm / "verdicts.jsonl", verdicts)


def test_settings_share_what_base_draws_unless_it_is_drawn_otherwise(tmp_path: Path) -> None:
    config = load_config(None, SMALL)
    one, two, three = (load_config(None, [*SMALL, also]) for also in ("train.lr=1e-5", "eval.guidance=3", "seed=1"))
    assert [of_base(other) == of_base(config) for other in (one, two, three)] == [True, False, False]
    (tmp_path / "old/images").mkdir(parents=True)
    (tmp_path / "old/images/a.png").write_bytes(b"an image")
    share_folder(tmp_path / "old", tmp_path / "new")
    (tmp_path / "old/images/a.png").unlink()
    assert (tmp_path / "new/images/a.png").read_bytes() == b"an image"
    share_folder(tmp_path / "nothing", tmp_path / "new")  # is there already


def test_a_sweep_makes_every_run_and_its_table_is_crossed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srum.sweep.run_loop", quick_run)
    config, varied = load_config(None, SMALL), ["method=sft,region_nft"]
    rows = sweep(config, varied, [0, 1], tmp_path)
    folders = {m: [folder_of(tmp_path, f"method={m}", seed) for seed in (0, 1)] for m in ("sft", "region_nft")}
    assert [load_config(f / CONFIG).seed for own in folders.values() for f in own] == [0, 1, 0, 1]
    correct = {
        method: [[one.correct for one in RunView(folder).verdicts()[method]] for folder in own]
        for method, own in folders.items()
    }
    assert [(row["setting"], row["arm"]) for row in rows] == [
        (f"method={method}", arm) for method in folders for arm in ("base", method)
    ]
    assert (
        rows[1]["accuracy"] == crossed(correct["sft"]).times(100) and rows[1]["accuracy"].covers == "2 seeds, 8 prompts"
    )
    assert (
        rows[3]["to first"] == difference(correct["region_nft"], correct["sft"]).times(100)
        and "to first" not in rows[1]
    )
    assert json.loads((tmp_path / "sweep.json").read_text())[3]["accuracy"]["value"] == rows[3]["accuracy"].value
    assert sweep_table(rows).row_count == 4
    assert sweep(config, varied, [0, 1], tmp_path) == rows


def test_a_sweep_that_cannot_be_compared_is_refused_before_its_first_run(tmp_path: Path) -> None:
    for sets, varied, message in (
        (["eval.count=0"], [], "eval.count: a sweep compares"),
        ([], ["train.lrr=1"], "unknown key train.lrr"),
        ([], ["seed=1,2"], "--vary seed: --seeds says how many"),
        ([], ["ground.grounder=a:B,a_B"], "two of these settings would share a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep(load_config(None, [*SMALL, *sets]), varied, [0], tmp_path)
    assert not any(tmp_path.iterdir())


def test_passes_are_steps_and_twice_where_guided() -> None:
    config = load_config().rollout
    assert passes_of(config) == config.timesteps - 1
    assert passes_of(config.model_copy(update={"guidance": 2.0})) == 2 * (config.timesteps - 1)
    shift_free = {"guidance": 2.0, "timestep_shift": 1.0, "timesteps": 11, "guidance_interval": (0.45, 1.0)}
    assert passes_of(config.model_copy(update=shift_free)) == 10 + 6  # t = 1, 0.9, ..., 0.5 are guided


def test_an_arm_is_charged_for_its_own_stages_and_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)
    folder = run_on_fakes(tmp_path / "run", "compare=[sft]")  # 2 rounds of 12 candidates, 2 steps of 4
    view = RunView(folder)
    run = Run(folder, view.config)
    sft, region, base = (spent(run, arm, 2) for arm in ("sft", "region_nft", "base"))
    questions = sum(
        len(one.regions) + 1
        for k in range(2)
        for one in read_records(folder / f"round-00{k}/judgements.jsonl", Judgement)
    )
    drawn = sum(len(read_records(folder / f"round-00{k}/candidates.jsonl", Candidate)) for k in range(2)) * 15
    assert base == Compute() and (sft.images, sft.steps) == (region.images, region.steps) == (24, 4)
    assert sft.passes == drawn + questions + 2 * 2 * 4 * 3
    assert region.passes == sft.passes + 2 * 2 * 4  # with the weights that entered
    weights, tokens = sum(p.numel() for _, p in FakeModel().generation_parameters()), 8 * 8
    assert sft.flops == 2.0 * weights * tokens * (drawn + 2 * 2 * 4 * 3)
    assert sft.seconds > 0 and region.seconds < sum(json.loads((folder / "timings.json").read_text()).values())

    (final,) = points(view, "sft")
    assert final.rounds == 2 and final.compute == sft
    compute, equal = compute_tables([view])
    console = Console(width=200, record=True)
    console.print(compute, equal)
    page = console.export_text()
    assert f"within {sft.passes:,} passes" in page and "not evaluated within them" in page
