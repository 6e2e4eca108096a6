"""The report of a small synthetic run: everything in it, escaped, self-contained, and never an exception."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

from srum.records import Candidate, Failure, Grounding, Judgement, LayoutJudgement, Region, RegionJudgement, RewardMap
from srum.report import write_report
from srum.run_dir import write_json, write_records, write_text

ARMS = ("base", "sft", "srum_paper", "srum")
CATEGORIES = ("single_object", "counting", "color_attr")
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Wellformed(HTMLParser):
    """Fails on a tag that is closed out of order; collects what a browser would load, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: Path) -> Wellformed:
    parser = Wellformed()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def picture(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (64, 64), "#d8d8d8")
    ImageDraw.Draw(image).ellipse((8, 10, 26, 28), fill=colour)
    ImageDraw.Draw(image).rectangle((36, 34, 54, 52), fill="#2b6cb0")
    image.save(path)


def write_round(folder: Path, prompts: int = 2) -> list[str]:
    """A round with two candidates for each prompt: one judged, one on which grounding and judge failed."""
    candidates, groundings, judgements, rewards = [], [], [], []
    for number in range(2 * prompts):
        name, failed = f"train-{number // 2:04d}-{number % 2}", number % 2 == 1
        picture(folder / f"images/{name}.png", "#c53030")
        prompt = f"a photo of a red circle above a blue square & <b>{number // 2}</b>"
        files = {"image": f"images/{name}.png", "latent": f"latents/{name}.safetensors"}
        owner = {"prompt_id": f"train-{number // 2:04d}", "prompt": prompt}
        candidates.append(Candidate(id=name, **owner, index=number % 2, seed=number, size=(64, 64), **files))
        boxes = [] if failed else [(7.0, 9.0, 27.0, 29.0), (35.0, 33.0, 55.0, 53.0)]
        regions = [Region(id=i, box=box, area=400, source="classical") for i, box in enumerate(boxes, start=1)]
        groundings.append(Grounding(candidate_id=name, regions=regions))
        judgements.append(judged(name, failed))
        if not failed:
            save_file({"reward": reward()}, folder_of(folder / f"rewards/{name}.safetensors"))
            values = f"rewards/{name}.safetensors"
            facts = {"grid": (8, 8), "mapping": "signed", "alpha": 0.6, "sample_score": -0.75}
            rewards.append(RewardMap(candidate_id=name, values=values, **facts))
    for stage, records in {
        "candidates": candidates,
        "regions": groundings,
        "judgements": judgements,
        "rewards": rewards,
    }.items():
        write_records(folder / f"{stage}.jsonl", records)
    write_json(folder / "counts.json", {"candidates": 2 * prompts, "failures": {"no_score": prompts}})
    return [candidate.id for candidate in candidates]


def judged(name: str, failed: bool) -> Judgement:
    if failed:
        return Judgement(
            candidate_id=name, regions=[], layout=LayoutJudgement(score=None, failure=Failure.NO_SCORE, raw="dunno <i>")
        )
    regions = [
        RegionJudgement(region_id=0, score=0.1, reason="nothing else is there"),
        RegionJudgement(region_id=1, score=0.9, label="red circle", reason="round and red, as the prompt asks"),
        RegionJudgement(region_id=2, score=-0.75, label="blue square", reason="<script>alert('wrong')</script>"),
    ]
    return Judgement(candidate_id=name, regions=regions, layout=LayoutJudgement(score=0.2, reason="plausible"))


def reward() -> np.ndarray:
    values = np.full((8, 8), 0.1, dtype=np.float32)
    values[1:4, 1:4], values[4:7, 4:7] = 0.9, -0.75
    return values


def folder_of(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_arms(run: Path, folder: Path, n: int) -> None:
    """The evaluation of every arm on ``n`` prompts in ``folder``, and the metrics of their training."""
    for place, arm in enumerate(ARMS):
        lines = []
        for number in range(n):
            correct = number % 4 <= place
            prompt_id = f"held-out-{number:04d}"
            picture(folder / f"{arm}/images/{prompt_id}.png", "#c53030" if correct else "#2f855a")
            verdict = {"prompt_id": prompt_id, "prompt": f"a photo of {number} red circles", "correct": correct}
            reasons = [] if correct else ["expected red, found green"]
            lines.append({"schema": 1} | verdict | {"category": CATEGORIES[number % 3], "reasons": reasons})
        write_text(folder / f"{arm}/verdicts.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        for index in range(2) if arm != "base" else ():
            rows = [{"step": step, "loss": 1 / step, "grad_norm": 1.0, "lr": 1e-4} for step in range(1, 40)]
            write_text(
                run / f"round-{index:03d}/train/{arm}/metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
            )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    write_text(folder / "config.yaml", "model: srum-tiny\nrounds: 2\n")
    write_round(folder / "round-000")
    write_round(folder / "round-001")
    write_arms(folder, folder / "eval", 24)
    write_text(folder / "command.txt", "srum run --out demo\n")
    write_json(folder / "timings.json", {"round-000/rollout": 12.345, "round-000/judge": 3.0})
    return folder


def test_everything_is_in_the_page(run: Path) -> None:
    page = parse(write_report(run))
    for arm in ARMS:
        assert arm in page.text
    for category in CATEGORIES:
        assert category.replace("_", " ") in page.text
    for line in (run / "round-001/candidates.jsonl").read_text().splitlines():
        assert json.loads(line)["id"] in page.text
    assert "model: srum-tiny" in page.text and "srum run --out demo" in page.text
    assert "round-000/rollout" in page.text and "12.3" in page.text
    assert "failures / no_score" in page.text
    assert "round and red, as the prompt asks" in page.text and "-0.75" in page.text
    assert "no region found" in page.text and "layout: no_score, reply: dunno <i>" in page.text


def test_the_table_says_what_the_verdicts_say(run: Path) -> None:
    """Of every 4 prompts the arms get 1, 2, 3 and 4 right, so base has 25 %, srum 100 %, 18 of 24 fixed."""
    text = " ".join(parse(write_report(run)).text.split())
    assert re.search(r"base 25\.0\s?12\.0 to 44\.9", text)
    assert re.search(r"srum 100\.0\s?86\.2 to 100\.0 \+75\.0 \+58\.3 to \+91\.7", text)
    assert "18 held-out prompts went from wrong to right, 0 from right to wrong, of 24" in text


def test_evaluations_of_single_rounds_become_a_chart(run: Path) -> None:
    assert "round by round" not in write_report(run).read_text()
    write_arms(run, run / "round-000/eval", 24)
    text = parse(write_report(run)).text
    assert "round by round" in text and "rounds of training" in text


def test_text_of_prompts_and_judges_is_escaped(run: Path) -> None:
    text = write_report(run).read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "<b>0</b>" not in text and "&amp; &lt;b&gt;0&lt;/b&gt;" in text


def test_nothing_is_loaded_from_elsewhere(run: Path) -> None:
    path = write_report(run)
    assert all(link.startswith(("data:image/", "#")) for link in parse(path).links)
    assert "http" not in path.read_text()


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    text = parse(write_report(tmp_path)).text
    for missing in ("No result yet", "No pair of evaluated images", "No training step", "No timings", "No candidate"):
        assert missing in text


@pytest.mark.parametrize("missing", ["rewards", "judgements", "regions"])
def test_a_round_that_stopped_between_stages(run: Path, missing: str) -> None:
    stages = ["regions", "judgements", "rewards"]
    for stage in stages[stages.index(missing) :]:
        (run / f"round-001/{stage}.jsonl").unlink()
    said = {"rewards": "no reward map", "judgements": "judge: not done yet", "regions": "grounding: not done yet"}
    assert said[missing] in parse(write_report(run)).text


def test_a_metrics_line_that_is_being_written_is_left_out(run: Path) -> None:
    with (run / "round-001/train/srum/metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    assert "loss" in parse(write_report(run)).text
