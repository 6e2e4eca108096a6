"""``srum show``, ``srum compare`` and ``srum export`` on runs of the fake model."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from srum import open_run
from srum.cli import app
from srum.evaluation.accuracy import CheckedImage
from srum.run_dir import read_records, write_records
from srum.views.show import changed_images
from tests.fakes import run_on_fakes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on_fakes(tmp_path_factory.mktemp("show") / "a")


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Path:
    """A copy whose arm ``region_nft`` got three prompts right that the original got wrong, under another config."""
    copy = shutil.copytree(folder, tmp_path / "b")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("grounder: classical", "grounder: grid"))
    path = copy / "eval/region_nft/verdicts.jsonl"
    verdicts = read_records(path, CheckedImage)
    wrong = [verdict.prompt_id for verdict in verdicts if not verdict.correct][:3]
    write_records(path, [v.model_copy(update={"correct": v.correct or v.prompt_id in wrong}) for v in verdicts])
    return copy


def srum(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def test_show_prints_regions_scores_and_reasons_and_saves_the_picture(folder: Path, tmp_path: Path) -> None:
    view = next(view for view in open_run(folder).candidates(round=0) if view.score is not None)
    result = srum("show", folder, view.id, "--round", "0", "--image", tmp_path / "candidate.png")
    assert result.exit_code == 0, result.output
    assert view.prompt.text in result.output and f"{view.score:+.2f}" in result.output
    assert view.judgement is not None
    for said in [*view.judgement.regions, view.judgement.layout]:
        assert (f"{said.score:+.2f}" if said.score is not None else "no_score, reply: I cannot tell.") in result.output
    with Image.open(tmp_path / "candidate.png") as picture:
        assert picture.width > picture.height > 400


def test_show_says_in_one_line_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    assert "error: " in srum("show", folder, "nobody").stderr and srum("show", folder, "nobody").exit_code == 2
    assert "not the folder of a run" in srum("show", tmp_path, "nobody").stderr


def test_compare_prints_configs_rounds_and_paired_differences(folder: Path, other: Path, tmp_path: Path) -> None:
    """Three of 12 prompts more are right: +25.0 points; the other arms are the same, +0.0."""
    result = srum("compare", folder, other, "--image", tmp_path / "changed.png")
    assert result.exit_code == 0, result.output
    assert "ground.grounder: classical != grid" in result.output
    cells = [re.split(r"\s*│\s*", line.strip("│ ")) for line in result.output.splitlines()]
    rows = {row[0]: row for row in cells if len(row) == 5}
    assert rows["region_nft"][3] == "+25.0" and rows["base"][3:] == ["+0.0", "+0.0 to +0.0"]
    assert float(rows["region_nft"][2]) - float(rows["region_nft"][1]) == pytest.approx(25.0, abs=0.11)
    assert (tmp_path / "changed.png").stat().st_size > 10_000


def test_changed_images_are_those_whose_verdicts_differ(folder: Path, other: Path) -> None:
    pairs = list(changed_images(open_run(folder), open_run(other), "region_nft"))
    assert [(pair.before_correct, pair.after_correct) for pair in pairs] == [(False, True)] * 3


def test_compare_writes_no_empty_picture(folder: Path, tmp_path: Path) -> None:
    result = srum("compare", folder, folder, "--image", tmp_path / "none.png")
    assert result.exit_code == 2 and "no verdict on an image of region_nft differs" in result.stderr
    assert "no difference" in result.output and not (tmp_path / "none.png").exists()


def test_export_writes_a_parquet_file(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    result = srum("export", folder, tmp_path / "run.parquet")
    assert result.exit_code == 0, result.output
    assert "run.parquet: 24 candidates" in result.output.replace("\n", "")
    assert (tmp_path / "run.parquet").read_bytes()[:4] == b"PAR1"


def test_export_names_the_extra_that_is_missing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "srum.exchange.export", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = srum("export", folder, tmp_path / "run.parquet")
    assert result.exit_code == 2 and "pyarrow is missing: pip install 'srum[export]'" in result.stderr
