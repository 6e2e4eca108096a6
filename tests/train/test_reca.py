"""RecA: pictures of any source, templates, the layout of its examples, and a run."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srum import models
from srum.config import ConfigError, ImagesConfig, changed, load_config
from srum.images import ImageError, open_image
from srum.loop import run_loop
from srum.models.bagel import Bagel
from srum.models.base import MissingAbility, Segment
from srum.records import Picture
from srum.run import Run
from srum.run_dir import RunError, claim_run, read_records
from srum.stages.pictures import blurred, from_bytes, read_entries
from srum.train.examples import Example
from srum.train.methods.reca import FAR, SEEN, TOLD, Reca, RecaConfig, TemplateError, read_templates, told
from srum.train.packs import opened, worded
from srum.train.reconstructing import reconstruct_images
from tests.fakes import FakeModel

GOLDEN = Path(__file__).parents[1] / "golden" / "bagel" / "checkpoint"
SMALL = ["method=reca", "compare=[]", "rounds=1", "eval.count=7", "train.steps=2", "train.batch_size=4"]


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="png")
    return data.getvalue()


def pixels_of(source: Path | str, **values: str) -> list[bytes]:
    return [entry.open().tobytes() for entry in read_entries(ImagesConfig(source=str(source), **values))]


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [picture(seed) for seed in range(3)]


def folder_of(path: Path, pictures: list[Image.Image]) -> Path:
    for number, image in enumerate(pictures):
        place = path / ("deep" if number else ".") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place)
    return path


# --- sources


def test_every_source_gives_the_same_pictures(tmp_path: Path, pictures: list[Image.Image]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    folder = folder_of(tmp_path / "folder", pictures)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, image in enumerate(pictures):
            for name, data in ((f"{number}.png", encoded(image)), (f"{number}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    rows = [{"image": {"bytes": encoded(image), "path": None}} for image in pictures]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    lines = [{"image": f"folder/{'deep/' if number else ''}{number}.png", "of": "\u2028"} for number in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    wanted = [image.tobytes() for image in pictures]
    for source in (folder, tmp_path / "a.tar", tmp_path / "a.parquet", tmp_path / "a.jsonl"):
        assert pixels_of(source) == wanted
    assert sorted(pixels_of(tmp_path / "folder/**/*.png")) == sorted(wanted)


def test_pictures_in_archives_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    """As those in folders are."""
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(data, "png", exif=exif)
    (tmp_path / "x.png").write_bytes(data.getvalue())
    assert from_bytes(data.getvalue(), "x").size == open_image(tmp_path / "x.png").size == (2, 4)


def test_transparent_pictures_lie_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert pixels_of(tmp_path) == [bytes([255] * 48)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "'nowhere' is no image, folder or pattern of images"),
        ("bad.tar", "bad.tar cannot be read as an uncompressed tar"),
        ("bad.jsonl", "bad.jsonl:1: expected the path of an image in 'image' (images.column)"),
        ("latin.jsonl", "latin.jsonl:2: not JSON in UTF-8"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.tar").write_bytes(b"no archive at all")
    (tmp_path / "bad.jsonl").write_text('{"picture": "a.png"}\n')
    (tmp_path / "latin.jsonl").write_bytes(b'\n{"image": "\xe9.png"}\n')
    with pytest.raises(RunError) as raised:
        list(read_entries(ImagesConfig(source=source)))
    assert message in str(raised.value)


def test_what_cannot_be_read_is_an_image_error(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    (entry,) = read_entries(ImagesConfig(source=str(tmp_path)))
    with pytest.raises(ImageError, match=r"broken\.png"):
        entry.open()


def test_blurring_keeps_size_and_loses_detail() -> None:
    image = picture(0, (32, 32))
    small = blurred(image, 8)
    assert small.size == image.size
    assert np.asarray(small, dtype=float).std() < np.asarray(image, dtype=float).std() / 2


# --- the stage


def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Run:
    monkeypatch.setattr(models, "load", FakeModel.load)
    config = load_config(None, [*SMALL, *overrides])
    claim_run(tmp_path / "run", config)
    return Run(tmp_path / "run", config)


def test_broken_pictures_are_counted_and_others_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: list[Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture twice: its latent is encoded once."""
    from srum.stages.pictures import images_stage

    folder_of(tmp_path / "data", [*pictures, pictures[0]])
    (tmp_path / "data/broken.png").write_bytes(b"no image")
    run = staged(tmp_path, monkeypatch, f"images.source={tmp_path / 'data'}")
    images_stage(run, 0)
    made = read_records(run.round(0) / "pictures.jsonl", Picture)
    assert [one.failure is None for one in made] == [True, False, True, True, True] or len(made) == 5
    assert sum(one.failure is not None for one in made) == 1
    assert "4 pictures" in capsys.readouterr().out
    assert len(list((run.folder / "latent_cache").glob("*.safetensors"))) == 3
    before = {path: path.stat().st_mtime_ns for path in run.round(0).rglob("*") if path.is_file()}
    images_stage(run, 0)
    assert {path: path.stat().st_mtime_ns for path in run.round(0).rglob("*") if path.is_file()} == before


def test_nothing_readable_is_an_error_and_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from srum.stages.pictures import images_stage

    (tmp_path / "data").mkdir()
    (tmp_path / "data/broken.png").write_bytes(b"no image")
    run = staged(tmp_path, monkeypatch, f"images.source={tmp_path / 'data'}")
    with pytest.raises(RunError, match="none of 1 images can be read"):
        images_stage(run, 0)
    picture(0).save(tmp_path / "data/broken.png")
    images_stage(run, 0)
    assert len(read_records(run.round(0) / "pictures.jsonl", Picture)) == 1


@pytest.mark.parametrize("source", ["rendered", "candidates", "good"])
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)
    monkeypatch.setattr("srum.stages.pictures.GOOD", -0.5)  # the fake's judge is a random one
    sizes = ["images.count=6", "prompt_count=12", "candidates_per_prompt=2", "reward.on_failure=keep"]
    run_loop(load_config(None, [*SMALL, *sizes, f"images.source={source}"]), tmp_path / "run")
    assert (tmp_path / "run/round-000/train/reca/model").is_dir()
    assert list(json.loads((tmp_path / "run/round-000/train/reca/compared.json").read_text())) == [SEEN, TOLD]
    assert (tmp_path / "run/round-000/candidates.jsonl").exists() == (source != "rendered")
    if source == "candidates":
        holding = [f"images.source={source}", "train.validation.share=0.5", "mix=[1,1,0]"]
        config = load_config(None, [*SMALL, *sizes, *holding])
        mix = Reca().examples(Run(tmp_path / "run", config), 0, config)  # type: ignore[arg-type]
        held = {example.group for example in mix.held_out}
        learned = {example.group for part in mix.parts for example in part.examples}
        assert held and learned and not held & learned


def test_a_model_that_sees_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(FakeModel):
        abilities = frozenset({"plan", "path", "train"})

    monkeypatch.setattr(models, "load", Blind.load)
    with pytest.raises(MissingAbility, match="method reca needs a model with the ability seen"):
        run_loop(load_config(None, SMALL), tmp_path / "run")
    assert not (tmp_path / "run/config.yaml").exists()


# --- examples


def test_the_shipped_templates_are_distinct_and_enough() -> None:
    full, tiny = read_templates("full"), read_templates("tiny")
    assert len(full) >= 60 and len(set(full)) == len(full) and len(tiny) >= 8
    assert sum(text.endswith("?") for text in full) >= 15
    assert all("{" not in text and 3 <= len(text.split()) <= 35 for text in full)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo\n\n one \n", "t.txt:4 repeats line 1"),
        (b"\n \n", "t.txt has none"),
        (b"\xff\n", "t.txt is not UTF-8 at byte 0"),
        (None, "cannot read"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(TemplateError, match=message):
        read_templates(str(tmp_path / "t.txt"))


def test_a_template_is_drawn_at_every_visit() -> None:
    """By seed, epoch and id: the same again, and over the epochs all of them."""
    texts = ["one", "two", "three"]
    example = Example(id="x", segments=[Segment("text", texts=texts)])
    drawn = [worded(example, 7, epoch).segments[0].text for epoch in range(40)]
    assert set(drawn) == set(texts)
    assert drawn == [worded(example, 7, epoch).segments[0].text for epoch in range(40)]
    assert worded(example).segments[0].text == "one"


def test_a_side_is_what_understanding_sees() -> None:
    """max = min = 42: a 57x131 image becomes 14x42, one row of three patches; the reference's rule (spec, 2)."""
    model = Bagel.load(GOLDEN)
    wide = picture(1, (57, 131))
    seen = Segment("seen", image=wide, side=42)
    assert model.length([seen]) == 1 * 3 + 2
    assert model.length([replace(seen, side=None)]) > 5
    with pytest.raises(ValueError, match="43 pixels: that is no multiple of the patch, 14"):
        model.length([replace(seen, side=43)])


def test_what_is_seen_helps_a_model_that_draws_what_it_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """srum-tiny reconstructs: its loss with the image is less than half of that with the template alone."""
    config = load_config(None, [*SMALL, "images.count=4", "train.steps=1", "train.batch_size=2", "eval.count=0"])
    run_loop(config, tmp_path / "run")
    losses = json.loads((tmp_path / "run/round-000/train/reca/compared.json").read_text())
    assert 0 < losses[SEEN] < losses[TOLD] / 2
    out = " ".join(capsys.readouterr().out.split())
    assert f"loss {losses[SEEN]:.3f} with what is seen" in out and "warning" not in out


def test_a_hindrance_is_warned_of() -> None:
    assert "warning" in Reca().remark({SEEN: 1.01 * FAR, TOLD: 1.0})
    assert "warning" not in Reca().remark({SEEN: 0.99 * FAR, TOLD: 1.0})


def test_the_text_alone_is_the_prompt_where_there_is_one() -> None:
    """The same id, and so the same noise; what is seen keeps its position and is left out."""
    latent = torch.zeros(3, 2, 2)
    noisy = Segment("noisy", latent=latent, loss=True)
    segments = [Segment("seen", image=picture(0)), Segment("text", texts=["a", "b"], droppable=True), noisy]
    own, other = (told(Example(id=name, segments=segments), {"own": "two red discs"}) for name in ("own", "other"))
    assert [s.dropped for s in own.segments] == [True, False, False] and own.segments[2] is noisy
    assert own.segments[1].text == "two red discs" and other.segments[1] is segments[1]


def test_latents_come_from_files_visit_by_visit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    latent = torch.randn(3, 2, 2)
    save_file({"latent": latent}, tmp_path / "x.safetensors")
    example = Example(id="x", segments=[Segment("noisy", file=tmp_path / "x.safetensors", loss=True)])
    segment = opened(FakeModel(), example).segments[0]
    assert segment.file is None and segment.latent is not None and torch.equal(segment.latent, latent)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mix=[2,1,0]", "mix: train.batch_size=4 is no multiple of 3"),
        ("mix=[2,1,1]", "mix: nothing that reads and writes text is trained unless train.trainable is all"),
        ("seen_size=0", "seen_size"),
        ("mix=[2,1,1] train.trainable=all judge.think=true", "mix: replies are learned with judge.view=boxes"),
        ("rollout.plan=true train.plan_in_context=true", "reca learns from bare prompts"),
        ("train.trainable=all train.replies=2", "train.replies: reca"),
    ],
)
def test_contradictions(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_config(None, [*SMALL, *override.split()])


def test_a_step_has_its_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)
    sizes = ["images.count=6", "prompt_count=12", "candidates_per_prompt=2", "reward.on_failure=keep", "mix=[3,1,0]"]
    config = load_config(None, [*SMALL, *sizes])
    run_loop(config, tmp_path / "run")
    run = Run(tmp_path / "run", config)
    assert isinstance(config, RecaConfig)
    step = Reca().examples(run, 0, config).at(0, seed=0)
    assert [example.id.startswith("rendered") for _, example in step] == [True, True, True, False]


def test_reconstructions_are_not_taken_for_those_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call is finished and draws nothing; other settings in its folder are refused."""
    monkeypatch.setattr(models, "load", FakeModel.load)
    config = load_config(None, ["method=reca", "images.count=5", "images.batch_size=2"])
    line = reconstruct_images(config, tmp_path / "out", None, None)
    assert "5 images reconstructed, 0 could not be read; the same things in the same cells: " in line
    with monkeypatch.context() as patch:
        patch.setattr(FakeModel, "draw", None)
        assert reconstruct_images(config, tmp_path / "out", None, "srum-tiny") == line
    for change in ("refine.guidance=3.0", "seed=1"):
        with pytest.raises(RunError, match="holds work of other settings or weights"):
            reconstruct_images(changed(config, [change]), tmp_path / "out", None, None)
