"""What to be warned of while a policy is trained, and when to stop: read off the rows of ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

WINDOW = 10  # rows that have a figure, over which it is averaged
Row = Mapping[str, Any]
WARNINGS: Sequence[tuple[str, Callable[[float], bool], str]] = (
    ("zero_spread_groups", lambda share: share > 0.8, "of {:.0%} of the groups all rewards are equal: change prompts"),
    ("failed_values", lambda share: share > 0.2, "{:.0%} of the images have no value: see the failures of the judge"),
    ("formed", lambda share: share < 0.9, "{:.0%} of the texts can be read: reinforcement needs a better start"),
    ("stops", lambda share: share > 0.95, "{:.0%} of the replies are stops: the policy may only look well behaved"),
    ("second_agreement", lambda share: share < 0.7, "the second opinion shares {:.0%} of the verdicts of the reward"),
    ("image_clipped", lambda share: share > 0.5, "{:.0%} of the images' ratios are clipped: fewer updates, or less lr"),
)


def alarms(rows: Sequence[Row]) -> list[str]:
    """What is wrong in the newest ``WINDOW`` rows of each figure; nothing before there are so many."""
    found = []
    for name, wrong, words in WARNINGS:
        values = [row[name] for row in rows if name in row][-WINDOW:]
        if len(values) == WINDOW and wrong(mean := sum(values) / WINDOW):
            found.append(words.format(mean))
    return found


def widened(rows: Sequence[Row], most: float) -> str:
    """Why to stop, or nothing: from the first look of the second opinion to the newest, the reward's lead over it has
    grown by more than ``most``. Both are of the same images, so that easy prompts move neither."""
    gaps = [row["second_gap"] for row in rows if "second_gap" in row]
    if len(gaps) < 2 or gaps[-1] - gaps[0] <= most:
        return ""
    return f"the reward has gained {gaps[-1] - gaps[0]:.2f} on the second opinion, more than stop_gap={most:g}"
