"""The outcome on own prompts: a share of a file is held out, drawn by base and arms, judged by a frozen judge.

There is no exact checker for them. What judges is what the config names as the judge, but where that is the model
itself, its weights are those that entered the run, for every arm alike: a judge that is trained along would move with
what it judges. It is still the judge whose scores were learned from: a gain says that images please it more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from srum.evaluation.statistics import Estimate, crossed
from srum.records import Name, Record, Score
from srum.run import BASE

OWN = "own"  # the folder in that of a run; it has one for each arm, with drawn.jsonl, scores.jsonl, images/


class Drawn(Record):
    """The image of a held-out prompt, ``images/<prompt id>.png``."""

    prompt_id: Name

    def files(self) -> list[str]:
        """The image."""
        return [f"images/{self.prompt_id}.png"]


class JudgedImage(Drawn):
    """The one score of such an image, None where the judge failed, and what it found lowest, in its words."""

    prompt: str
    score: Score | None
    said: str


def mean_score(images: Sequence[JudgedImage]) -> Estimate | None:
    """The mean score in [-1, 1] with its interval over prompts; None where no image has one."""
    scores = [image.score for image in images if image.score is not None]
    return crossed(scores) if scores else None


def gain(images: Sequence[JudgedImage], base: Sequence[JudgedImage]) -> Estimate | None:
    """By how much the mean score is above that of base, paired by the prompts of which both images have one."""
    scores = {image.prompt_id: image.score for image in base}
    pairs = [(image.score, scores.get(image.prompt_id)) for image in images]
    differences = [new - old for new, old in pairs if new is not None and old is not None]
    return crossed(differences) if differences else None


def summary(judge: str, arms: Mapping[str, Sequence[JudgedImage]]) -> dict[str, Any]:
    """Plain values of ``own.json``: mean scores, intervals of 95% over prompts, differences to ``base``."""
    rows: dict[str, Any] = {}
    for arm, images in arms.items():
        scored = [image for image in images if image.score is not None]
        rows[arm] = {"images": len(images), "failed": len(images) - len(scored)}
        if mean := mean_score(images):
            rows[arm] |= {"score": mean.value, "interval": mean.interval}
        if arm != BASE and (above := gain(images, arms.get(BASE, []))):
            rows[arm]["difference_to_base"] = {"score": above.value, "interval": above.interval, "pairs": above.prompts}
    return {"judge": judge, "arms": rows}


def table(values: Mapping[str, Any]) -> Table:
    """The summary as a table of the terminal, a column per arm."""
    arms = values["arms"]
    made = Table("", *arms, title=f"own held-out prompts, judged by {values['judge']}")
    made.add_row("mean score, 95% interval", *(_with_interval(row, "score") for row in arms.values()))
    made.add_row("above base", *(_with_interval(row.get("difference_to_base", {}), "score") for row in arms.values()))
    made.add_row("images", *(str(row["images"]) for row in arms.values()))
    made.add_row("not scored", *(str(row["failed"]) for row in arms.values()))
    return made


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    return "{:+.2f}\n{:+.2f} to {:+.2f}".format(row[name], *row["interval"]) if name in row else ""


def lowest(said: Sequence[tuple[str, float | None, str]]) -> str:
    """What the judge found lowest, of what ``srum.views.plots.said_of`` says: "2 red triangle: not asked for"."""
    known = [one for one in said if one[1] is not None]
    if not known:
        return "; ".join(f"{name}: {reason}" for name, _, reason in said)
    name, _, reason = known[0]
    return f"{name}: {reason}" if reason else name
