"""The benchmark scripts at their smallest size: they run to the end and print what they are for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import (
    approximate,
    attention,
    controls,
    costs,
    dry_runs,
    gpu_check,
    gradients,
    judge,
    lab,
    medium,
    memory,
    rasterizer,
    real_size,
    reca,
    refine,
    reinforce,
    report,
    scale,
    signal,
    stacked,
    stages,
    training,
)
from srum import models
from srum.config import load_config
from srum.evaluation.compute import passes_of
from srum.evaluation.denoising import JudgedStep, JudgedSteps
from srum.models.bagel import Bagel
from srum.models.base import Generated
from srum.records import Candidate, Prompt
from srum.run import Run
from srum.run_dir import RunError, read_records
from srum.train.data import TrainingRecord
from tests.fakes import FakeModel

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "bagel" / "checkpoint"
SMALL = [
    "prompt_count=6",
    "candidates_per_prompt=2",
    "rollout.plan=true",
    "reward.on_failure=keep",
    "train.steps=3",
    "train.batch_size=4",
    "eval.count=14",
]


def numbers_of(line: str) -> list[float]:
    """The numbers in the cells of a line of a table."""
    return [float(cell) for cell in line.replace("│", "|").split("|") if cell.strip().replace(".", "", 1).isdigit()]


def test_attention_prints_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    attention.main(["--batch", "2", "--length", "8", "--seconds", "0.01"])
    lines = capsys.readouterr().out.splitlines()
    for row in ("backward │ torch.bfloat16", "backward │ torch.float32", "denoising", "decoding", "larger image"):
        (found,) = [numbers_of(line) for line in lines if row in line]
        assert len(found) == 3 and all(value > 0 for value in found)


def test_stages_print_ratios_and_floors(capsys: pytest.CaptureFixture[str]) -> None:
    stages.main(["--model", str(GOLDEN), "--items", "2", "--repeats", "1"])
    out = capsys.readouterr().out
    for name in ("rollout", "judging", "scores", "training"):
        (found,) = [numbers_of(line) for line in out.splitlines() if name in line]
        plain, ours, ratio, _, above_floor = found
        assert ratio == pytest.approx(plain / ours, rel=0.1)
        assert above_floor > 1
    assert "GFLOP/s" in out


def test_the_medium_size_prints_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    medium.main(["--prompts", "1", "--steps", "1", "--questions", "1", "--tokens", "2", "--repeats", "1"])
    out = capsys.readouterr().out
    assert out.count("%") >= 2 and "GFLOP/s" in out


def test_the_real_size_at_a_small_one(capsys: pytest.CaptureFixture[str]) -> None:
    real_size.main(["--small", "--batches", "1", "2", "--rows", "1", "--tokens", "3"])
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["1 images", "2 images", "1 texts"]
    for row in rows[:2]:
        assert 0 < float(row[4].strip(" %")) < 100


@pytest.mark.parametrize("part", ["draw", "decode", "train"])
def test_the_gpu_check_at_a_toy_size(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU every part says something of every batch, and nothing of it fails."""
    gpu_check.main([part, "--tiny"])
    lines = capsys.readouterr().out.splitlines()
    expected = {
        "draw": ["1 images: ", "2 images: "],
        "decode": ["1 texts: ", "2 texts: "],
        "train": ["pack of 2 images"],
    }
    for start in expected[part]:
        (line,) = [line for line in lines if line.startswith(start)]
        assert "Error" not in line and " 0.00 s an image" not in line


STUB = """#!/bin/sh
case "$*" in
    *" decode"*) echo begun; exec sleep 60 ;;
    *bf16*) echo MISS; exit 1 ;;
esac
echo "did $*"
"""


def run_check(results: Path, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "benchmarks/gpu_check.sh", str(results), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **settings})


def test_a_gpu_check_that_is_cut_reports_what_it_has(tmp_path: Path) -> None:
    """A part that takes too long is ended and keeps its lines, those after it say that no time was left."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = run_check(tmp_path / "results", PYTHON=str(stub), LIMIT="3")
    said = {path.stem: path.read_text().splitlines() for path in (tmp_path / "results").iterdir()}
    assert done.returncode == 1 and "SOMETHING DIFFERS" in done.stdout and "== parity-bf16\nMISS" in done.stdout
    assert said["draw"][0] == "did -W ignore -m benchmarks.gpu_check draw" and "status 0" in said["draw"][1]
    assert said["decode"][0] == "begun" and "status 124" in said["decode"][1]
    assert said["compiled"] == ["no time left"] and said.keys() >= {"parity-fp32", "agree", "train"}


@pytest.mark.slow
def test_the_gpu_check_runs_from_end_to_end(tmp_path: Path) -> None:
    """Every part at a toy size on the CPU: each ends well, and all that is compared agrees."""
    done = run_check(tmp_path, "--tiny", PYTHON=sys.executable, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout
    parts = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert parts.keys() == {"parity-fp32", "parity-bf16", "agree", "draw", "train", "decode", "compiled"}
    assert all("exit status 0" in text and "Error" not in text for text in parts.values())


def test_operations_of_an_image_are_those_of_its_products() -> None:
    """One step of one branch, counted by torch, less the few tokens and layers that the formula leaves out."""
    model = real_size.random_model(real_size.SMALL, torch.device("cpu"))
    size = (128, 128)
    contexts = gpu_check.contexts_of(model, 1)
    counted = stages.operations(gpu_check.denoising(model, contexts, size, 1, 1))
    assert 0.7 < gpu_check.image_operations(model, size) / counted < 1


@pytest.mark.slow
def test_fast_paths_agree_on_a_cpu() -> None:
    assert gpu_check.agree(gpu_check.TINY)


def test_every_way_of_a_training_step_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of unlike size at the smallest network: each way moves the generation expert and nothing else."""
    model = Bagel.load(GOLDEN)
    monkeypatch.setattr(training, "SIZES", ((32, 48), (64, 32)))
    steps = training.ways(model, 2)
    assert len(steps) == training.WAYS
    own = {name for name, _ in model.generation_parameters()}
    for step in steps.values():
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        step()
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert changed and changed <= own


@pytest.mark.slow
def test_a_training_step_prints_ratios_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    training.main(["--images", "2", "--repeats", "1"])
    rows = [numbers_of(line) for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == training.WAYS and all(peak > 0 for *_, peak in rows)
    assert rows[-1][2] == pytest.approx(rows[0][0] / rows[-1][0], rel=0.1)


@pytest.mark.slow
def test_the_doctor_estimates_what_processes_take(capsys: pytest.CaptureFixture[str]) -> None:
    """Within a factor of two, and not much below."""
    memory.main(["--images", "4"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    ratios = [numbers_of(line)[-1] for line in lines]
    assert len(ratios) == 4 and all(0.9 < ratio < 2 for ratio in ratios)


def test_the_judges_memory_is_told_batch_by_batch() -> None:
    assert len([held for held in memory.judged(2, size=1) if held > 2**28]) == 2


def test_the_report_prints_bytes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "CHROMIUM", ())
    report.main(["--candidates", "16"])
    out = capsys.readouterr().out
    (numbers,) = [found for line in out.splitlines() if len(found := numbers_of(line)) == 6]
    candidates, _, _, each, plain, ratio = numbers
    assert candidates == 16 and ratio == pytest.approx(plain / each, abs=0.01)
    assert "no Chromium here" in out


def test_the_rasterizer_is_compared_with_a_plain_loop_that_makes_the_same_map(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rasterizer.main(["--image", "64", "--cells", "8", "--regions", "3", "--maps", "4"])
    out = capsys.readouterr().out
    plain, ours, floor = (numbers_of(line) for line in out.splitlines() if "│" in line)
    assert plain[1] == 1.0 and ours[1] == pytest.approx(ours[0] / plain[0], rel=0.1) and floor[0] > ours[0]
    for sample in rasterizer.make_samples(5, 64, 6):
        made = rasterizer.rasterize(*sample, (8, 8))
        assert isinstance(made, tuple) and np.allclose(made[0], rasterizer.plain(sample, 8), atol=1e-6)


def test_judging_measures_every_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)
    judge.main(["--out", str(tmp_path), *(argument for s in SMALL[:2] for argument in ("--set", s))])
    found = json.loads((tmp_path / "judge.json").read_text())
    assert list(found) == list(judge.WAYS) and "AUROC" in capsys.readouterr().out
    failures = {name: way["quality"]["regions"]["failures"] for name, way in found.items()}
    assert failures["decoded"] == failures["decoded, soft"] > 0 == failures["constrained"] == failures["soft"]
    assert (
        len({sum(way["quality"]["layout"][k] for k in ("right", "wrong", "failures")) for way in found.values()}) == 1
    )


@pytest.fixture
def small_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a lab of two seeds and one round, on the fake model."""
    monkeypatch.setattr(models, "load", FakeModel.load)
    monkeypatch.setattr(lab, "FLIPPED", 6)
    monkeypatch.setattr(lab, "LOOPS", {"sft": lab.LOOPS["sft"]})
    monkeypatch.setattr(lab, "ABLATIONS", {name: lab.ABLATIONS[name] for name in ("srum", "binary")})
    monkeypatch.setattr(lab, "RATES", ("3e-4", "1e-4"))
    monkeypatch.setattr(lab, "DOMAIN_POOL", 70)
    monkeypatch.setattr(lab, "STEP_PROMPTS", 24)
    monkeypatch.setattr(lab, "CONTROLS", {name: lab.CONTROLS[name] for name in ("judge", "contrast", "shuffled")})
    monkeypatch.setattr(lab, "TRAINED", {"all-weights": lab.TRAINED["all-weights"]})  # the fake has no text to learn
    overrides = [argument for override in SMALL for argument in ("--set", override)]
    return ["--seeds", "0", "1", "--rounds", "1", "--out", str(tmp_path / "lab"), *overrides]


def test_the_lab_measures_every_part(
    small_lab: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.main([*small_lab, "--parts", "credit", "judge"])  # in pieces, in any order
    later = ["controls", "rates", "best-of", "loop", "first", "rounds", "plan", "ablations", "own", "steps"]
    later += ["activation", "transfer", "after"]
    lab.main([*small_lab, "--parts", *later])
    report = json.loads((tmp_path / "lab/lab.json").read_text())
    assert list(report) == ["credit", "judge", *later]
    rows = {part: {row["what"]: row for row in found} for part, found in report.items()}
    assert list(rows["loop"]) == ["base", "sft", "srum", "region_nft", "region_nft - base", "srum - sft"]
    assert list(rows["first"]) == list(rows["loop"])
    assert list(rows["rounds"]) == ["after 0 rounds", "after 1 rounds", "after 1 rounds - after 0 rounds"]
    assert list(rows["credit"]) == ["sample", "region", "region - sample"]
    assert list(rows["controls"])[:4] == ["base", "judge", "contrast", "shuffled"]
    assert {"judge - base", "judge - contrast", "judge - shuffled"} <= rows["controls"].keys()
    assert rows["controls"]["base"]["per_seed"] == rows["first"]["base"]["per_seed"]
    tried = [f"{method}, {rate}" for method in ("sft", "srum", "region_nft") for rate in ("3e-4", "1e-4")]
    assert list(rows["rates"]) == ["base", *tried, *(f"{name} - base" for name in tried)]
    first, chosen, possible = list(rows["best-of"].values())[:3]
    assert all(a <= c for a, c in zip(first["per_seed"], possible["per_seed"], strict=True))
    assert all(b <= c for b, c in zip(chosen["per_seed"], possible["per_seed"], strict=True))
    assert list(rows["plan"]) == ["direct", "plan", "plan - direct"]
    assert {"regions: auroc", "layout: failures", "relations: rejected"} <= rows["judge"].keys()
    assert list(rows["own"]) == [
        *("base", "sft, 1", "region_nft, 1", "sft, 1 - base", "region_nft, 1 - base", "region_nft, 1 - sft, 1")
    ]
    assert rows["own"]["sft, 1"]["per_seed"] == rows["first"]["sft"]["per_seed"]  # the same candidates, steps and noise
    assert list(rows["ablations"])[:4] == ["base", "sft", "srum", "binary"]
    assert rows["ablations"]["sft"]["per_seed"] == rows["first"]["sft"]["per_seed"]
    assert rows["ablations"]["srum"]["per_seed"] == rows["first"]["srum"]["per_seed"]
    assert {"before: regions: auroc", "all-weights: relations: rejected"} <= rows["after"].keys()
    for quantity in ("layout", "detail", "correct"):
        first, second = (
            list(rows["steps"][f"{quantity}, {half} half: srum"]["interval"]) for half in ("first", "second")
        )
        assert min(first + second) >= -100 and max(first + second) <= 100
    kept = json.loads((tmp_path / "lab/seed-0/lab/steps/srum/means.json").read_text())
    assert len(kept) == 15 and kept[0]["t"] == 1.0
    activation = {what: row["mean"] for what, row in rows["activation"].items()}
    assert activation["number of understanding neurons"] == activation["number of generation neurons"] == 1
    for task in ("understanding", "generation"):
        for cluster in ("understanding", "generation"):
            assert activation[f"{cluster} neurons in {task}: sft"] == (1000 if cluster == task else 0)
            assert activation[f"{cluster} neurons in {task}: srum - base"] == 0
    for domain, categories in lab.DOMAINS.items():
        prompts = read_records(tmp_path / f"lab/seed-1/lab/transfer/{domain}/round-000/prompts.jsonl", Prompt)
        assert len(prompts) == 3 and {prompt.metadata["tag"] for prompt in prompts} <= set(categories)
    assert list(rows["transfer"])[:3] == [f"base on {domain}" for domain in lab.DOMAINS]
    assert {"srum of objects on relations - base", "sft on the others - base"} <= rows["transfer"].keys()
    gain = rows["loop"]["region_nft - base"]
    assert gain["mean"] == pytest.approx(rows["loop"]["region_nft"]["mean"] - rows["loop"]["base"]["mean"])
    assert len(gain["per_seed"]) == 2 and gain["interval"][0] <= gain["mean"] <= gain["interval"][1]
    assert "region - sample" in capsys.readouterr().out

    monkeypatch.setattr(FakeModel, "draw", None)  # everything is there: nothing is made again
    before = (tmp_path / "lab/lab.json").read_bytes()
    lab.main(small_lab)
    assert json.loads((tmp_path / "lab/lab.json").read_text()) == json.loads(before)


@pytest.fixture
def small_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a seed of refine, reca or stacked, on the fake model."""
    monkeypatch.setattr(models, "load", FakeModel.load)
    sizes = [
        *SMALL[:-1],
        "eval.count=7",
        "images.count=4",
        "pairs.select=relative",
        "pairs.min_gap=1e-6",
        "train.warmup_steps=0",
    ]
    overrides = [argument for override in sizes for argument in ("--set", override)]
    return ["--seeds", "1", "--out", str(tmp_path / "out"), *overrides]


def test_arms_of_refinement_begin_with_the_same_images(
    small_arms: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All arms, and again: nothing is drawn twice. One that is measured alone comes out as it did among the others."""
    refine.main(small_arms)
    found = json.loads((tmp_path / "out/refine.json").read_text())
    rows = {name: [refine.Outcome(**one) for one in own] for name, own in found.items()}
    once, again = 30.0, 30.0  # 15 steps, with and without text
    for name, own in rows.items():
        assert [one.before for one in own] == [one.after for one in rows["base"]], name
        assert all(len(one.after) == len(one.passes) == 7 for one in own)
        assert all((passes - once) % again == 0 for one in own for passes in one.passes)
    for name, drawings in {"base": 1, "sft": 1, "rvr, drawn once": 1, "rvr, always": 2, "best of 4": 4}.items():
        assert {passes for one in rows[name] for passes in one.passes} == {drawings * once}
    for first, later in zip(rows["rvr, round 1"], rows["rvr, round 3"], strict=True):
        assert all(a <= b <= a + 2 * again for a, b in zip(first.passes, later.passes, strict=True))

    alone = tmp_path / "out/seed-1/arms/always.json"
    held = alone.read_text()
    alone.unlink()
    refine.main([*small_arms, "--arms", "always"])
    assert alone.read_text() == held
    with monkeypatch.context() as patch:  # by the base model's weights an arm that draws once is the base
        patch.setattr(refine, "weights_of", lambda run, name: run.config.model)
        (tmp_path / "out/seed-1/arms/sft.json").unlink()
        refine.main([*small_arms, "--arms", "sft"])
    same = json.loads((tmp_path / "out/refine.json").read_text())
    assert same["sft"] == same["base"] == found["base"]
    monkeypatch.setattr(FakeModel, "draw", None)
    refine.main([*small_arms, "--arms", "rvr", "best_of"])
    fewer = json.loads((tmp_path / "out/refine.json").read_text())
    assert list(fewer) == ["base", *(f"rvr, round {k}" for k in (1, 2, 3)), *(f"best of {k}" for k in (2, 3, 4))]
    assert all(fewer[name] == found[name] for name in fewer)
    with pytest.raises(RunError, match="is a run of another config"):
        refine.main([*small_arms, "--set", "eval.count=8"])


def test_of_two_drawings_the_one_that_the_judge_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a judge that knows, whatever either drawing has right is right; one that failed is never preferred."""
    config = load_config(None, [*reinforce.SMALL, "method=flow_grpo", "eval.count=4"])
    grey = [Image.new("L", (8, 8), shade) for shade in (0, 200)]  # wrong, right
    tries = {0: [0, 1, 0, 1], 1: [0, 0, 1, 1]}  # by whether it is the run's own seed
    scores = iter([[-0.5, 0.5, -0.5, None], [-0.5, -0.5, 0.5, 0.9]] * 2)

    def drawn(_model: object, _prompts: object, _wanted: object, seed: int) -> list[Generated]:
        return [Generated(grey[shade], torch.zeros(1)) for shade in tries[seed != config.seed]]

    monkeypatch.setattr(reinforce, "load_model", lambda *_: None)
    monkeypatch.setattr(reinforce, "score_and_blame", lambda *_: (lambda *_: next(scores), None))
    monkeypatch.setattr(reinforce, "all_drawn", drawn)
    monkeypatch.setattr(reinforce, "is_right", lambda image, _metadata: image.getpixel((0, 0)) > 100)
    once = {mode: [False, True, False, True] for mode in reinforce.MODES}
    best = reinforce.chosen(reinforce.Outcome(once, once, {}, [], [], [], [], [0.5]), config)
    assert best.once == once and best.value == []
    assert best.refined == {mode: [False, True, True, True] for mode in reinforce.MODES}
    table = reinforce.drawing_table({"base": [best], "best_of": [best]})
    assert list(table.columns[-2].cells) == ["60"] * 4  # passes: two drawings of 15 guided steps


def test_counts_that_make_no_batches_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "judged", lambda *_: [None] * 191)
    for main, arguments, message in (
        (gradients.main, ["run"], "a signal takes two batches of 96 candidates, and these are 191"),
        (signal.main, ["--prompts", "12"], "12 is no multiple of 8"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in " ".join(capsys.readouterr().err.split())


def test_outcomes_of_other_settings_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = {mode: [True, False] for mode in reinforce.MODES}
    outcome = reinforce.Outcome(
        modes, modes, {mode: ["stop"] * 2 for mode in modes}, [0.5, -0.5], [True], [0.5, -0.5], [True], []
    )
    monkeypatch.setattr(reinforce, "measured", lambda *_: outcome)
    monkeypatch.setattr(reinforce, "chosen", lambda *_: outcome)

    def measure(steps: int, *overrides: str) -> dict[str, list[reinforce.Outcome]]:
        return reinforce.measure(tmp_path, [0], ["base", "flow_grpo", "best_of"], steps, overrides)

    assert measure(4) == measure(4) == {arm: [outcome] for arm in ("base", "flow_grpo", "best_of")}
    for steps, *overrides in ((5,), (4, "eval.count=4")):
        with pytest.raises(RunError, match="is a run of another config"):
            measure(steps, *overrides)


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [([0.5, 0.5, -1.0], 0), ([-0.5, 0.0, 0.0], 1), ([None, -1.0, None], 1), ([None, None, None], 0)],
)
def test_best_of_n_does_not_know_the_truth(
    scores: list[float | None], chosen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of three is the right one: of equal scores the first is taken, what failed last."""
    for right in range(3):
        images = [(score, place == right) for place, score in enumerate(scores)]
        for name in ("branch", "judge_round_0"):
            monkeypatch.setattr(lab, name, lambda run, *_: run)
        monkeypatch.setattr(lab, "judged_images", lambda _, of=images: [of])
        found = lab.best_of(Run(tmp_path, load_config(None, ["eval.count=7"])))
        (best,) = (verdicts for name, verdicts in found.items() if "by the judge" in name)
        assert best == [right == chosen]


def test_arms_are_compared_prompt_by_prompt_over_seeds() -> None:
    """An arm that gains on each prompt has a difference without width; one that gains on each prompt of one seed of two
    has one that reaches zero. Of three right images one is broken: a sixth of all."""
    nothing, all_of, half = [False] * 3, [True] * 3, [True, True, False]

    def rows(*after: list[bool], before: list[bool] = nothing) -> list[refine.Outcome]:
        return [refine.Outcome(before, own, [30.0] * 3) for own in after]

    shown = refine.table(
        {
            "base": rows(nothing, nothing),
            "sure": rows(all_of, all_of),
            "one seed": rows(all_of, nothing),
            "breaks": rows(all_of, half, before=all_of),
        }
    )
    cells = {row[0]: row[1:] for row in zip(*(list(column.cells) for column in shown.columns), strict=True)}
    assert cells["sure"][1] == "+100.0 (+100.0 to +100.0)" and cells["base"][1] == "+0.0 (+0.0 to +0.0)"
    low, high = cells["one seed"][1].removeprefix("+50.0 (").removesuffix(")").split(" to ")
    assert float(low) <= 0 and float(high) >= 100
    assert cells["breaks"][2:] == ("0.0", "16.7", "30", "2")


def test_arms_of_reconstruction(small_arms: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each changes what it says it does; two trainings share the steps; finished, nothing is drawn again."""
    arms = ["reca", "own", "clean_latent", "sft_reca"]
    reca.main([*small_arms, "--arms", *arms])
    found = json.loads((tmp_path / "out/reca.json").read_text())
    assert list(found) == ["base", *arms]
    for arm, outcomes in found.items():
        assert [(len(one["drawn"]), len(one["reconstructed"])) for one in outcomes] == [(7, 7)]
        assert all((len(one["loss"]) == 2) == (arm != "base") for one in outcomes)
    place = tmp_path / "out/seed-1/trained"
    assert sorted(path.name for path in place.iterdir()) == [
        *("clean_latent-3", "own-3", "reca-3", "sft-1", "sft-reca-1")
    ]
    second = load_config(place / "sft-reca-1/config.yaml")
    assert (second.method, second.train.steps, second.seed) == ("reca", 1, 1 + reca.SEED_STRIDE)
    assert second.model == str(place / "sft-1/round-000/train/sft/model")
    monkeypatch.setattr(FakeModel, "draw", None)
    reca.main([*small_arms, "--arms", *arms])
    assert json.loads((tmp_path / "out/reca.json").read_text()) == found


def test_stacked_arms_have_equal_compute(small_arms: list[str], tmp_path: Path) -> None:
    """Three trainings of a step of 4 samples in 3 passes; before SRUM and RvR 12 candidates are drawn in 15 passes."""
    stacked.main([*small_arms, "--arms", "srum", "reca_srum_rvr"])
    found = json.loads((tmp_path / "out/stacked.json").read_text())
    rows = {arm: [stacked.Outcome(**one) for one in own] for arm, own in found.items()}
    learned, drawn = 3 * 4, 12 * 15
    assert [rows[arm][0].training for arm in rows] == [0.0, 3 * (learned + drawn), 3 * learned + 2 * drawn]
    place = tmp_path / "out/seed-1/trained"
    assert {path.name for path in place.iterdir()} == {
        *("srum-1", "srum-srum-1", "srum-srum-srum-1", "reca-1", "reca-srum-1", "reca-srum-rvr-1")
    }
    assert json.loads((place / "reca-1/forked.json").read_text())["stage"] == "images"
    for outcomes in rows.values():
        assert all(passes in (30.0, 60.0) for one in outcomes for passes in one.passes)
        assert all(
            a == b for one in outcomes for a, b, p in zip(one.once, one.again, one.passes, strict=True) if p == 30
        )


def records_of(*made: tuple[str, str | None, float]) -> list[TrainingRecord]:
    """Records of (prompt id, plan, score), their latents and maps of one cell."""
    return [
        TrainingRecord(
            Candidate(
                id=f"{prompt}-{n}", prompt_id=prompt, prompt=prompt, index=n, seed=0, plan=plan, image="a.png",
                latent="a.safetensors", size=(8, 8), sampling={},
            ),
            torch.zeros(1, 1, 1), torch.zeros(1, 1), mapping="signed", alpha=1.0, sample_score=score,
        )
        for n, (prompt, plan, score) in enumerate(made)
    ]  # fmt: skip


def test_what_takes_the_place_of_the_judge(tmp_path: Path) -> None:
    """Prompt a: planned 1 and 0, bare 0 and -1; prompt b: planned 1 and 1, bare -1 and -1.

    Modes alone: 1 and -1 about a mean of 0, over 2 std = 2: half and minus half. Within modes the means of a are 1/2
    and -1/2, and b has no differences; the scores' variance is (1 + 0 + 0 + 1 + 4) / 8 = 3/4. The sum is halved.
    """
    of_a, of_b = [("a", "p", 1.0), ("a", "p", 0.0), ("a", None, 0.0), ("a", None, -1.0)], [1.0, 1.0, -1.0, -1.0]
    records = records_of(*of_a, *(("b", "p" if score > 0 else None, score) for score in of_b))
    run = Run(tmp_path, load_config())
    contrast, within, both, shuffled = (
        kind().advantages(records, run, 0)
        for kind in (controls.Contrast, controls.WithinModes, controls.Separated, controls.Shuffled)
    )
    assert contrast == pytest.approx([0.5, 0.5, -0.5, -0.5] * 2)
    half = 0.5 / (2 * 0.75**0.5)
    assert within == pytest.approx([half, -half, half, -half, 0, 0, 0, 0])
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(contrast, within, strict=True)])
    assert sorted(shuffled[:4]) == pytest.approx([-2 * half, 0, 0, 2 * half])
    assert sorted(shuffled[4:]) == pytest.approx([-2 * half, -2 * half, 2 * half, 2 * half])


def test_equal_passes_by_hand() -> None:
    """A round of 2 prompts with 4 images in 15 steps takes 120 passes, 5 steps of 6 samples 4 x 30 = 120; one image of
    each of 8 prompts with guidance, 8 x 30 = 240: what one image and the round take are two images of each prompt."""
    small = ["prompt_count=2", "candidates_per_prompt=4", "train.steps=5", "train.batch_size=6", "eval.count=8"]
    config = load_config(None, small)
    assert (passes_of(config.rollout), passes_of(config.eval), lab.affordable(config)) == (15, 30, 2)


def test_a_difference_that_every_prompt_shows_has_no_width() -> None:
    row = lab.accuracy_row("x", np.ones((3, 50)))
    assert (row.mean, row.per_seed, row.interval) == (100.0, [100.0] * 3, (100.0, 100.0))


def test_a_row_says_what_its_interval_covers() -> None:
    """Verdicts cover seeds and prompts, one number per seed the seeds; of one seed the prompts are left, or nothing."""
    assert lab.accuracy_row("x", np.eye(3)).covers == "3 seeds, 3 prompts"
    assert lab.accuracy_row("x", np.eye(3)[:1]).covers == "3 prompts"
    assert lab.mean_row("x", [1.0, 2.0, 3.0]).covers == "3 seeds" and lab.mean_row("x", [1.0]).interval is None


def test_a_prompt_that_was_not_judged_is_left_out_of_the_steps() -> None:
    """Of three prompts in two seeds the judge fails on every first step of the last, in one seed: two are left."""

    def steps(*layouts: float | None) -> JudgedSteps:
        return JudgedSteps(prompt_id="p", steps=[JudgedStep(layout=s, detail=0.0, correct=True) for s in layouts])

    whole = {"base": [steps(0.5, 1.0), steps(-0.5, 1.0), steps(1.0, 1.0)]}
    failed = {"base": [*whole["base"][:2], steps(None, 1.0)]}
    rows = {row.what: row for row in lab.step_rows([whole, failed])}
    assert (
        rows["layout, first half: base"].mean == 0.0 and rows["layout, first half: base"].covers == "2 seeds, 2 prompts"
    )
    assert rows["layout, second half: base"].covers == "2 seeds, 3 prompts"


def test_transfer_is_what_is_gained_on_the_other_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two domains, of one prompt and of three: trained on a the arm wins one of the three in b, trained on b it loses
    the one of a, so that of four prompts it wins 1 and loses 1 on the others; on its own it wins two of b."""
    monkeypatch.setattr(lab, "DOMAINS", {"a": (), "b": ()})
    base = {"nothing": {"a": [True], "b": [False, False, True]}}
    arm = {"a": {"a": [True], "b": [True, False, True]}, "b": {"a": [False], "b": [True, True, True]}}
    rows = {row.what: row.mean for row in lab.transfer_rows([{"base": base, "srum": arm}])}
    assert rows["srum of a on b - base"] == pytest.approx(100 / 3) and rows["srum of b on a - base"] == -100
    assert rows["srum on the others - base"] == 0 and rows["srum on its own domain - base"] == 50
    assert rows["base on b"] == pytest.approx(100 / 3)


def test_the_pages_about_size_have_the_tables_of_their_commands() -> None:
    pages = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("training", "scale")}
    rows = dry_runs.stored()
    assert dry_runs.table([rows[name] for name in dry_runs.WANTED if name in rows]) in pages["training"]
    assert costs.table(costs.Prices()) in pages["scale"]


def test_a_round_is_cheaper_by_the_hour_with_more_gpus_and_not_by_the_dollar() -> None:
    """Of a million candidates; of a hundred 512 GPUs draw no faster than 64, since most of them have none."""
    prices = costs.Prices()
    many = [costs.round_of(10**6, gpus, prices).seconds["draw"] for gpus in costs.GPUS]
    assert [slow / fast for slow, fast in pairwise(many)] == pytest.approx([8, 8, 8], rel=0.01)
    few = [costs.round_of(100, gpus, prices) for gpus in (64, 512)]
    assert few[0].seconds["draw"] == few[1].seconds["draw"] and few[0].short == few[1].short == "candidates"


def test_ways_of_drawing_are_compared_at_equal_prompts() -> None:
    """A way that is right once less in ten, in half of the time; what runs the network less often has fewer passes."""
    passes = [passes_of(approximate.config_of(way)) for way in approximate.WAYS]
    assert passes == [30, 23, 20, 24, 24, 18, 20, 14, 14, 14]
    told = {"seconds": 2.0, "right": [True] * 10, "score": [0.5] * 10}
    fewer = {"seconds": 1.0, "right": [True] * 9 + [False], "score": [0.5] * 10}
    found = {way: told if way == approximate.PLAIN else fewer for way in approximate.WAYS}
    cells = [list(column.cells)[1] for column in approximate.table_of([found, found]).columns]
    assert cells[:3] == ["guidance_every=2", "23", "2.00"]
    assert cells[3].startswith("-10.0, ") and cells[4] == "+0.0, +0.0 to +0.0"


@pytest.mark.parametrize("stage", ["rollout", "rasterize", "read"])
def test_stages_run_over_a_made_up_round(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "WARM", 2)
    assert scale.measure(stage, 8)["seconds"] > 0
