"""What readers copy from the README and docs/extending.md works: the grounder, the commands, the picture."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from srum import models, open_run
from srum.cli import app
from srum.grounding.base import ground, load_grounder
from srum.shapes.render import render
from srum.shapes.scenes import Scene, Thing
from tests.fakes import FakeModel, run_on_fakes

ROOT = Path(__file__).parents[1]
TEXT = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/extending.md"))

GENERATED = ("reference/config.md", "reference/commands.md")  # by docs/site_pages.py, when the site is built


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


def test_the_grounder_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in blocks("python") if "class MyGrounder" in block)
    (tmp_path / "my_module.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    grounder = load_grounder("my_module:MyGrounder", FakeModel())
    things = (Thing("circle", "red", "large", 0, 1), Thing("square", "blue", "small", 2, 3))
    ((regions, error),) = ground(grounder, [Image.fromarray(render(Scene(things)))], ["two things"], max_regions=8)
    monkeypatch.delitem(sys.modules, "my_module")
    assert error is None
    assert [(region.id, region.source) for region in regions] == [(1, "mine"), (2, "mine"), (0, "background")]
    for region, thing in zip(regions, things, strict=False):  # the larger one first
        assert np.allclose(region.box, thing.box, atol=1.0)


def test_a_model_of_your_own_runs_through_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy of docs/extending.md, of under 80 lines, by the command below it; then its trained weights."""
    (code,) = (block for block in blocks("python") if "class Toy" in block)
    (command,) = (line for block in blocks("sh") for line in block.splitlines() if "toy:Toy" in line)
    assert len(code.splitlines()) < 80
    (tmp_path / "toy.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    small = ["prompt_count=4", "candidates_per_prompt=2", "rounds=2", "train.steps=3", "train.probes=1", "eval.count=7"]
    run = CliRunner().invoke(app, [*shlex.split(command)[1:], *(part for s in small for part in ("--set", s))])
    assert run.exit_code == 0, run.output
    assert set(open_run("runs/toy").verdicts()) == {"base", "sft", "srum", "region_nft"}
    assert Path("runs/toy/report.html").is_file()
    trained = models.load("runs/toy/round-001/train/region_nft/model")
    assert type(trained).__name__ == "Toy" and not torch.equal(
        trained.network.draws[0].weight, models.load("toy:Toy").network.draws[0].weight
    )
    doctor = CliRunner().invoke(app, ["doctor", "runs/toy/round-001/train/region_nft/model"])
    assert doctor.exit_code == 2 and "which the doctor asks: describe, memory, training_memory" in doctor.output
    planned = CliRunner().invoke(app, ["rollout", "runs/plan", "--set", "model=toy:Toy", "--set", "rollout.plan=true"])
    assert planned.exit_code == 2 and "needs a model with the ability plan: Toy has none" in planned.output
    none = CliRunner().invoke(app, ["rollout", "runs/none", "--set", "model=toy:Other"])
    assert none.exit_code == 2 and "model 'toy:Other': toy has no 'Other'" in none.output
    monkeypatch.delitem(sys.modules, "toy")


PARTS = {"class Colourful": "my_judges", "def warm": "my_rewards", "class Best": "my_methods"}  # of docs/extending.md


@pytest.mark.parametrize("mark", PARTS)
def test_judges_rewards_and_methods_of_your_own_run_through_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    """Each by the command below it, on the fake model, to a report that shows it."""
    (code,) = (block for block in blocks("python") if mark in block)
    (command,) = (line for block in blocks("sh") for line in block.splitlines() if f"{PARTS[mark]}:" in line)
    (tmp_path / f"{PARTS[mark]}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", FakeModel.load)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, PARTS[mark], raising=False)
    small = ["prompt_count=6", "candidates_per_prompt=3", "rounds=1", "train.steps=4", "eval.count=7"]
    small += ["threshold=-1"] if mark == "class Best" else []  # the fake's scores are low
    run = CliRunner().invoke(app, [*shlex.split(command)[1:], *(part for s in small for part in ("--set", s))])
    assert run.exit_code == 0, run.output
    folder = Path(shlex.split(command)[3])
    last = "best" if mark == "class Best" else "region_nft"
    assert list(json.loads((folder / "summary.json").read_text())) == ["base", "sft", "srum", last]
    report = (folder / "report.html").read_text()
    assert PARTS[mark] in report
    assert mark != "class Best" or ("#cc79a7" in report and "filtered SFT" in report)  # its colour and label
    monkeypatch.delitem(sys.modules, PARTS[mark])


def test_the_looking_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_on_fakes(Path("runs/mine"))
    (code,) = (block for block in blocks("python") if "open_run" in block)
    exec(code, {})
    assert (tmp_path / "blamed.png").stat().st_size > 10_000


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines() if "srum " in line])
def test_the_commands_of_the_readme_exist(line: str) -> None:
    program, name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert program == "srum"
    command.make_context(name, arguments)  # parses, and refuses what there is not


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.M):
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_files_that_the_documents_name_exist() -> None:
    folders = "srum|grounding|judging|train|tests|benchmarks|configs|docs|golden|papers"
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = document.read_text(encoding="utf-8")
        named = re.findall(rf"`((?:{folders})/[\w./-]*(?:\.\w+|/))`", text)
        linked = [link for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", text) if "://" not in link]
        linked = [link for link in linked if link not in GENERATED]
        missing = [name for name in named if not (ROOT / name).exists()]
        missing += [link for link in linked if not (document.parent / link.partition("#")[0]).exists()]
        assert not missing, document.name
        outside = [link for link in linked if document.name != "README.md" and not _is_inside(document, link)]
        assert not outside, f"{document.name}: the site has no page of {outside}"


def _is_inside(document: Path, link: str) -> bool:
    return (document.parent / link.partition("#")[0]).resolve().is_relative_to(ROOT / "docs")


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w./-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert named - set(GENERATED) == pages


def test_the_pictures_are_drawn_from_a_run(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "make_pictures.py")
    assert spec is not None and spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    run_on_fakes(tmp_path / "run")
    run = open_run(tmp_path / "run")
    wrong = [c for c in run.candidates(0) if c.reward and pictures.has_wrong(c)]
    chosen = pictures.choose(run, 0, None)
    assert chosen.id == max(wrong, key=lambda c: float(c.reward_map().std())).id  # type: ignore[union-attr]
    assert pictures.choose(run, 0, "train-0000-0").id == "train-0000-0"
    pictures.draw_reward_map(chosen, tmp_path / "a.png")
    prompt = run.verdicts()["base"][0].prompt_id
    assert pictures.draw_loop(run, chosen, prompt, tmp_path / "loop.png") == prompt
    pictures.draw_gallery(run, 0, tmp_path / "gallery.png")
    lab = {what: {"what": what, "mean": 50.0, "interval": [45.0, 55.0]} for what in ("base", "sft, 1", "sft, 3")}
    (tmp_path / "lab.json").write_text(json.dumps({"own": list(lab.values())}))
    pictures.draw_objectives(tmp_path / "lab.json", tmp_path / "objectives.png")
    for arm in ("base", "sft", "srum", "region_nft"):
        means = tmp_path / f"seed-0/lab/steps/{arm}/means.json"
        means.parent.mkdir(parents=True)
        means.write_text(json.dumps([{"t": t, "layout": -t, "detail": 1 - t, "correct": 1 - t} for t in (1.0, 0.5)]))
    pictures.draw_steps(tmp_path, tmp_path / "steps.png")
    for name in ("a.png", "loop.png", "objectives.png", "steps.png"):
        with Image.open(tmp_path / name) as drawn:
            assert drawn.width > drawn.height > 300
    with Image.open(tmp_path / "gallery.png") as drawn:
        assert min(drawn.size) > 150
