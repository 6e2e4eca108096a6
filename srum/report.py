"""The report of a run: one self-contained ``report.html`` from what the run's folder holds so far.

Everything is inline (images as data URIs, charts as SVG), so the page opens without a server or a network. A part that
the run has not reached yet is said to be missing. Boxes are drawn in image pixels, reward maps on the latent grid,
stretched over the image (``srum.plots``).
"""

from __future__ import annotations

import base64
import io
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from srum import plots
from srum.evaluation.accuracy import Accuracy, CheckedImage, paired_bootstrap, summarize
from srum.records import Candidate, Grounding, Judgement, LayoutJudgement, Record, Region, RegionJudgement, RewardMap
from srum.run_dir import open_image, read_records, write_text

R = TypeVar("R", bound=Record)
T = TypeVar("T")

BASE = "base"
BEFORE_AFTER = (BASE, "srum")
PAIRS_PER_CATEGORY = 4
LARGEST_SIDE = 384  # pixels of an image in the page; larger ones are scaled down


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into ``run_folder`` and return its path."""
    loader = jinja2.PackageLoader("srum", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("report.html.j2").render(**_contents(run_folder))
    path = run_folder / "report.html"
    write_text(path, page)
    return path


def _contents(run: Path) -> dict[str, Any]:
    rounds = sorted(path for path in run.glob("round-*") if path.is_dir())
    last = next((path for path in reversed(rounds) if (path / "candidates.jsonl").exists()), None)
    arms = _arms(run / "eval")
    accuracy = _accuracy(arms)
    return {
        "name": run.resolve().name,
        "rounds": len(rounds),
        "accuracy": accuracy,
        "gains": _gains(arms),
        "categories": sorted({category for row in accuracy.values() for category in row if category != "overall"}),
        "accuracy_svg": _svg(plots.accuracy_figure(accuracy)),
        "rounds_svg": _rounds_svg(rounds, arms),
        "losses": list(_losses(rounds)),
        "timings": list(_flatten(_read_json(run / "timings.json"))),
        "config": _read_text(run / "config.yaml"),
        "command": _read_text(run / "command.txt"),
        "round": last.name if last else None,
        "counts": list(_flatten(_read_json(last / "counts.json"))) if last else [],
        "groups": _groups(last) if last else {},
        "scale": [plots.score_colour(score) for score in np.linspace(-1, 1, 21)],
        **_before_after(run / "eval", arms),
    }


# Result and charts


def _arms(folder: Path) -> dict[str, list[CheckedImage]]:
    """The verdicts of the arms that have been evaluated."""
    found = {path.parent.name: read_records(path, CheckedImage) for path in sorted(folder.glob("*/verdicts.jsonl"))}
    return _in_order(found)


def _accuracy(arms: Mapping[str, list[CheckedImage]]) -> dict[str, dict[str, Accuracy]]:
    results = {arm: summarize(verdicts, seed=0) for arm, verdicts in arms.items()}
    return {arm: {"overall": result.overall, **result.per_category} for arm, result in results.items()}


def _gains(arms: Mapping[str, list[CheckedImage]]) -> dict[str, tuple[float, float, float]]:
    """Points above base with their paired 95% interval, for the arms that have been tested on the same prompts."""
    correct = {arm: {v.prompt_id: v.correct for v in verdicts} for arm, verdicts in arms.items()}
    base = correct.pop(BASE, {})
    return {
        arm: paired_bootstrap([of_arm[key] for key in base], list(base.values()))
        for arm, of_arm in correct.items()
        if base and base.keys() == of_arm.keys()
    }


def _rounds_svg(rounds: list[Path], final: Mapping[str, list[CheckedImage]]) -> str:
    """Accuracy over the rounds, from the evaluations that were made after single rounds; empty where there are none."""
    evaluated = {number: _arms(folder / "eval") for number, folder in enumerate(rounds, start=1)}
    if not any(evaluated.values()):
        return ""
    evaluated[len(rounds)] = evaluated[len(rounds)] or dict(final)
    points: dict[str, dict[int, Accuracy]] = {}
    for number, arms in evaluated.items():
        overall = {arm: row["overall"] for arm, row in _accuracy(arms).items()}
        for arm in overall if BASE in overall else ():
            points.setdefault(arm, {0: overall[BASE]})[number] = overall[arm]
    points.pop(BASE, None)
    return _svg(plots.rounds_figure(_in_order(points)))


def _losses(rounds: list[Path]) -> Iterator[tuple[str, str]]:
    for folder in rounds:
        metrics = {path.parent.name: _read_lines(path) for path in sorted(folder.glob("train/*/metrics.jsonl"))}
        if metrics:
            yield folder.name, _svg(plots.loss_figure(_in_order(metrics)))


def _in_order(by_arm: Mapping[str, T]) -> dict[str, T]:
    """The arms in the order in which they are compared, unknown ones last."""
    known = [arm for arm in plots.ARM_COLOURS if arm in by_arm]
    return {arm: by_arm[arm] for arm in [*known, *by_arm]}


def _svg(figure: Figure) -> str:
    """The figure as inline SVG: text stays text, and what is drawn in ink takes the page's own text colour."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "srum", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    return re.sub(r'<g id="[^"]*">', "<g>", svg).replace(plots.INK, "currentColor")


# Before and after


def _before_after(folder: Path, arms: Mapping[str, list[CheckedImage]]) -> dict[str, Any]:
    before, after = ({v.prompt_id: v for v in arms.get(arm, [])} for arm in BEFORE_AFTER)
    both = [(before[key], after[key]) for key in before if key in after]
    shown: dict[str, list[dict[str, Any]]] = {}
    for pair in both:
        of_category = shown.setdefault(pair[0].category, [])
        if len(of_category) < PAIRS_PER_CATEGORY:
            sides = [_side(folder / arm, verdict) for arm, verdict in zip(BEFORE_AFTER, pair, strict=True)]
            of_category.append({"prompt": pair[0].prompt, "sides": sides})
    return {
        "pairs": [pair for of_category in shown.values() for pair in of_category],
        "pairs_per_category": PAIRS_PER_CATEGORY,
        "changes": {
            "fixed": sum(new.correct and not old.correct for old, new in both),
            "broken": sum(old.correct and not new.correct for old, new in both),
            "total": len(both),
        },
    }


def _side(folder: Path, verdict: CheckedImage) -> dict[str, Any]:
    uri = _image_uri(open_image(folder / "images" / f"{verdict.prompt_id}.png"))
    return {"arm": folder.name, "correct": verdict.correct, "reasons": "; ".join(verdict.reasons), "image": uri}


# Candidates


def _groups(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The candidates of a round by prompt, each as the template wants it."""
    regions = {record.candidate_id: record for record in _read(folder / "regions.jsonl", Grounding)}
    judgements = {record.candidate_id: record for record in _read(folder / "judgements.jsonl", Judgement)}
    rewards = {record.candidate_id: record for record in _read(folder / "rewards.jsonl", RewardMap)}
    groups: dict[str, list[dict[str, Any]]] = {}
    for number, candidate in enumerate(_read(folder / "candidates.jsonl", Candidate)):
        key = candidate.id
        card = _card(folder, candidate, regions.get(key), judgements.get(key), rewards.get(key))
        groups.setdefault(candidate.prompt, []).append(card | {"anchor": f"image-{number}"})
    return groups


def _card(
    folder: Path,
    candidate: Candidate,
    grounding: Grounding | None,
    judgement: Judgement | None,
    reward: RewardMap | None,
) -> dict[str, Any]:
    height, width = candidate.size
    said = {region.region_id: region for region in judgement.regions} if judgement else {}
    regions = grounding.regions if grounding else []
    return {
        "id": candidate.id,
        "summary": f"score {reward.sample_score:+.2f}, alpha {reward.alpha:.2f}, {reward.mapping}" if reward else "",
        "width": width,
        "height": height,
        "stroke": max(width, height) / 64,
        "image": _image_uri(open_image(folder / candidate.image)),
        "boxes": [_box(region, said.get(region.id)) for region in regions if region.id != 0],
        "said": _said(grounding, judgement),
        "plan": candidate.plan,
        "reward": _reward_uri(folder / reward.values) if reward else None,
    }


def _box(region: Region, said: RegionJudgement | None) -> dict[str, Any]:
    x0, y0, x1, y1 = region.box
    score = said.score if said else None
    return {"id": region.id, "x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0, "colour": plots.score_colour(score)}


def _said(grounding: Grounding | None, judgement: Judgement | None) -> list[dict[str, str]]:
    """Under a candidate: what the judge said of each region and of the layout, or why there is nothing to say."""
    if grounding is None or judgement is None:
        return [_line("judge" if grounding else "grounding", None, "not done yet")]
    labels = {region.id: region.label for region in grounding.regions}
    lines = []
    if grounding.error or not labels:
        lines.append(_line("grounding", None, grounding.error or "no region found"))
    for region in judgement.regions:
        name = "background" if region.region_id == 0 else str(region.region_id)
        label = region.label or labels.get(region.region_id)
        lines.append(_line(f"{name} {label}" if label else name, region.score, _reason(region)))
    return [*lines, _line("layout", judgement.layout.score, _reason(judgement.layout))]


def _reason(said: RegionJudgement | LayoutJudgement) -> str:
    if said.failure is None:
        return said.reason or ""
    return f"{said.failure}, reply: {textwrap.shorten(said.raw, 160) or 'none'}"


def _line(name: str, score: float | None, reason: str) -> dict[str, str]:
    shown = "" if score is None else f"{score:+.2f}"
    return {"name": name, "score": shown, "reason": reason, "colour": plots.score_colour(score)}


# Images as data URIs


def _image_uri(image: Image.Image) -> str:
    """Small images exactly, large ones scaled down and compressed."""
    exact = max(image.size) <= 128
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return _data_uri(image, "webp", lossless=exact, quality=85)


def _reward_uri(path: Path) -> str:
    """A reward map (h, w) as an image of one pixel per latent cell, in the colours of the scores."""
    colours = plots.SCORE_COLOURS(plots.SCORE_RANGE(_read_reward(path)), bytes=True)[..., :3]
    return _data_uri(Image.fromarray(colours), "png")


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    data = io.BytesIO()
    image.save(data, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


# Files


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(_read_text(path) or "{}")


def _read(path: Path, kind: type[R]) -> list[R]:
    return read_records(path, kind) if path.exists() else []


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; one that is being written at this moment is left out."""
    return [json.loads(line) for line in _read_text(path).splitlines(keepends=True) if line.endswith("\n")]


def _read_reward(path: Path) -> NDArray[np.floating]:
    (values,) = load_file(path).values()
    return values


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """``{"a": {"b": 1}}`` as ``("a / b", 1)``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key} / ")
        else:
            yield f"{prefix}{key}", value
