"""``srum init``: what it makes of answers is a config that loads, and for BAGEL-7B that of the presets."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from srum import models
from srum.cli import app
from srum.config import differing_fields, load_config, parse_config
from srum.init import Answers, commented, launch, settings, usual_side
from srum.plugins import names
from tests.fakes import FakeModel

BAGEL = "ByteDance-Seed/BAGEL-7B-MoT"
CONFIGS = Path(__file__).parents[1] / "configs"


def answers(**named: object) -> Answers:
    given = {"model": BAGEL, "gpus": 1, "prompts": "train", "grounder": "sam", "judge": "self", "judge_model": ""}
    return Answers(**{**given, "method": "region_nft", **named})  # type: ignore[arg-type]


@pytest.mark.parametrize(("gpus", "preset"), [(1, "bagel-7b-lora-1gpu"), (8, "bagel-7b-fsdp")])
def test_a_large_model_has_the_settings_of_its_preset(gpus: int, preset: str) -> None:
    made = parse_config(settings(answers(gpus=gpus), usual_side(BAGEL)))
    assert differing_fields(made, load_config(CONFIGS / f"{preset}.yaml")) == []


@pytest.mark.parametrize("method", names("method"))
def test_every_method_goes_with_every_size(method: str) -> None:
    for gpus, side in ((0, 64), (1, 1024), (8, 1024)):
        parse_config(settings(answers(method=method, gpus=gpus), side))


def test_a_small_model_has_the_defaults() -> None:
    made = parse_config(settings(answers(model="srum-tiny", grounder="classical"), usual_side("srum-tiny")))
    assert made == load_config()


@pytest.mark.parametrize(
    ("judge", "changed"),
    [
        ("start", ["judge.model: self != start"]),
        ("mine:Judge", ["judge.by: self != mine:Judge"]),
        (
            "http://localhost:8000/v1",
            [
                "judge.server.url:  != http://localhost:8000/v1",
                "judge.server.model:  != judge",
                "judge.soft: True != False",
            ],
        ),
    ],
)
def test_judges(judge: str, changed: list[str]) -> None:
    made = settings(answers(model="srum-tiny", grounder="classical", judge=judge, judge_model="judge"), 64)
    assert sorted(differing_fields(load_config(), parse_config(made))) == sorted(changed)


def test_comments_change_nothing_and_stand_beside_every_field(tmp_path: Path) -> None:
    values = settings(answers(), 1024)
    lines = list(commented(values, type(parse_config(values))))
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    assert load_config(tmp_path / "c.yaml") == parse_config(values)
    assert max(map(len, lines)) < 120
    for above, line in zip(["", *lines], lines, strict=False):
        assert "#" in line or line.endswith(":") or above.lstrip().startswith("#"), line


def test_several_gpus_are_launched_by_torchrun() -> None:
    assert launch(Path("a.yaml"), 1) == "srum run --config a.yaml --out runs/a"
    assert launch(Path("a.yaml"), 8).startswith("torchrun --nproc-per-node 8 --no-python srum run ")


def test_it_asks_writes_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is answered wrongly is asked again; what cannot work is not written; nothing is overwritten."""
    monkeypatch.setattr(models, "load", FakeModel.load)
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("# mine\na red circle\n")
    run = CliRunner().invoke
    typed = run(app, ["init", "a.yaml", "--grounder", "grid"], input="\ntwo\n-1\n2\nmine.txt\n\nppo\nsrum\n")
    assert typed.exit_code == 0, typed.output
    assert all(f"{wrong!r} is no whole number" in typed.output for wrong in ("two", "-1"))
    assert "no method 'ppo'" in typed.output and "torchrun --nproc-per-node 2" in typed.output
    made = load_config("a.yaml")
    assert (made.method, made.prompts, made.ground.grounder) == ("srum", "mine.txt", "grid")

    given = ["--model", "srum-tiny", "--gpus", "0", "--judge", "self", "--method", "sft", "--grounder", "grid"]
    for path, prompts, message in (("a.yaml", "train", "a.yaml is there"), ("b.yaml", "no.txt", "cannot read the pro")):
        refused = run(app, ["init", path, *given, "--prompts", prompts])
        assert refused.exit_code == 2 and refused.stderr.startswith(f"error: {message}")
    assert not Path("b.yaml").exists()
