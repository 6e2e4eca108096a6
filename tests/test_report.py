"""The report of a small synthetic run: everything in it, escaped, self-contained, and never an exception."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import save_file
from skimage.data import astronaut

from benchmarks.report import ask, chromium, write_run
from srum.config import load_config
from srum.evaluation.benchmark import Drawn
from srum.json_files import JsonError
from srum.records import (
    Candidate,
    Failure,
    Grounding,
    Judgement,
    LayoutJudgement,
    Prompt,
    Region,
    RegionJudgement,
    RewardMap,
)
from srum.run import Run
from srum.run_dir import RunError, claim_run, write_json, write_records, write_text
from srum.stages.outcomes import count_outcomes
from srum.views import report
from srum.views.report import judge_of, to_come, write_report

ARMS = ("base", "sft", "srum", "region_nft")
CATEGORIES = ("single_object", "counting", "color_attr")
VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028<!-- & ' \""


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


def data(page: Path) -> list[dict[str, Any]]:
    """The candidates by round and prompt, as the page's script reads them."""
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    return json.loads(found)["groups"]


def cards(page: Path, folder: str) -> dict[str, dict[str, Any]]:
    """The candidates of a round by id."""
    return {card["id"]: card for group in data(page) if group["round"] == folder for card in group["candidates"]}


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
    texts = dict.fromkeys((candidate.prompt_id, candidate.prompt) for candidate in candidates)
    for stage, records in {
        "prompts": [Prompt(id=name, text=text, metadata={"tag": "color_attr"}) for name, text in texts],
        "candidates": candidates,
        "regions": groundings,
        "judgements": judgements,
        "rewards": rewards,
    }.items():
        write_records(folder / f"{stage}.jsonl", records)
    write_json(folder / "counts.json", count_outcomes(groundings, judgements, ["layout_failed"] * prompts))
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
    assert "needs JavaScript" in page.text
    assert "model: srum-tiny" in page.text and "srum run --out demo" in page.text
    assert "round-000/rollout" in page.text and "12.3" in page.text
    assert "4 candidates, 2 with a reward map. 2 without one: 2 layout failed. 6 regions judged." in page.text
    assert "No region found on 2 images. Replies about layouts that failed: 2 no score." in page.text


def test_benchmarks_of_the_run_and_prompts_that_training_met_are_in_the_page(run: Path) -> None:
    """The evaluation's prompts all begin with "a photo of", as the two training prompts do; geneval asks for one."""
    folder = run / "bench/geneval/bagel-short"
    asked = [f"a photo of a red circle above a blue square & <b>{n}</b>" for n in (1, 7)]
    drawn = [Drawn(item_id=f"{n}", path=f"{n}.png", prompt=text, seed=0) for n, text in enumerate(asked)]
    write_records(folder / "images.jsonl", drawn)
    ours = {"figures": {"overall": [0.5, 0.25, 0.75]}, "n": 2, "failures": {"no_image": 1}}
    write_json(folder / "table-x.json", {"model": "m<i>", "setting": "bagel", "evaluator": "e 1", "ours": ours})
    page = parse(write_report(run))
    assert (
        "Of 2 training prompts 0 are prompts of the evaluation, 0 more are but for their opening, 2 have its template."
        in page.text
    )
    assert "Of 2 training prompts 1 are prompts of geneval, 0 more" in page.text
    assert "overall 0.5 (0.25 to 0.75)" in page.text and "m<i>" in page.text


def test_every_candidate_of_every_round_is_in_the_data(run: Path) -> None:
    page = write_report(run)
    for folder in ("round-000", "round-001"):
        lines = (run / folder / "candidates.jsonl").read_text().splitlines()
        assert list(cards(page, folder)) == [json.loads(line)["id"] for line in lines]
    assert {(group["category"], group["prompt"][-8:]) for group in data(page)} == {
        ("color_attr", "<b>0</b>"),
        ("color_attr", "<b>1</b>"),
    }
    judged, failed = (cards(page, "round-001")[name] for name in ("train-0000-0", "train-0000-1"))
    assert (judged["score"], judged["layout"], judged["alpha"], judged["grid"]) == (-0.75, 0.2, 0.6, [8, 8])
    assert judged["outcomes"] == ["judged"] and failed["outcomes"] == ["no region", "no_score"]
    assert [(line["name"], line["score"], line.get("box")) for line in judged["lines"]] == [
        ("1 red circle", 0.9, [7.0, 9.0, 27.0, 29.0]),
        ("2 blue square", -0.75, [35.0, 33.0, 55.0, 53.0]),
        ("background", 0.1, None),
        ("layout", 0.2, None),
    ]
    assert [line["text"] for line in failed["lines"]] == ["no region found", "no_score"]
    assert failed["lines"][1]["reply"] == "dunno <i>" and failed["reward"] is None


def test_candidates_without_their_prompts_file_have_no_category(run: Path) -> None:
    for folder in ("round-000", "round-001"):
        (run / folder / "prompts.jsonl").unlink()
    assert {group["category"] for group in data(write_report(run))} == {""}


def test_the_spread_is_from_the_lowest_score_of_a_prompt_to_the_highest(tmp_path: Path) -> None:
    write_run(tmp_path, 16, 64)
    groups = data(write_report(tmp_path))
    assert len(groups) == 4
    for group in groups:
        scores = [card["score"] for card in group["candidates"] if card["score"] is not None]
        assert group["spread"] == pytest.approx(max(scores) - min(scores), abs=2e-3)


def test_the_table_says_what_the_verdicts_say(run: Path) -> None:
    """Of every 4 prompts the arms get 1, 2, 3 and 4 right, so base has 25 %, region_nft 100 %, 18 of 24 fixed."""
    text = " ".join(parse(write_report(run)).text.split())
    assert re.search(r"base sft srum region_nft overall\s?25\.0\s?12\.0 to 44\.9 .* 100\.0\s?86\.2 to 100\.0", text)
    assert re.search(r"above base\s?\u2013 .* \+75\.0 \+58\.3 to \+91\.7", text)
    assert "18 held-out prompts went from wrong to right, 0 from right to wrong, of 24" in text


def test_evaluations_of_single_rounds_become_a_chart(run: Path) -> None:
    assert "round by round" not in write_report(run).read_text()
    write_arms(run, run / "round-000/eval", 24)
    text = parse(write_report(run)).text
    assert "round by round" in text and "rounds of training" in text


def test_samples_of_the_training_stand_by_prompt_and_step(run: Path) -> None:
    """Three images of one candidate, two of another, whose last is still to be written."""
    folder = run / "round-001/train/region_nft/samples"
    for step, names in ((0, (0, 2)), (50, (0, 2)), (120, (0,))):
        for number in names:
            picture(folder / f"step-{step:08d}/train-{number // 2:04d}-0.png", "#c53030")
    page = write_report(run)
    parse(page)
    (table,) = re.findall(r'<table class="strip">(.*?)</table>', page.read_text(encoding="utf-8"), flags=re.DOTALL)
    head, *rows = table.split("<tr>")[1:]
    assert re.findall(r"<th>(.*?)</th>", head) == ["after steps", "0", "50", "120"]
    assert [row.count("<img") for row in rows] == [3, 2] and all("a red circle above" in row for row in rows)
    assert "round-001, region_nft" in page.read_text(encoding="utf-8")


def test_text_of_prompts_and_judges_is_escaped(run: Path) -> None:
    text = write_report(run).read_text()
    assert text.count("<script") == 2 and "\\u003cscript\\u003ealert" in text  # the data and the code
    assert "<b>0</b>" not in text and "\\u0026 \\u003cb\\u003e0\\u003c/b\\u003e" in text


def test_no_text_breaks_out_of_its_place(run: Path) -> None:
    """Hostile are the prompts, the category, the error of the grounder, the judge's reply and the checker's reasons."""
    picture(run / "round-002/images/x.png", "#c53030")
    candidate = Candidate(
        id="x", prompt_id="x", prompt=HOSTILE, index=0, seed=0, size=(64, 64), image="images/x.png", latent="x"
    )
    layout = LayoutJudgement(score=None, failure=Failure.NO_SCORE, raw=HOSTILE)
    write_records(run / "round-002/prompts.jsonl", [Prompt(id="x", text=HOSTILE, metadata={"tag": HOSTILE})])
    write_records(run / "round-002/candidates.jsonl", [candidate])
    write_records(run / "round-002/regions.jsonl", [Grounding(candidate_id="x", regions=[], error=HOSTILE)])
    write_records(run / "round-002/judgements.jsonl", [Judgement(candidate_id="x", regions=[], layout=layout)])
    for arm in ("base", "region_nft"):
        path = run / f"eval/{arm}/verdicts.jsonl"
        verdict = {"prompt_id": "held-out-0000", "prompt": HOSTILE, "category": "<i>", "reasons": [HOSTILE]}
        write_text(path, json.dumps({"schema": 1, "correct": False} | verdict) + "\n")
    page = write_report(run)
    parse(page)
    text = page.read_text()
    assert text.count("<script") == 2 and "<img src=x" not in text and "<!--" not in text
    (group,) = (group for group in data(page) if group["round"] == "round-002")
    (card,) = group["candidates"]
    grounding, said = card["lines"]
    assert {group["prompt"], group["category"], grounding["text"], said["reply"]} == {HOSTILE}


@pytest.mark.parametrize(
    "place",
    [
        "round-000/images/train-0000-0.png",
        "round-000/rewards/train-0000-0.safetensors",
        "eval/base/images/held-out-0000.png",
        "round-000/train/srum/samples/step-00000000/train-0000-0.png",
        "command.txt",
    ],
)
def test_a_received_run_brings_no_file_of_ours_into_the_page(run: Path, tmp_path: Path, place: str) -> None:
    link, private = run / place, tmp_path / "private"
    private.mkdir()
    (private / "file").write_text("private")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(private / "file")
    with pytest.raises(RunError, match=rf"{link.name}' is not in "):
        write_report(run)
    assert not (run / "report.html").exists()


def test_nothing_is_loaded_from_elsewhere(run: Path) -> None:
    path = write_report(run)
    assert all(link.startswith(("data:image/", "#")) for link in parse(path).links)
    assert not re.search("https?:", path.read_text())


@pytest.mark.parametrize("photographs", [False, True])
def test_a_page_of_2000_candidates_stays_below_40_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: bool
) -> None:
    """Measured on 16 and 32, whose images have the pixels that they would have among 2,000."""
    photograph, pixels, bytes_of = Image.fromarray(astronaut()), report.CANDIDATE_PIXELS // 2000, {}
    for count in (16, 32):
        folder = tmp_path / str(count)
        write_run(folder, count, 64)
        for path in folder.glob("round-*/images/*.png") if photographs else ():
            photograph.save(path)
        monkeypatch.setattr(report, "CANDIDATE_PIXELS", count * pixels)
        bytes_of[count] = write_report(folder).stat().st_size
    each = (bytes_of[32] - bytes_of[16]) / 16
    assert 2000 * each < 40e6


def test_a_large_run_is_a_sample_and_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 candidates the 4 of a prompt from each half of the run, and a row for each of the 32."""
    write_run(tmp_path, 32, 64)
    monkeypatch.setattr(report, "SHOWN", 8)
    page = write_report(tmp_path).read_text()
    assert "Here are 8 of 32, of prompts evenly spaced over the run" in parse(tmp_path / "report.html").text
    rows = [line.split(",") for line in (tmp_path / "candidates.csv").read_text().splitlines()]
    assert len(rows) == 33 and all((tmp_path / row[-1]).exists() for row in rows[1:])
    assert page.count('"id":"train-') == 8
    assert [page.count(f'"round":"round-00{k}"') for k in range(4)] == [1, 0, 1, 0]


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    claim_run(tmp_path, load_config())
    text = parse(write_report(tmp_path)).text
    assert "<script" not in (tmp_path / "report.html").read_text()
    for missing in ("No result yet", "No pair of evaluated images", "No training step", "No timings", "No candidate"):
        assert missing in text


def test_the_page_says_what_is_still_to_come(run: Path, tmp_path: Path) -> None:
    """Two judged rounds and all verdicts, but no weights: training is left. Of a run that has begun, everything."""
    assert to_come(Run(run, load_config(run / "config.yaml"))) == ["round 0: train", "round 1: train"]
    text = " ".join(parse(write_report(run)).text.split())
    assert "Still to come: round 0: train; round 1: train." in text
    for k, arm in product(("round-000", "round-001"), ARMS[1:]):
        (run / k / "train" / arm / "model").mkdir()
    assert "Still to come" not in parse(write_report(run)).text
    begun = Run(tmp_path / "begun", load_config(None, ["rounds=1"]))
    assert to_come(begun) == [
        "round 0: rollout, ground, judge, rasterize, train",
        f"the held-out prompts: {', '.join(ARMS)}",
    ]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], "the model itself, with the newest weights in every round"),
        (["judge.model=start"], "the model itself, with the weights that entered the run"),
        (["judge.model=models/other"], "another model, models/other"),
        (["judge.by=mine:Judge"], "mine:Judge, a judge of one's own"),
        (["judge.reward=mine:reward"], "the reward function mine:reward"),
        (
            ["judge.server.url=http://h/v1", "judge.server.model=m", "judge.soft=false"],
            "m on the server http://h/v1",
        ),
    ],
)
def test_the_page_names_who_judges(tmp_path: Path, overrides: list[str], named: str) -> None:
    config = load_config(None, overrides)
    assert judge_of(config.judge) == named
    claim_run(tmp_path, config)
    assert f"The judge: {named}." in parse(write_report(tmp_path)).text


def test_the_page_of_a_run_reloads_itself_until_the_run_ends(run: Path) -> None:
    assert "location.reload()" in write_report(run, running=True).read_text()
    assert "location.reload()" not in write_report(run).read_text()  # interrupted, or a stage by hand
    for k, arm in product(("round-000", "round-001"), ARMS[1:]):
        (run / k / "train" / arm / "model").mkdir()
    assert "location.reload()" not in write_report(run, running=True).read_text()  # nothing is to come


@pytest.mark.parametrize("missing", ["rewards", "judgements", "regions"])
def test_a_round_that_stopped_between_stages(run: Path, missing: str) -> None:
    stages = ["regions", "judgements", "rewards"]
    for stage in stages[stages.index(missing) :]:
        (run / f"round-001/{stage}.jsonl").unlink()
    card = cards(write_report(run), "round-001")["train-0000-0"]
    names = {"rewards": "layout", "judgements": "judge", "regions": "grounding"}
    assert card["reward"] is None and card["lines"][-1]["name"] == names[missing]
    assert (card["outcomes"], card["lines"][-1]["text"]) == (
        (["judged"], "plausible") if missing == "rewards" else (["not judged yet"], "not done yet")
    )


def test_an_unreadable_image_has_a_placeholder_and_its_problem(run: Path) -> None:
    """In the rounds and before and after; every other picture is as it was."""
    before = cards(write_report(run), "round-000")
    name, gone, *others = before
    (run / f"round-000/images/{name}.png").write_bytes(b"no picture")
    (run / f"round-000/images/{gone}.png").unlink()
    for image in (run / "eval/base/images").iterdir():
        image.write_bytes(b"")
    page = write_report(run)
    found = cards(page, "round-000")
    for broken in (name, gone):
        assert found[broken]["image"] == report.UNREADABLE
        assert found[broken]["outcomes"] == ["image unreadable", *before[broken]["outcomes"]]
        assert found[broken]["lines"][0]["name"] == "image"
        assert f"{broken}.png is not a readable image" in found[broken]["lines"][0]["text"]
    assert [found[other] for other in others] == [before[other] for other in others]
    assert "base/images" in parse(page).text


def test_a_metrics_line_that_is_being_written_is_left_out(run: Path) -> None:
    with (run / "round-001/train/region_nft/metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    assert "loss" in parse(write_report(run)).text
    with (run / "round-001/train/region_nft/metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(JsonError, match=r"metrics\.jsonl: line \d+ is not whole JSON"):
        write_report(run)


def test_a_file_that_somebody_has_cut_is_named(run: Path) -> None:
    (run / "timings.json").write_text("{")
    with pytest.raises(JsonError, match=r"timings\.json is not whole JSON"):
        write_report(run)


# --- in a browser


needs_chromium = pytest.mark.skipif(chromium() is None, reason="no Chromium on the PATH")

STATES = {
    "": 8,
    "round=round-001": 4,
    "round=round-001&outcome=judged": 2,
    "outcome=no_score": 4,
    "category=color_attr&text=square+RED": 8,
    "text=train-0001-0": 2,
    "from=-0.75&to=-0.75": 4,
    "from=-0.7": 0,
    "text=%3Cb%3E": 8,
    "text=%3Ci%3E": 0,
}


@pytest.mark.browser
@needs_chromium
def test_filters_in_the_address(run: Path) -> None:
    expression = f"""{json.dumps(list(STATES))}.map((state) => {{
        history.replaceState(null, "", `#${{state}}`);
        recall();
        return [byId("count").textContent, grid.childElementCount];
    }})"""
    found = ask(write_report(run), expression)
    assert found == [[f"{count} of 8 candidates match", count] for count in STATES.values()]


@pytest.mark.browser
@needs_chromium
def test_an_opened_candidate_lights_up_what_is_pointed_at(run: Path) -> None:
    """From the address to the dialog; line to boxes, box to line; both pictures; the facts as text, not as markup."""
    expression = r"""(() => {
        const lit = () => [...dialog.querySelectorAll(".lit")].map((e) => `${e.tagName} ${e.dataset.region}`);
        const line = dialog.querySelector("li[data-region='2']");
        line.focus();
        const focused = lit();
        dialog.querySelector(".box[data-region='1']").dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
        const pointed = lit();
        const words = line.textContent.replace(/\s+/g, " ").trim();
        const first = [dialog.open, dialog.querySelector("h3").textContent, words];
        step(1);
        const second = [location.hash, dialog.querySelector(".unmapped").hidden, byId("lines").textContent];
        return { focused, pointed, first, second };
    })()"""
    found = ask(write_report(run), expression, "round=round-001&show=round-001/train-0000-0")
    assert found["focused"] == ["DIV 2", "DIV 2", "LI 2"] and found["pointed"] == ["DIV 1", "DIV 1", "LI 1"]
    prompt = "a photo of a red circle above a blue square & <b>0</b>"
    assert found["first"] == [True, prompt, "2 blue square \u22120.75: <script>alert('wrong')</script>"]
    address, unmapped_is_hidden, lines = found["second"]
    assert address == "#round=round-001&show=round-001%2Ftrain-0000-1" and not unmapped_is_hidden
    assert "layout: no_score" in " ".join(lines.split()) and "dunno <i>" in lines


@pytest.mark.browser
@needs_chromium
def test_thumbnails_are_made_as_they_come_near(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 192, 64)
    expression = """(async () => {
        const before = grid.childElementCount;
        while (grid.childElementCount < matching.length) {
            scrollTo(0, document.body.scrollHeight);
            await new Promise((done) => setTimeout(done, 100));
        }
        return [before, grid.childElementCount];
    })()"""
    assert ask(write_report(tmp_path / "run"), expression) == [60, 192]
