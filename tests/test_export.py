"""A run goes through one parquet file and comes back bit for bit."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from srum import open_run
from srum.cli import app
from srum.config import load_config
from srum.exchange.interchange import import_round
from srum.records import Candidate, ContextPart, Prompt
from srum.run_dir import RunError, claim_run, read_records, write_records
from srum.stages.rollout import rollout
from tests.fakes import FakeModel, run_on_fakes

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from srum.exchange.export import ROWS, read_export, write_export  # noqa: E402

FILES = ("image", "latent")
STAGES = ("prompts", "candidates", "regions", "judgements", "rewards")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on_fakes(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parquet") / "new" / "run.parquet"
    assert write_export(open_run(folder), out) == (24, 0)
    return out


def contents(run: Path) -> dict[str, bytes]:
    """What an export holds of a run: every byte of its records, images, latents and reward maps, and its config."""
    patterns = ["config.yaml", *(f"round-*/{stage}.jsonl" for stage in STAGES)]
    patterns += [f"round-*/{kind}/**/*.*" for kind in ("images", "latents", "rewards")]
    return {str(path.relative_to(run)): path.read_bytes() for pattern in patterns for path in run.glob(pattern)}


@pytest.mark.parametrize("rows", [ROWS, 5])
def test_there_and_back_every_byte_is_equal(
    folder: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr("srum.exchange.export.ROWS", rows)
    write_export(open_run(folder), tmp_path / "again.parquet")
    run = read_export(tmp_path / "again.parquet", tmp_path / "back")
    expected = contents(folder)
    assert len(expected) > 2 * (len(STAGES) + 24)
    assert contents(run.folder) == expected
    assert run.config == open_run(folder).config


def test_a_run_that_has_stopped_between_stages_comes_back_as_it_was(folder: Path, tmp_path: Path) -> None:
    half = shutil.copytree(folder, tmp_path / "half")
    for name in ("judgements.jsonl", "rewards.jsonl"):
        (half / "round-001" / name).unlink()
    shutil.rmtree(half / "round-001/rewards")
    write_export(open_run(half), tmp_path / "half.parquet")
    assert contents(read_export(tmp_path / "half.parquet", tmp_path / "back").folder) == contents(half)


def test_an_imported_round_comes_back_with_every_prompt_once(tmp_path: Path) -> None:
    """Its candidates are in the order of the lines, where those of a prompt need not follow one another."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    said = {"object": "global_layout_reward", "bbox": [0, 0, 0, 0], "score": 0.5}
    line = {"bad_image_file": "a.png", "good_image_file": "a.png", "vlm_rewards": [said]}
    lines = [json.dumps({"prompt": text} | line) + "\n" for text in ("a cat", "a dog", "a cat")]
    (tmp_path / "lines.jsonl").write_text("".join(lines))
    run = tmp_path / "run"
    claim_run(run, load_config())
    import_round(tmp_path / "lines.jsonl", tmp_path, FakeModel(), run / "round-000")
    write_export(open_run(run), tmp_path / "run.parquet")
    assert contents(read_export(tmp_path / "run.parquet", tmp_path / "back").folder) == contents(run)


def test_candidates_whose_image_cannot_be_read_are_left_out(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    cut, gone, *others = open_run(broken).candidates()
    (cut.folder / cut.record.image).write_bytes((cut.folder / cut.record.image).read_bytes()[:60])
    (gone.folder / gone.record.image).unlink()
    result = CliRunner().invoke(app, ["export", str(broken), str(tmp_path / "out.parquet")])
    assert result.output.endswith("out.parquet: 22 candidates, 2 whose image cannot be read were left out\n")
    assert pq.read_table(tmp_path / "out.parquet").column("id").to_pylist() == [view.id for view in others]


def test_a_round_in_sub_folders_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srum.stages.rollout.CROWD", 4)
    config, run = load_config(None, ["candidates_per_prompt=2"]), tmp_path / "run"
    claim_run(run, config)
    prompts = [Prompt(id=f"p{number}", text="a cat") for number in range(3)]
    write_records(run / "round-000/prompts.jsonl", prompts)
    rollout(FakeModel(), prompts, config, 0, run / "round-000")
    write_export(open_run(run), tmp_path / "run.parquet")
    back = read_export(tmp_path / "run.parquet", tmp_path / "back").folder
    assert (back / "round-000/images/0001/p2-1.png").exists()
    assert contents(back) == contents(run)


def test_a_latent_that_is_gone_is_named(folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    shutil.rmtree(bare / "round-001/latents")
    with pytest.raises(RunError, match=r"round-001/latents/.*\.safetensors cannot be read: No such file"):
        write_export(open_run(bare), tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("name", ["run.csv", "run", "run.JSONL"])
def test_an_export_under_another_suffix_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    result = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / name)])
    assert result.exit_code == 2 and f"{name}: an export is a .parquet or a .jsonl file" in result.stderr
    assert not (tmp_path / name).exists()


def test_columns_are_structured(folder: Path, exported: Path) -> None:
    table = pq.read_table(exported)
    views = list(open_run(folder).candidates())
    assert table.column("id").to_pylist() == [view.id for view in views]
    assert table.schema.field("image").type == pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for row, view in zip(table.to_pylist(), views, strict=True):
        assert np.array_equal(Image.open(io.BytesIO(row["image"]["bytes"])), view.image())
        assert [tuple(region["box"]) for region in row["regions"]] == [region.box for region in view.regions]
        assert json.loads(row["metadata"]) == view.prompt.metadata
        reward = view.reward_map()
        assert (row["reward_map"] is None) == (reward is None)
        assert reward is None or np.array_equal(np.float32(row["reward_map"]), reward.numpy())


def test_what_cannot_be_unpacked_is_refused_and_nothing_written(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(RunError, match="full is not empty"):
        read_export(exported, tmp_path / "full")
    (tmp_path / "text.parquet").write_text("nonsense")
    with pytest.raises(RunError, match=r"text.parquet is not a parquet file"):
        read_export(tmp_path / "text.parquet", tmp_path / "back")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(RunError, match="not written by srum export"):
        read_export(tmp_path / "other.parquet", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def changed(exported: Path, out: Path, column: str, change: Callable[[Any], Any]) -> Path:
    """The export with other values in one column."""
    table = pq.read_table(exported)
    place, field = table.schema.get_field_index(column), table.schema.field(column)
    values = [change(value) for value in table.column(column).to_pylist()]
    pq.write_table(table.set_column(place, field, pa.array(values, field.type)), out)
    return out


PLACES = ["../../stolen.png", "/stolen.png", "images/../../../stolen.png", "", ".", "images\\..\\stolen.png"]


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        *[
            (kind, {"path": place}, f"row 1: {kind}: .* is not the path of a file")
            for kind in FILES
            for place in PLACES
        ],
        (
            "image",
            {"path": "train/srum/checkpoints/step-00000001/.metadata"},
            "row 1: .* is not in images/, latents/ or",
        ),
        ("latent", {"path": "images/a.png"}, "row 1: 'images/a.png' is not in images/, latents/ or rewards/"),
        ("reward", {"values": "../../stolen.png"}, r"values: '../../stolen\.png' is not the path"),
        ("reward", {"values": "config.yaml"}, "'config.yaml' is not in images/, latents/ or rewards/"),
        ("id", "../../../stolen", r"row 1: id: '../../../stolen' cannot name a file"),
        ("prompt_id", "../stolen", r"row 1: id: '../stolen' cannot name a file"),
        ("parent", "/etc/stolen", r"row 1: parent: '/etc/stolen' cannot name a file"),
        (
            "context",
            [{"kind": "seen", "text": None, "candidate_id": "../x"}],
            r"row 1: context\.0\.candidate_id: '../x'",
        ),
        ("metadata", "[" * 10_000, "row 1: metadata: not JSON"),
        ("round", -1, "row 1: round: expected a number from 0, got -1"),
        ("image", {"bytes": None}, "row 1: nothing to write into images/"),
    ],
)
def test_a_hostile_export_writes_nothing_outside(
    exported: Path, tmp_path: Path, column: str, change: Any, message: str
) -> None:
    def hostile(value: Any) -> Any:
        return (value and value | change) if isinstance(change, dict) else change

    path = changed(exported, tmp_path / "bad.parquet", column, hostile)
    with pytest.raises(RunError, match=message):
        read_export(path, tmp_path / "a/b/run")
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()} - {"bad.parquet"}
    assert all(name.startswith("train-") for name in written) and not list(tmp_path.rglob("config.yaml"))


def test_an_export_of_the_first_version_is_read(folder: Path, exported: Path, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(exported).drop_columns(["parent", "context"]), tmp_path / "old.parquet")
    assert contents(read_export(tmp_path / "old.parquet", tmp_path / "back").folder) == contents(folder)
    pq.write_table(pq.read_table(exported).drop_columns(["regions"]), tmp_path / "other.parquet")
    with pytest.raises(RunError, match="not written by srum export: it lacks regions"):
        read_export(tmp_path / "other.parquet", tmp_path / "other")


def test_a_chain_comes_back(folder: Path, tmp_path: Path) -> None:
    chain = shutil.copytree(folder, tmp_path / "chain")
    path = chain / "round-000/candidates.jsonl"
    first, second, *others = read_records(path, Candidate)
    context = [ContextPart(kind="text", text="again"), ContextPart(kind="seen", candidate_id=first.id)]
    write_records(path, [first, second.model_copy(update={"parent": first.id, "context": context}), *others])
    write_export(open_run(chain), tmp_path / "chain.parquet")
    assert contents(read_export(tmp_path / "chain.parquet", tmp_path / "back").folder) == contents(chain)
