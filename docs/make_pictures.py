"""Draw the pictures of the README and of docs/method.md: ``python docs/make_pictures.py runs/demo [--lab runs/lab]``.

``runs/lab`` is what ``benchmarks/lab.py`` wrote, its parts ``own`` and ``steps`` included; without it their pictures
stay as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from srum import open_run
from srum.run import BASE
from srum.views.plots import BeforeAfter, loop_figure, rounds_figure, steps_figure
from srum.views.reading import CandidateView, RunView

OUT = Path(__file__).parent / "images"


class Point(NamedTuple):
    """An accuracy and its 95% interval in percent."""

    accuracy: float
    interval: tuple[float, float]


def choose(run: RunView, round_: int, candidate_id: str | None) -> CandidateView:
    """The candidate of that id; by default the one whose map varies most of those with a region that is wrong."""
    if candidate_id:
        return run.candidate(candidate_id, round_)
    judged = [(c, values) for c in run.candidates(round_) if (values := c.reward_map()) is not None]
    return max(judged, key=lambda one: (has_wrong(one[0]), float(one[1].std())))[0]


def has_wrong(candidate: CandidateView) -> bool:
    """Whether one of its regions contradicts the prompt."""
    said = candidate.judgement.regions if candidate.judgement else []
    return any(one.region_id != 0 and one.score is not None and one.score < 0 for one in said)


def draw_reward_map(candidate: CandidateView, out: Path) -> None:
    """Write ``out``: a candidate with its regions, its reward map, and what the judge says."""
    figure = candidate.figure(grid=True)
    figure.suptitle(candidate.prompt.text, fontsize=9, parse_math=False)
    figure.savefig(out, dpi=150)


def draw_loop(run: RunView, candidate: CandidateView, prompt_id: str | None, out: Path) -> str:
    """Write ``out``: a round in one picture, with the pair of a held-out prompt. Returns whose; by default of the first
    that base gets wrong and the run's method right."""
    arm = run.method.name
    before, after = ({v.prompt_id: v for v in run.verdicts()[name]} for name in (BASE, arm))
    mended = [name for name in before if not before[name].correct and after[name].correct]
    chosen = prompt_id or mended[0]
    images = (run.checked_image(name, chosen) for name in (BASE, arm))
    pair = BeforeAfter(before[chosen].prompt, *images, before[chosen].correct, after[chosen].correct)
    values = candidate.reward_map()
    assert values is not None and candidate.judgement is not None
    judged = candidate.regions, candidate.judgement, values.numpy()
    loop_figure(candidate.prompt.text, candidate.image(), *judged, pair).savefig(out, dpi=150)
    return chosen


def draw_gallery(run: RunView, round_: int, out: Path) -> None:
    """Write ``out``: candidates of the round from the best to the worst score."""
    run.candidates(round_).gallery(limit=24).savefig(out, dpi=110)


def draw_objectives(lab: Path, out: Path) -> None:
    """Write ``out``: the accuracy of every objective's own loop over its rounds."""
    rows = {row["what"]: row for row in json.loads(lab.read_text())["own"]}
    points = {what: Point(row["mean"], tuple(row["interval"])) for what, row in rows.items() if " - " not in what}
    base = points.pop("base")
    rounds: dict[str, dict[int, Point]] = {}
    for what, point in points.items():
        objective, _, count = what.rpartition(", ")
        rounds.setdefault(objective, {0: base})[int(count)] = point
    rounds_figure(rounds).savefig(out, dpi=150)


def draw_steps(lab: Path, out: Path) -> None:
    """Write ``out``: layout, detail and correctness at each denoising step, the means over the lab's seeds."""
    seeds: dict[str, list[list[dict[str, float]]]] = {}
    for arm in ("base", "sft", "srum", "region_nft"):
        seeds[arm] = [json.loads(file.read_text()) for file in sorted(lab.glob(f"seed-*/lab/steps/{arm}/means.json"))]
    names = {"layout": "layout score", "detail": "detail score", "correct": "share of correct images"}
    steps = {
        shown: {
            arm: [fmean(step[name] for step in same) for same in zip(*own, strict=True)] for arm, own in seeds.items()
        }
        for name, shown in names.items()
    }
    steps_figure(steps).savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--round", type=int, default=0)
    parser.add_argument("--candidate", help="id of the candidate (default: the one whose map varies most)")
    parser.add_argument("--pair", help="id of the held-out prompt (default: the first that was mended)")
    parser.add_argument("--lab", type=Path, help="folder that benchmarks/lab.py wrote")
    arguments = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    opened = open_run(arguments.run)
    chosen = choose(opened, arguments.round, arguments.candidate)
    draw_reward_map(chosen, OUT / "reward_map.png")
    pair = draw_loop(opened, chosen, arguments.pair, OUT / "loop.png")
    draw_gallery(opened, arguments.round, OUT / "gallery.png")
    print(f"{OUT}: reward_map.png (candidate {chosen.id}), loop.png (the same, prompt {pair}), gallery.png")
    if arguments.lab:
        draw_objectives(arguments.lab / "lab.json", OUT / "objectives.png")
        draw_steps(arguments.lab, OUT / "steps.png")
