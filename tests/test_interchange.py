"""The authors' JSON lines: there and back, and what is wrong with a line is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from srum import open_run
from srum.evaluation.released import GLOBAL_ENTRY, reference_record
from srum.exchange.interchange import import_round, read_lines, write_lines
from srum.models.pixels import crop_box, cropped
from srum.records import Candidate, Failure, Grounding, Judgement, Prompt
from srum.run_dir import RunError, read_records
from srum.stages.reward_map import Skipped, rasterize
from tests.fakes import FakeModel, run_on_fakes

GOOD: dict[str, Any] = {
    "prompt": "a cat",
    "bad_image_file": "a.png",
    "good_image_file": "a.png",
    "vlm_rewards": [
        {"object": "global_layout_reward", "bbox": [0, 0, 0, 0], "score": 0.0, "reason": "neutral"},
        {"object": "a cat", "bbox": [4, 2, 12, 10], "score": -0.5},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on_fakes(tmp_path_factory.mktemp("interchange") / "run")


def entry(**changes: Any) -> dict[str, Any]:
    return GOOD | {"vlm_rewards": [GOOD["vlm_rewards"][0], GOOD["vlm_rewards"][1] | changes]}


def imported(folder: Path) -> tuple[list[Candidate], list[Grounding], list[Judgement]]:
    kinds = {"candidates": Candidate, "regions": Grounding, "judgements": Judgement}
    return tuple(read_records(folder / f"{name}.jsonl", kind) for name, kind in kinds.items())  # type: ignore[return-value]


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_there_and_back_the_maps_are_those_of_boxes_without_background(folder: Path, tmp_path: Path) -> None:
    run = open_run(folder)
    written, left_out = write_lines(run, tmp_path / "lines.jsonl")
    assert written > 0 < left_out and written + left_out == 24
    count, problems = import_round(tmp_path / "lines.jsonl", folder, FakeModel(), tmp_path / "round-000")
    assert (count, problems) == (written, [])
    ours = [view for view in run.candidates() if view.judgement is not None and view.judgement.layout.score is not None]
    names = [json.loads(line)["bad_image_file"] for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    by_name = {f"{view.folder.name}/{view.record.image}": view for view in ours}
    for name, *records in zip(names, *imported(tmp_path / "round-000"), strict=True):
        view = by_name[name]
        assert records[0].prompt == view.record.prompt and records[0].size == view.record.size
        rules = {"shape": "box", "background": "neutral", "on_failure": "keep"}
        before, after = (
            rasterize(*own, (8, 8), **rules)  # type: ignore[arg-type]
            for own in ((view.record, view.grounding, view.judgement), records)
        )
        if isinstance(before, Skipped) or isinstance(after, Skipped):
            assert before == after
        else:
            assert np.array_equal(before[0], after[0]) and before[1] == after[1]


def test_the_written_lines_are_the_authors_own(folder: Path, tmp_path: Path) -> None:
    """A judgement converted by the released code's rules is the line that we write."""
    write_lines(open_run(folder), tmp_path / "lines.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    for line in lines:
        layout, *regions = line["vlm_rewards"]
        judged = {
            "image_file": line["bad_image_file"],
            "vlm_rewards": [{**r, "identified_object": r["object"]} for r in regions],
            "global_layout_reward": {"global_layout_score": layout["score"], "reason": layout["reason"]},
        }
        expected = reference_record(judged, {line["bad_image_file"]: line["prompt"]})
        without_reasons = [{k: v for k, v in r.items() if k != "reason"} for r in regions]
        assert expected is None or expected == line | {"vlm_rewards": [layout, *without_reasons]}


def test_an_import_is_a_round(tmp_path: Path) -> None:
    """The image of 37x20 px becomes one of 32x16, and its boxes move along; what lies outside is cut or left out."""
    Image.effect_noise((37, 20), 50).convert("RGB").save(tmp_path / "a.png")
    outside = {"object": "far", "bbox": [40, 2, 50, 10], "score": 1.0}
    over = {"object": "over the edge", "bbox": [18.5, 10, 74, 40], "score": 1.0, "reason": "so", "mood": "fine"}
    second = GOOD | {"prompt": "a dog", "vlm_rewards": [outside, over]}
    path = write(tmp_path / "l.jsonl", GOOD, "", second, GOOD | {"tag": 1})
    assert import_round(path, tmp_path, FakeModel(), tmp_path / "round") == (3, [])
    candidates, groundings, judgements = imported(tmp_path / "round")
    assert [(c.id, c.prompt_id, c.index, c.size) for c in candidates] == [
        ("line-000001", "line-000001", 0, (16, 32)),
        ("line-000003", "line-000003", 0, (16, 32)),
        ("line-000004", "line-000001", 1, (16, 32)),
    ]
    assert [prompt.text for prompt in read_records(tmp_path / "round/prompts.jsonl", Prompt)] == ["a cat", "a dog"]
    (latent,) = load_file(tmp_path / "round" / candidates[0].latent).values()
    assert latent.shape == (3, 2, 4) and Image.open(tmp_path / "round" / candidates[0].image).size == (32, 16)
    assert groundings[0].regions[0].box == pytest.approx((4 * 32 / 37, 1.6, 12 * 32 / 37, 8.0))
    assert [(r.label, r.box) for r in groundings[1].regions] == [("over the edge", (16, 8, 32, 16))]
    assert [(s.region_id, s.score, s.reason) for s in judgements[1].regions] == [(1, 1.0, "so")]
    assert (judgements[0].layout.score, judgements[0].layout.reason) == (0.0, "neutral")
    assert judgements[1].layout.failure is Failure.NO_SCORE
    again = {path: path.read_bytes() for path in (tmp_path / "round").rglob("*.*") if path.is_file()}
    assert import_round(path, tmp_path, FakeModel(), tmp_path / "round") == (3, [])
    assert again == {path: path.read_bytes() for path in again}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ("3", "the line: Input should be a valid dictionary"),
        ({"prompt": "a"}, "bad_image_file: Field required"),
        (GOOD | {"prompt": ""}, "prompt: String should have at least 1 character"),
        (GOOD | {"good_image_file": "b.png"}, "good_image_file: 'b.png' is another image"),
        (GOOD | {"vlm_rewards": {}}, "vlm_rewards: Input should be a valid list"),
        (entry(score=1.7), "vlm_rewards.1.score: Input should be less than or equal to 1, got 1.7"),
        (entry(score=float("nan")), "vlm_rewards.1.score: "),
        (entry(score="high"), "vlm_rewards.1.score: "),
        (entry(score=None), "vlm_rewards.1.score: "),
        (entry(bbox=[4, 2, 4, 10]), "vlm_rewards.1.bbox: (4.0, 2.0, 4.0, 10.0) is empty or inverted"),
        (entry(bbox=[4, 2, 12]), "vlm_rewards.1.bbox.3: Field required"),
        (entry(bbox=[4, 2, 12, float("inf")]), "vlm_rewards.1.bbox.3: "),
        (entry(object=7), "vlm_rewards.1.object: "),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: Any, message: str) -> None:
    lines, (problem,) = read_lines(write(tmp_path / "l.jsonl", GOOD, line, GOOD))
    assert list(lines) == [1, 3]
    assert problem.startswith(f"{tmp_path}/l.jsonl:2: {message}") and "\n" not in problem and len(problem) < 400


def test_a_bad_image_leaves_its_line_out(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    files = ["a.png", "gone.png", "text.png", "../a.png", "/etc/hostname"]
    lines = [GOOD | {"bad_image_file": name, "good_image_file": name} for name in files]
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "text.png"):
        (tmp_path / name).rename(images / name)
    count, problems = import_round(write(tmp_path / "l.jsonl", *lines), images, FakeModel(), tmp_path / "round")
    assert count == 1
    expected = ["gone.png is not a readable image", "text.png is not a readable image", "'../a.png' is not in", "'/etc"]
    for number, (problem, part) in enumerate(zip(problems, expected, strict=True), start=2):
        assert problem.startswith(f"{tmp_path}/l.jsonl:{number}: bad_image_file: ") and part in problem
    assert import_round(tmp_path / "l.jsonl", images, FakeModel(), tmp_path / "round") == (1, problems)
    Image.new("RGB", (16, 16)).save(images / "gone.png")
    count, problems = import_round(tmp_path / "l.jsonl", images, FakeModel(), tmp_path / "round")
    assert count == 1 and "'gone.png' could not be read when the round was made" in problems[0]


def test_images_of_a_snapshot_of_the_hub_are_imported_and_links_elsewhere_are_not(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--me--judged"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots/0a1b").mkdir(parents=True)
    for place in (repository / "blobs/9f", tmp_path / "private"):
        Image.new("RGB", (16, 16)).save(place, format="png")
    (repository / "snapshots/0a1b/a.png").symlink_to("../../blobs/9f")
    (repository / "snapshots/0a1b/b.png").symlink_to(tmp_path / "private")
    lines = [GOOD | {"bad_image_file": name, "good_image_file": name} for name in ("a.png", "b.png", "a\0.png")]
    path = write(tmp_path / "l.jsonl", *lines)
    count, problems = import_round(path, repository / "snapshots/0a1b", FakeModel(), tmp_path / "round")
    assert count == 1 and "'b.png' is not in" in problems[0] and "is not in" in problems[1]
    assert [candidate.id for candidate in imported(tmp_path / "round")[0]] == ["line-000001"]


@pytest.mark.parametrize("other", ["image", "score", "folder", "rollout"])
def test_a_round_of_the_same_prompts_is_not_joined(tmp_path: Path, other: str) -> None:
    """The same prompts from other lines, from other images, or of a rollout: nothing in the round changes."""
    for name in ("here/a.png", "here/b.png", "there/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.effect_noise((16, 16), 50).convert("RGB").save(tmp_path / name)
    path, images, round_ = write(tmp_path / "l.jsonl", GOOD), tmp_path / "here", tmp_path / "round"
    import_round(path, images, FakeModel(), round_)
    before = {file: file.read_bytes() for file in round_.rglob("*.*")}
    match other:
        case "image":
            write(path, GOOD | {"bad_image_file": "b.png", "good_image_file": "b.png"})
        case "score":
            write(path, entry(score=1.0))
        case "folder":
            images = tmp_path / "there"
        case "rollout":
            before.pop(round_ / "imported.json")
            (round_ / "imported.json").unlink()
    with pytest.raises(RunError, match="holds another round"):
        import_round(path, images, FakeModel(), round_)
    assert {file: file.read_bytes() for file in round_.rglob("*.*")} == before


def test_files_without_a_usable_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"l.jsonl: no line that can be used; .*l.jsonl:1: not JSON"):
        import_round(write(tmp_path / "l.jsonl", "x"), tmp_path, FakeModel(), tmp_path / "round")
    with pytest.raises(RunError, match="cannot read"):
        read_lines(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="cannot read"):
        read_lines(tmp_path / "b.jsonl")
    assert not (tmp_path / "round").exists()


class MiddleSquare(FakeModel):
    """Encodes the middle square of an image alone."""

    abilities = FakeModel.abilities | {"frames"}

    def resized(self, image: Image.Image) -> Image.Image:
        return cropped(image, 64)

    def crop_box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        return crop_box(size)


def test_boxes_move_along_with_the_part_that_is_encoded(tmp_path: Path) -> None:
    """Of an image of 64x128 the middle square of 64 is kept: 32 pixels to the left go."""
    Image.new("RGB", (128, 64)).save(tmp_path / "a.png")
    entries = [
        {"object": "cup", "bbox": box, "score": 0.5, "reason": "so"} for box in ([40, 8, 60, 24], [0, 0, 30, 30])
    ]
    layout = {"object": GLOBAL_ENTRY, "bbox": [0, 0, 0, 0], "score": 0.5, "reason": "so"}
    line = {"prompt": "a cup", "bad_image_file": "a.png", "good_image_file": "a.png", "vlm_rewards": [layout, *entries]}
    (tmp_path / "lines.jsonl").write_text(json.dumps(line) + "\n")
    import_round(tmp_path / "lines.jsonl", tmp_path, MiddleSquare(), tmp_path / "round")
    (grounding,) = read_records(tmp_path / "round" / "regions.jsonl", Grounding)
    assert [region.box for region in grounding.regions] == [(8, 8, 28, 24)]
