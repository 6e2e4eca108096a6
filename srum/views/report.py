"""The report of a run: one self-contained ``report.html`` from what the run's folder holds so far.

Everything is inline (images as data URIs, charts as SVG), so the page opens without a server or a network. A part that
the run has not reached yet is said to be missing. ``report.html.j2`` is the page; the candidates of all rounds are in
it as JSON (``_groups``), of which ``report.js`` makes what is looked at. Boxes are in image pixels, reward maps on the
latent grid, stretched over the image (``srum.views.plots``).
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from math import isqrt
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from srum.config import CONFIG, JudgeConfig, load_config
from srum.drawing.refining import best_of
from srum.evaluation.accuracy import Accuracy, CheckedImage, CheckedShot, summarize
from srum.evaluation.benchmark import Drawn
from srum.evaluation.leakage import leakage
from srum.evaluation.statistics import Estimate, difference
from srum.images import ImageError, data_uri, open_image
from srum.json_files import read_json, read_json_lines
from srum.lazy import Lazy
from srum.own import OWN, JudgedImage
from srum.provenance import described, read_entries
from srum.records import Candidate, Judged, Prompt, Region, RegionJudgement
from srum.run import BASE, Run
from srum.run_dir import MADE_WITH, atomic, inside, read_by_id, read_records, round_dirs, write_text
from srum.stages import TRAIN, Stage
from srum.stages.outcomes import in_words, undrawn_in_words
from srum.stages.rollout import own_prompts
from srum.train.alarms import alarms
from srum.views import plots
from srum.views.reading import CandidateView, read_round

T = TypeVar("T")

SHOWN = 2000  # candidates in the page at most; of more there is an index
INDEX = "candidates.csv"
PAIRS_PER_CATEGORY = 4
OFF = "Evaluation is off: eval.count is 0, and no prompts of your own file are held out (eval.own_share)."
RELOAD = 20  # seconds after which the page of a run that goes on loads itself again
OWN_PAIRS = 24
CHAINS = 12  # of an arm that draws in more than one step
EXACT_SIDE = 128  # pixels; images up to this size are kept bit for bit and shown pixel by pixel
LARGEST_SIDE = 384  # pixels of an image in the page; larger ones are scaled down
CANDIDATE_PIXELS = SHOWN * 256**2  # of all candidates together: 2,000 photographs make a page of less than 40 MB
SAMPLE_SIDE = 160  # pixels of an image that was sampled while training went on
LONGEST_REPLY = 600  # characters of a reply without a score
CROSS = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2">'
    '<path d="M0 0 2 2M2 0 0 2" stroke="#888" stroke-width=".05"/></svg>'
)
UNREADABLE = f"data:image/svg+xml;base64,{base64.b64encode(CROSS.encode()).decode()}"  # in place of an image


def write_report(run_folder: Path, running: bool = False) -> Path:
    """Write ``report.html`` into ``run_folder`` and return its path; of a ``running`` run it reloads itself."""
    loader = jinja2.PackageLoader("srum.views", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # of the filter tojson, which escapes markup
    page = environment.get_template("report.html.j2").render(**_contents(run_folder, running))
    path = run_folder / "report.html"
    write_text(path, page)
    return path


def _contents(run: Path, running: bool) -> dict[str, Any]:
    rounds = round_dirs(run)
    opened = Run(run, load_config(run / CONFIG))
    names = [BASE, *opened.arms]
    colours = {name: arm.method.colour for name, arm in opened.arms.items()}
    arms = _in_order(_arms(run / "eval"), names)
    accuracy = _accuracy(arms)
    read = [read_round(folder, running) for folder in rounds if running or (folder / "candidates.jsonl").exists()]
    groups = _groups(read, run / INDEX)
    return {
        "name": run.resolve().name,
        "labels": {name: arm.method.label for name, arm in opened.arms.items()},
        "rounds": len(rounds),
        "judge": judge_of(opened.config.judge),
        "judged": _read_json(max(run.glob("round-*/judge/quality.json"), default=run / "none")),
        "to_come": to_come(opened),
        "running": RELOAD if running and to_come(opened) else None,
        "accuracy": accuracy,
        "gains": _gains(arms),
        "leaks": list(_leaks(run, rounds, arms)),
        "benchmarks": [_benchmark(path) for path in sorted(run.glob("bench/*/*/table-*.json"))],
        "categories": sorted({category for row in accuracy.values() for category in row if category != "overall"}),
        "accuracy_svg": _svg(plots.accuracy_figure(accuracy, colours)),
        "rounds_svg": _rounds_svg(rounds, arms, names, colours),
        "losses": list(_losses(rounds, names, colours)),
        "policies": list(_policies(rounds, names)),
        "samples": list(_samples(rounds, names)),
        "timings": list(_flatten(_read_json(run / "timings.json"))),
        "config": _read_text(inside(run, "config.yaml")),
        "command": _read_text(inside(run, "command.txt")),
        "made_with": described(read_entries(inside(run, MADE_WITH))),
        "counts": {folder.name: words for folder in rounds if (words := _counts(folder))},
        "filters": _filters(groups),
        "data": {
            "scale": [plots.score_colour(score) for score in np.linspace(-1, 1, 201)],
            "missing": plots.MISSING,
            "groups": groups,
        },
        "off": "" if opened.config.eval.count or own_prompts(opened.pinned) else OFF,
        "own": _own(run, names),
        "candidates": sum(map(len, read)),
        "shown": sum(len(group["candidates"]) for group in groups),
        "index": INDEX,
        "redrawn": list(_redrawn(run / "eval", arms)),
        **_before_after(run / "eval", arms, (BASE, names[-1])),
    }


def judge_of(config: JudgeConfig) -> str:
    """Who judges, in words."""
    if config.reward:
        return f"the reward function {config.reward}"
    if config.by != "self":
        return f"{config.by}, a judge of one's own"
    if config.server.url:
        return f"{config.server.model} on the server {config.server.url}"
    known = {
        "self": "the model itself, with the newest weights in every round",
        "start": "the model itself, with the weights that entered the run",
    }
    return known.get(config.model, f"another model, {config.model}")


def to_come(run: Run) -> list[str]:
    """What the run has not done yet, in order: the rest of a round, whole rounds, arms on the held-out prompts."""
    lines = []
    for k in range(run.config.rounds):
        missing = [stage.name for stage in run.stages.values() if not is_done(run, stage, k)]
        lines += [f"round {k}: {', '.join(missing)}"] if missing else []
    arms = [arm for arm in (BASE, *run.arms) if not (run.folder / "eval" / arm / "verdicts.jsonl").exists()]
    lines += [f"the held-out prompts: {', '.join(arms)}"] if run.config.eval.count and arms else []
    own = [arm for arm in (BASE, *run.arms) if not (run.folder / OWN / arm / "scores.jsonl").exists()]
    return lines + ([f"your held-out prompts: {', '.join(own)}"] if own and own_prompts(run.pinned) else [])


def is_done(run: Run, stage: Stage, k: int) -> bool:
    """Whether round ``k`` has all that the stage makes."""
    if stage == TRAIN:
        return all((run.train_dir(arm, k) / "model").exists() for arm in run.arms)
    return all((run.round(k) / f"{name}.jsonl").exists() for name in stage.writes)


# Result and charts


def _arms(folder: Path) -> dict[str, list[CheckedImage]]:
    """The verdicts of the arms that have been evaluated."""
    return {path.parent.name: read_records(path, CheckedImage) for path in sorted(folder.glob("*/verdicts.jsonl"))}


def _accuracy(arms: Mapping[str, list[CheckedImage]]) -> dict[str, dict[str, Accuracy]]:
    results = {arm: summarize(verdicts, seed=0) for arm, verdicts in arms.items()}
    return {arm: {"overall": result.overall, **result.per_category} for arm, result in results.items()}


def _gains(arms: Mapping[str, list[CheckedImage]]) -> dict[str, Estimate]:
    """Points above base, paired by prompt, for the arms that have been tested on the same prompts."""
    correct = {arm: {v.prompt_id: v.correct for v in verdicts} for arm, verdicts in arms.items()}
    base = correct.pop(BASE, {})
    return {
        arm: difference([of_arm[key] for key in base], list(base.values())).times(100)
        for arm, of_arm in correct.items()
        if base and base.keys() == of_arm.keys()
    }


def _leaks(run: Path, rounds: Sequence[Path], arms: Mapping[str, list[CheckedImage]]) -> Iterator[str]:
    """How many training prompts are those of the evaluation, and of each benchmark that is in the run's folder."""
    files = [path for folder in rounds if (path := folder / "prompts.jsonl").exists()]
    met = [prompt.text for path in files for prompt in read_records(path, Prompt)]
    asked = {"the evaluation": {verdict.prompt for verdicts in arms.values() for verdict in verdicts}}
    for path in sorted(run.glob("bench/*/*/images.jsonl")):
        asked.setdefault(path.parts[-3], set()).update(drawn.prompt for drawn in read_records(path, Drawn))
    for name, prompts in asked.items():
        if met and prompts:
            yield leakage(met, prompts).sentence(name)


def _benchmark(path: Path) -> dict[str, Any]:
    """A row about a table of ``srum bench``: its figures with their intervals."""
    table = _read_json(path)
    ours, facts = table["ours"], {name: table[name] for name in ("model", "setting", "evaluator")}
    figures = [f"{name} {value:.4g} ({low:.4g} to {high:.4g})" for name, (value, low, high) in ours["figures"].items()]
    counts = {"n": ours["n"], "failures": sum(ours["failures"].values())}
    return facts | counts | {"name": path.parts[-3], "figures": figures}


def _rounds_svg(
    rounds: list[Path],
    final: Mapping[str, list[CheckedImage]],
    names: Sequence[str],
    colours: Mapping[str, str],
) -> str:
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
    return _svg(plots.rounds_figure(_in_order(points, names), colours))


def _losses(rounds: list[Path], names: Sequence[str], colours: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for folder in rounds:
        if metrics := _metrics(folder):
            yield folder.name, _svg(plots.loss_figure(_in_order(metrics, names), colours))


def _policies(rounds: list[Path], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Of every arm that learns from rewards of its own drawings its curves, and what is to be warned of."""
    for folder in rounds:
        for arm, rows in _in_order(_metrics(folder), names).items():
            if figure := plots.policy_figure(rows):
                yield {"title": f"{folder.name}, {arm}", "svg": _svg(figure), "alarms": alarms(rows)}


def _metrics(folder: Path) -> dict[str, list[Any]]:
    return {path.parent.name: _read_lines(path) for path in sorted(folder.glob("train/*/metrics.jsonl"))}


def _samples(rounds: list[Path], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The images sampled while an arm was trained: a row for every prompt, a column for every number of steps."""
    for folder in rounds:
        arms = {path.parent.name: sorted(path.glob("step-*")) for path in sorted(folder.glob("train/*/samples"))}
        candidates = read_by_id(folder / "candidates.jsonl", Candidate) if arms else {}
        for arm, steps in _in_order(arms, names).items():
            rows = []
            for name in sorted({image.stem for step in steps for image in step.glob("*.png")}):
                files = [inside(step, f"{name}.png") for step in steps]  # the last step's may not all be there yet
                pictures = [_picture(file, SAMPLE_SIDE) if file.exists() else None for file in files]
                rows.append({"prompt": candidates[name].prompt, "pictures": pictures})
            yield {"title": f"{folder.name}, {arm}", "steps": [int(step.name[5:]) for step in steps], "rows": rows}


def _in_order(by_arm: Mapping[str, T], names: Sequence[str]) -> dict[str, T]:
    """The arms in the order in which they are compared, unknown ones last."""
    known = [arm for arm in names if arm in by_arm]
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


def _own(run: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """What the frozen judge says of the held-out prompts of one's own file: numbers by arm, and pairs of images."""
    if not (run / f"{OWN}.json").exists():
        return None
    arms = _in_order(
        {path.parent.name: read_records(path, JudgedImage) for path in sorted((run / OWN).glob("*/scores.jsonl"))},
        names,
    )
    after = {image.prompt_id: image for image in arms.get(names[-1], [])}
    both = [(image, after[image.prompt_id]) for image in arms.get(BASE, []) if image.prompt_id in after]
    pairs = [
        {
            "prompt": old.prompt,
            "sides": [_own_side(run / OWN / arm, image) for arm, image in ((BASE, old), (names[-1], new))],
        }
        for old, new in both[:OWN_PAIRS]
    ]
    return _read_json(run / f"{OWN}.json") | {"pairs": pairs, "total": len(both)}


def _own_side(folder: Path, image: JudgedImage) -> dict[str, Any]:
    picture = _picture(inside(folder, image.files()[0]), LARGEST_SIDE)
    verdict = "no score" if image.score is None else f"{image.score:+.2f}"
    good = image.score is not None and image.score > 0
    reasons = "; ".join(filter(None, [image.said, picture["problem"]]))
    return {"arm": folder.name, "correct": good, "verdict": verdict, "reasons": reasons} | picture


def _redrawn(folder: Path, arms: Mapping[str, list[CheckedImage]]) -> Iterator[dict[str, Any]]:
    """Arms that draw in more than one step: what came of it round by round, and the chains of the first prompts."""
    for arm, verdicts in arms.items():
        if not any(verdict.shots for verdict in verdicts):
            continue
        chains = [verdict for verdict in verdicts if len(verdict.shots) > 1][:CHAINS]
        shown = [
            {"prompt": v.prompt, "shots": [_shot(folder / arm, v, n) for n in range(len(v.shots))], "end": v.end}
            for v in chains
        ]
        judged = any(shot.score is not None for verdict in verdicts for shot in verdict.shots)
        yield {"arm": arm, "judged": judged, "rounds": _rounds_of(verdicts), "chains": shown, "total": len(verdicts)}


def _rounds_of(verdicts: Sequence[CheckedImage]) -> list[dict[str, int]]:
    """After 0, 1, ... rounds: how many were drawn again, how many of the images that count are right, were made right
    and were made wrong. It is the one that the judge likes best, or the last, where nobody judged."""
    rows = []
    for number in range(max(len(verdict.shots) for verdict in verdicts)):
        after = [_counting(verdict.shots[: number + 1]).correct for verdict in verdicts]
        before = [verdict.shots[0].correct for verdict in verdicts]
        rows.append(
            {
                "again": sum(len(verdict.shots) > number for verdict in verdicts) if number else 0,
                "right": sum(after),
                "mended": sum(a and not b for a, b in zip(after, before, strict=True)),
                "broken": sum(b and not a for a, b in zip(after, before, strict=True)),
            }
        )
    return rows


def _counting(shots: Sequence[CheckedShot]) -> CheckedShot:
    scores = [shot.score for shot in shots]
    return shots[-1] if all(score is None for score in scores) else shots[best_of(scores)]


def _shot(folder: Path, verdict: CheckedImage, number: int) -> dict[str, Any]:
    shot = verdict.shots[number]
    score = "not judged" if shot.score is None else f"score {shot.score:+.2f}"
    facts = {"correct": shot.correct, "score": score, "kept": number == verdict.kept, "said": shot.said or ""}
    return facts | _picture(inside(folder, shot.image), SAMPLE_SIDE)


def _before_after(folder: Path, arms: Mapping[str, list[CheckedImage]], names: tuple[str, str]) -> dict[str, Any]:
    before, after = ({v.prompt_id: v for v in arms.get(arm, [])} for arm in names)
    both = [(before[key], after[key]) for key in before if key in after]
    shown: dict[str, list[dict[str, Any]]] = {}
    for pair in both:
        of_category = shown.setdefault(pair[0].category, [])
        if len(of_category) < PAIRS_PER_CATEGORY:
            sides = [_side(folder / arm, verdict) for arm, verdict in zip(names, pair, strict=True)]
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
    picture = _picture(folder / "images" / f"{verdict.prompt_id}.png", LARGEST_SIDE)
    reasons = "; ".join([*verdict.reasons, *[picture["problem"]] * bool(picture["problem"])])
    said = "right" if verdict.correct else "wrong"
    return {"arm": folder.name, "correct": verdict.correct, "verdict": said, "reasons": reasons} | picture


# Candidates


def _counts(folder: Path) -> str:
    """What became of the candidates of a round, in words."""
    asked, made = _read_json(folder / "rollout_counts.json"), _read_json(folder / "counts.json")
    return " ".join(say(counts) for say, counts in ((undrawn_in_words, asked), (in_words, made)) if counts)


def _groups(rounds: Sequence[Lazy[CandidateView]], index: Path) -> list[dict[str, Any]]:
    """The candidates of all rounds in the order of the run, grouped by round and prompt; of more than ``SHOWN`` those
    of prompts evenly spaced over the run, and ``index`` then lists all, a row each."""
    many = sum(map(len, rounds)) > SHOWN
    views = _spaced(rounds, index) if many else [view for views in rounds for view in views]
    side = min(LARGEST_SIDE, isqrt(CANDIDATE_PIXELS // max(1, len(views))))
    groups: dict[tuple[str, str], list[tuple[CandidateView, dict[str, Any]]]] = {}
    with ThreadPoolExecutor() as pool:  # Pillow decodes, scales and encodes without holding the interpreter's lock
        pictures = pool.map(lambda view: _picture(view.folder / view.record.image, side), views)
        for view, picture in zip(views, pictures, strict=True):
            groups.setdefault((view.folder.name, view.record.prompt_id), []).append((view, picture))
    return [_group(members) for members in groups.values()]


def _spaced(rounds: Sequence[Lazy[CandidateView]], index: Path) -> list[CandidateView]:
    members: dict[tuple[int, str], list[int]] = {}  # places by round and prompt
    with atomic(index) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        for number, views in enumerate(rounds):
            for place, view in enumerate(views):
                row = view.row() | {"image": f"{view.folder.name}/{view.record.image}"}
                if not members:
                    table.writerow(row)
                table.writerow(row.values())
                members.setdefault((number, view.record.prompt_id), []).append(place)
    groups = list(members.items())
    count = max(1, len(groups) * SHOWN // sum(map(len, rounds)))
    chosen = [groups[place * len(groups) // count] for place in range(count)]
    return [rounds[number][place] for (number, _), places in chosen for place in places]


def _group(members: Sequence[tuple[CandidateView, dict[str, Any]]]) -> dict[str, Any]:
    """The candidates of one prompt in one round; ``spread`` is the distance from their lowest score to the highest."""
    first, _ = members[0]
    scores = [view.score for view, _ in members if view.score is not None]
    return {
        "round": first.folder.name,
        "prompt": first.record.prompt,
        "category": str(first.category or ""),
        "spread": _rounded(max(scores) - min(scores)) if len(scores) > 1 else None,
        "candidates": [_card(view, picture) for view, picture in members],
    }


def _card(view: CandidateView, picture: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a candidate; width and height are those of its image, in whose pixels the boxes are."""
    height, width = view.record.size
    reward = view.reward
    problem = picture["problem"]
    return {
        "image": picture["image"],
        "pixelated": picture["pixelated"],
        "id": view.id,
        "width": width,
        "height": height,
        "score": _rounded(view.score),
        "layout": _rounded(view.judgement.layout.score if view.judgement else None),
        "alpha": _rounded(reward.alpha if reward else None),
        "mapping": reward.mapping if reward else None,
        "grid": reward.grid if reward else None,
        "reward": _reward_uri(view) if reward else None,
        "outcomes": ["image unreadable"] * bool(problem) + _outcomes(view),
        "lines": [_line("image", text=problem)] * bool(problem) + list(_lines(view)),
        "plan": view.record.plan,
    }


def _outcomes(view: CandidateView) -> list[str]:
    """What became of a candidate: ``judged``, where nothing failed; else the kinds of its failures."""
    if view.grounding is None or view.judgement is None:
        return ["not judged yet"]
    said = [*view.judgement.regions, view.judgement.layout]
    failures = [str(failure) for failure in dict.fromkeys(judged.failure for judged in said) if failure]
    if view.grounding.error:
        return ["grounding failed", *failures]
    return ["no region"] * (not _things(view)) + (failures or ["judged"])


def _lines(view: CandidateView) -> Iterator[dict[str, Any]]:
    """Under a candidate: what the judge said of each region and of the layout, or why there is nothing to say."""
    if view.grounding is None:
        yield _line("grounding", text="not done yet")
        return
    if view.grounding.error or not _things(view):
        yield _line("grounding", text=view.grounding.error or "no region found")
    regions = {region.id: region for region in view.regions}
    said = {region.region_id: region for region in view.judgement.regions} if view.judgement else {}
    for number in sorted(regions | said, key=lambda number: (number == 0, number)):
        yield _region_line(number, regions.get(number), said.get(number))
    yield _line("layout", view.judgement.layout) if view.judgement else _line("judge", text="not done yet")


def _things(view: CandidateView) -> list[Region]:
    """The regions that are not the background."""
    return [region for region in view.regions if region.id != 0]


def _region_line(number: int, region: Region | None, said: RegionJudgement | None) -> dict[str, Any]:
    """A line about a region, with its box in image pixels; the background may have been called so by the judge."""
    label = (said.label if said else None) or (region.label if region else None) or ""
    known = "background" if number == 0 else str(number)
    name = label if number == 0 and known in label else f"{known} {label}".strip()
    box = [round(value, 1) for value in region.box] if region else None
    return _line(name, said, text="" if said else "not judged") | {"region": number, "box": box}


def _line(name: str, said: Judged | None = None, text: str = "") -> dict[str, Any]:
    """What is said of one thing: score and reason, or the failure with the judge's reply."""
    if said is None or said.failure is None:
        reason = said.reason if said else None
        return {"name": name, "score": _rounded(said.score if said else None), "text": reason or text}
    return {"name": name, "score": None, "text": said.failure, "reply": _shortened(said.raw) or "none"}


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_REPLY else f"{text[:LONGEST_REPLY]} …"


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 3)


def _filters(groups: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The values that the candidates can be filtered by."""
    outcomes = {outcome for group in groups for card in group["candidates"] for outcome in card["outcomes"]}
    return {
        "round": list(dict.fromkeys(group["round"] for group in groups)),
        "category": sorted({group["category"] for group in groups} - {""}),
        "outcome": sorted(outcomes),
    }


# Images as data URIs


def _picture(path: Path, side: int) -> dict[str, Any]:
    """An image file for the page: a small one exactly, a larger one scaled down to ``side`` pixels and compressed.

    For one that cannot be read a crossed-out square, and the ``problem``. Kept, since a run writes its report after
    every stage.
    """
    return _encoded(path, side, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(2 * SHOWN)
def _encoded(path: Path, side: int, changed: int) -> dict[str, Any]:
    try:
        image = open_image(path)
    except ImageError as error:
        return {"image": UNREADABLE, "pixelated": False, "problem": str(error)}
    exact = max(image.size) <= EXACT_SIDE
    if not exact:
        image.thumbnail((side, side))
    return {"image": data_uri(image, "webp", lossless=exact, quality=75), "pixelated": exact, "problem": ""}


def _reward_uri(view: CandidateView) -> str:
    """A reward map (h, w) as an image of one pixel per latent cell, in the colours of the scores."""
    values = view.reward_map()
    assert values is not None  # it has been asked for because there is one
    colours = plots.SCORE_COLOURS(plots.SCORE_RANGE(values.numpy()), bytes=True)[..., :3]
    return data_uri(Image.fromarray(colours))


# Files


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path) if path.exists() else []


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """``{"a": {"b": 1}}`` as ``("a / b", 1)``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key} / ")
        else:
            yield f"{prefix}{key}", value
