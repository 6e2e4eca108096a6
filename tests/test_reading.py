"""Reading a run: what the API gives is what the files hold, and it reads no more than is asked for."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import srum
from srum.records import Candidate, Grounding, Judgement, Prompt, RewardMap
from srum.run_dir import RunError, read_records
from srum.train.data import load_training_records
from srum.views.reading import Candidates, RunView
from tests.fakes import run_on_fakes

MIDDLE = -0.2  # a score with some on either side


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on_fakes(tmp_path_factory.mktemp("reading") / "run & <more>")


@pytest.fixture
def run(folder: Path) -> RunView:
    return srum.open_run(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def picture(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_importing_srum_imports_nothing_heavy() -> None:
    code = "import sys, srum; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_a_folder_without_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not the folder of a run: it has no config.yaml"):
        srum.open_run(tmp_path)


@pytest.mark.parametrize("k", [0, 1])
def test_candidates_are_the_records_of_the_round_joined_by_id(run: RunView, k: int) -> None:
    views = list(run.candidates(round=k))
    files = run.folder / f"round-{k:03d}"
    assert [view.record for view in views] == read_records(files / "candidates.jsonl", Candidate)
    assert [view.grounding for view in views] == read_records(files / "regions.jsonl", Grounding)
    assert [view.judgement for view in views] == read_records(files / "judgements.jsonl", Judgement)
    assert {(view.round, view.folder) for view in views} == {(k, files)}
    assert [view.reward for view in views if view.reward] == read_records(files / "rewards.jsonl", RewardMap)
    assert list({view.prompt.id: view.prompt for view in views}.values()) == read_records(
        files / "prompts.jsonl", Prompt
    )
    assert all(view.prompt.text == view.record.prompt and view.category for view in views)


def test_without_a_round_all_rounds_follow_one_another(run: RunView) -> None:
    assert run.rounds == [0, 1]
    assert list(run.candidates()) == [*run.candidates(round=0), *run.candidates(round=1)]


def test_images_and_arrays_are_those_of_the_files(run: RunView) -> None:
    for view in run.candidates(round=1):
        assert np.array_equal(view.image(), Image.open(view.folder / f"images/{view.id}.png"))
        assert torch.equal(view.latent(), load_file(view.folder / f"latents/{view.id}.safetensors")["latent"])
        reward = view.reward_map()
        if view.reward is None:
            assert reward is None and view.score is None
        else:
            assert reward is not None and reward.shape == view.reward.grid
            assert torch.equal(reward, load_file(view.folder / f"rewards/{view.id}.safetensors")["reward"])


def test_nothing_is_read_before_it_is_asked_for(copy: Path) -> None:
    (copy / "round-001/candidates.jsonl").write_text("nonsense\n")
    candidates = srum.open_run(copy).candidates()
    later = candidates.filter(lambda candidate: candidate.round == 1)
    assert next(iter(candidates)).round == 0
    with pytest.raises(RunError, match=r"round-001/candidates\.jsonl:1: not JSON"):
        list(later)


def test_filters_can_be_joined_and_iterated_again(run: RunView) -> None:
    judged = run.candidates().filter(lambda c: c.score is not None)
    low = judged.filter(lambda c: c.score is not None and c.score < MIDDLE)
    expected = [c.id for c in run.candidates() if c.score is not None and c.score < MIDDLE]
    assert 0 < len(expected) < len(list(judged))
    assert [c.id for c in low] == expected == [c.id for c in low]


def test_failures_are_named_and_counted(run: RunView) -> None:
    """As many as counts.json says of the round; a layout without a score leaves the candidate without one."""
    views = list(run.candidates(round=0))
    said = [judged for view in views if view.judgement for judged in [*view.judgement.regions, view.judgement.layout]]
    failures = [failure for view in views for failure in view.failures]
    assert len(failures) == sum(judged.failure is not None for judged in said) > 0
    assert {failure.split(" ")[-1] for failure in failures} == {"no_score"}
    assert all(view.score is None for view in views if "layout: no_score" in view.failures)


def test_a_candidate_is_found_in_the_newest_round_that_has_it(run: RunView) -> None:
    id = "train-0000-1"  # in both rounds
    assert run.candidate(id).round == 1 and run.candidate(id, round=0).round == 0
    with pytest.raises(RunError, match="no candidate 'nobody'; the ids are in"):
        run.candidate("nobody")
    with pytest.raises(RunError, match="no candidate 'nobody' in round 1"):
        run.candidate("nobody", round=1)


def test_what_no_stage_has_said_yet_is_none(copy: Path) -> None:
    for name in ("regions", "judgements", "rewards"):
        (copy / f"round-000/{name}.jsonl").unlink()
    view = next(iter(srum.open_run(copy).candidates()))
    assert (view.grounding, view.judgement, view.reward, view.score) == (None, None, None, None)
    assert view.regions == [] and view.failures == [] and view.reward_map() is None
    assert picture(view._repr_png_()).std() > 0
    assert srum.open_run(copy).overview()[0] == {
        "round": 0,
        "candidates": 12,
        "reward maps": 0,
        "mean score": None,
    }


def test_the_table_has_a_row_per_candidate(run: RunView) -> None:
    pytest.importorskip("pandas")
    table = run.candidates().table()
    assert len(table) == 24 and list(table["id"]) == [view.id for view in run.candidates()]
    scores = [view.score for view in run.candidates() if view.score is not None]
    assert table["score"].dropna().tolist() == scores
    assert (table["lowest_region"].dropna() >= -1).all() and (table["regions"] >= 0).all()
    mean = run.overview()[1]["mean score"]
    assert table[table["round"] == 1]["score"].mean() == pytest.approx(mean)


def test_a_candidate_shows_its_picture(run: RunView) -> None:
    view = next(view for view in run.candidates() if view.score is not None)
    drawn = picture(view._repr_png_())
    assert drawn.shape[1] > drawn.shape[0] > 200 and drawn.std() > 0
    assert f"{view.id} of round 0, score {view.score:+.2f}" in repr(view)


def test_a_gallery_keeps_the_ends_of_a_long_ranking(run: RunView, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[float | None] = []
    monkeypatch.setattr("srum.views.plots.gallery_figure", lambda tiles: shown.extend(tile.score for tile in tiles))
    scored = run.candidates().filter(lambda c: c.score is not None)
    ranked = sorted((c.score for c in scored if c.score is not None), reverse=True)
    for limit in (1, 5, len(ranked), 100):
        shown.clear()
        scored.gallery(limit)
        assert len(shown) == min(limit, len(ranked)) and shown[0] == ranked[0]
        assert shown == sorted(shown, key=lambda score: -(score or 0))
        assert limit == 1 or shown[-1] == ranked[-1]


def test_reprs_of_collections_draw(run: RunView) -> None:
    assert picture(run.candidates(round=0)._repr_png_()).std() > 0
    assert picture(Candidates(lambda: iter(()))._repr_png_()).shape[2] == 3
    assert repr(run.candidates()) == "<24 candidates>"
    page = run._repr_html_()
    assert "run &amp; &lt;more&gt;" in page and page.count("<tr>") == 3


def test_verdicts_and_their_images(run: RunView) -> None:
    verdicts = run.verdicts()
    assert list(verdicts) == ["base", "region_nft", "sft", "srum"] and run.verdicts(round=0) == {}
    (first, *_) = verdicts["base"]
    path = run.folder / f"eval/base/images/{first.prompt_id}.png"
    assert np.array_equal(run.checked_image("base", first.prompt_id), Image.open(path))


def test_a_damaged_array_is_named(copy: Path) -> None:
    view = next(view for view in srum.open_run(copy).candidates() if view.reward)
    arrays = (view.record.latent, view.latent, "latent"), (view.reward.values, view.reward_map, "reward_map")
    for name, read, array in arrays:
        (view.folder / name).write_bytes((view.folder / name).read_bytes()[:-1])
        with pytest.raises(ValueError, match=f"{name} is not a whole safetensors file"):
            read()
        with pytest.raises(ValueError, match=f"{name} is not a whole safetensors file"):
            [getattr(record, array) for record in load_training_records(view.folder)]
