"""The whole loop on a tiny Show-o: what it leaves, and that neither a kill nor a second process changes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from srum.cli import app
from srum.config import load_config
from srum.loop import run_loop
from srum.models.showo import Showo
from tests.interrupted import killed_in_training
from tests.launch import launch
from tests.showo_tiny import CLIP, RECA, VQ, small, whole_run
from tests.test_blip3o_run import lines
from tests.test_loop import files_of

ARMS = ("sft", "region_nft")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    whole_run(folder, VQ)
    return folder


def test_a_run_from_prompts_to_report(whole: Path) -> None:
    assert "the model itself, with the weights that entered the run" in (whole / "report.html").read_text()
    assert load_config(whole / "config.yaml").judge.model == "start"
    for candidate in lines(whole / "round-000" / "candidates.jsonl"):
        latent = load_file(whole / "round-000" / str(candidate["latent"]))["latent"]
        assert latent.dtype == torch.int16 and latent.shape == (1, 4, 4) and latent.max() < 64
    assert [reward["grid"] for reward in lines(whole / "round-000" / "rewards.jsonl")] == [[4, 4]] * 4
    before = load_file(VQ / "pytorch_model.safetensors")
    for arm in ARMS:
        folder = whole / "round-000" / "train" / arm
        parts = [row["parts"] for row in lines(folder / "metrics.jsonl")]
        names = {"sft": {"error"}, "region_nft": {"error", "push", "trust"}}
        assert all(part.keys() == names[arm] for part in parts)  # type: ignore[attr-defined]
        trained = Showo.load(folder / "model")  # runs where it stands, without the folders beside the first
        after = trained.network.state_dict()
        assert after.keys() == before.keys() and not torch.equal(
            after["showo.lm_head.bias"], before["showo.lm_head.bias"]
        )
        assert torch.equal(
            trained.encode(trained.decode([latent]))[0], Showo.load(VQ).encode(trained.decode([latent]))[0]
        )


@pytest.mark.parametrize("checkpoint", [VQ, CLIP])
def test_reconstruction_alignment(tmp_path: Path, checkpoint: Path) -> None:
    """Both variants, what is seen by ids and by features; the projector learns, too."""
    run_loop(small(checkpoint, *RECA), tmp_path / "run")
    folder = tmp_path / "run" / "round-000" / "train" / "reca"
    assert json.loads((folder / "compared.json").read_text()).keys() == {"what is seen", "a text alone"}
    before, after = (load_file(x / "pytorch_model.safetensors") for x in (checkpoint, folder / "model"))
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"showo.model.embed_tokens.weight", "showo.lm_head.weight"} <= learned
    assert ("mm_projector.0.weight" in learned) == (checkpoint == CLIP)


def test_the_report_says_what_training_made_of_the_judge(whole: Path) -> None:
    """The judge of round 0 against the truth, and the trained weights, whose scores are others, on the same images."""
    quality = json.loads((whole / "round-000" / "judge" / "quality.json").read_text())
    assert quality.keys() == {"before", "after"}
    before, after = (lines(whole / "round-000" / place / "judgements.jsonl") for place in ("", "judge"))
    assert all(a["candidate_id"] == b["candidate_id"] and a != b for a, b in zip(before, after, strict=True))
    judged = quality["before"]["regions"]
    assert judged["right"] + judged["wrong"] == sum(
        region["region_id"] != 0
        for judgement in before
        for region in judgement["regions"]  # type: ignore[attr-defined]
    )
    assert "AUROC by the exact checker, before and after" in (whole / "report.html").read_text()


def test_refine_draws_blamed_cells_anew(whole: Path) -> None:
    options = ["--set", "refine.way=infill", "--set", "refine.timesteps=3", "--set", "refine.stop=null"]
    done = CliRunner().invoke(app, ["refine", str(whole), *options])
    assert done.exit_code == 0, done.output
    made = lines(whole / "round-000" / "refined" / "refined.jsonl")
    assert len(made) == 4 and all(len(one["turns"]) == 2 for one in made)  # type: ignore[arg-type]


def test_the_doctor_knows_it() -> None:
    for checkpoint, eyes in ((VQ, "the images' own ids"), (CLIP, "CLIP,")):
        done = CliRunner().invoke(app, ["doctor", str(checkpoint)], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        assert eyes in done.output and "16 ids of 64, 64 px square" in done.output


@pytest.mark.slow
def test_a_kill_while_training_changes_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with killed_in_training(monkeypatch):
        whole_run(folder, VQ)
    run_loop(small(VQ), folder, resume=True)
    ours, theirs = files_of(folder), files_of(whole)
    kept = [name for name in ours if "checkpoints" not in name]
    assert [name for name in kept if ours[name] != theirs[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint", "more", "arms"), [(VQ, (), ARMS), (CLIP, RECA, ("reca",))])
def test_two_processes_do_what_one_does(
    whole: Path, tmp_path: Path, checkpoint: Path, more: tuple[str, ...], arms: tuple[str, ...]
) -> None:
    """Weights up to the order in which gradients are added."""
    one = whole if not more else tmp_path / "one"
    if more:
        whole_run(one, checkpoint, *more)
    launch(whole_run, tmp_path / "two", checkpoint, *more)
    for arm in arms:
        a, b = (
            load_file(x / "round-000/train" / arm / "model/pytorch_model.safetensors") for x in (one, tmp_path / "two")
        )
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-6)
