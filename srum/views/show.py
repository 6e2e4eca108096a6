"""What ``srum show`` and ``srum compare`` print and draw: one candidate, and two runs side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from srum.config import differing_fields
from srum.evaluation.accuracy import CheckedImage, accuracy_of
from srum.evaluation.compute import compute_tables
from srum.evaluation.statistics import difference
from srum.records import Judged
from srum.views.plots import BeforeAfter
from srum.views.reading import CandidateView, RunView

# --- one candidate


def candidate_tables(candidate: CandidateView) -> list[Table]:
    """The facts of a candidate, and what was said of each region and of the layout."""
    return [_facts(candidate), _said(candidate)]


def _facts(candidate: CandidateView) -> Table:
    record, reward = candidate.record, candidate.reward
    size = f"{reward.grid[0]}x{reward.grid[1]} cells, {reward.mapping}, alpha {reward.alpha:.2f}" if reward else None
    facts = {
        "prompt": record.prompt,
        "category": candidate.category,
        "plan": record.plan,
        "image": str(candidate.folder / record.image),
        "seed": str(record.seed),
        "score": _score(candidate.score),
        "reward map": size,
        "failures": "; ".join(candidate.failures),
    }
    table = Table(title=f"candidate {candidate.id}, round {candidate.round}", show_header=False, title_justify="left")
    for name, value in facts.items():
        if value:
            table.add_row(name, escape(value))
    return table


def _said(candidate: CandidateView) -> Table:
    judgement = candidate.judgement
    said = {region.region_id: region for region in judgement.regions} if judgement else {}
    table = Table("region", "label", "box", "from", "score", "reason")
    for region in candidate.regions:
        judged = said.get(region.id)
        box = ", ".join(f"{value:g}" for value in region.box)
        label = (judged.label if judged else None) or region.label or ""
        table.add_row(str(region.id), escape(label), box, escape(region.source), *_score_and_reason(judged))
    if judgement:
        table.add_row("layout", "", "", "", *_score_and_reason(judgement.layout))
    return table


def _score_and_reason(judged: Judged | None) -> tuple[str, str]:
    if judged is None:
        return "", "not judged"
    reason = f"{judged.failure}, reply: {judged.raw}" if judged.failure else judged.reason or ""
    return _score(judged.score), escape(reason)


# --- two runs


def comparison_tables(a: RunView, b: RunView) -> list[Table]:
    """Where the configs differ, the rounds, the accuracy of every arm that both have evaluated, and the compute."""
    tables = (_configs(a, b), _rounds(a, b), _accuracies(a, b), *compute_tables([a, b]))
    return [table for table in tables if table.row_count]


def _configs(a: RunView, b: RunView) -> Table:
    different = differing_fields(a.config, b.config)
    table = Table(f"configs: {escape(str(a.folder))} != {escape(str(b.folder))}", title_justify="left")
    for line in different or ["no difference"]:
        table.add_row(escape(line))
    return table


def _rounds(a: RunView, b: RunView) -> Table:
    table = Table("run", "round", "candidates", "reward maps", "mean score")
    for run in (a, b):
        for row in run.overview():
            counts = (str(row[name]) for name in ("round", "candidates", "reward maps"))
            table.add_row(escape(str(run.folder)), *counts, _score(row["mean score"]))
    return table


def _accuracies(a: RunView, b: RunView) -> Table:
    """Percent by the exact checker; the difference with its paired interval where the prompts are the same."""
    table = Table("arm", escape(str(a.folder)), escape(str(b.folder)), "difference", "95% interval")
    table.caption = "intervals over prompts: another training seed may differ by more"
    ours, theirs = a.verdicts(), b.verdicts()
    for arm in (arm for arm in ours if arm in theirs):
        sides = [[verdict.correct for verdict in verdicts] for verdicts in (ours[arm], theirs[arm])]
        gain = ("", "")
        if _prompts(ours[arm]) == _prompts(theirs[arm]):
            points = difference(sides[1], sides[0]).times(100)
            gain = f"{points.value:+.1f}", f"{points.low:+.1f} to {points.high:+.1f}"
        table.add_row(arm, *(f"{accuracy_of(side).accuracy:.1f}" for side in sides), *gain)
    return table


def changed_images(a: RunView, b: RunView, arm: str) -> Iterator[BeforeAfter]:
    """The evaluated images of ``arm`` of which one run's is right and the other's wrong, that of ``a`` as before."""
    theirs = {verdict.prompt_id: verdict for verdict in b.verdicts().get(arm, [])}
    for verdict in a.verdicts().get(arm, []):
        other = theirs.get(verdict.prompt_id)
        if other is not None and other.correct != verdict.correct:
            before, after = (run.checked_image(arm, verdict.prompt_id) for run in (a, b))
            yield BeforeAfter(verdict.prompt, before, after, verdict.correct, other.correct)


def _prompts(verdicts: list[CheckedImage]) -> list[tuple[str, str]]:
    return [(verdict.prompt_id, verdict.prompt) for verdict in verdicts]


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:+.2f}"


def rows_table(rows: Sequence[Mapping[str, float | int | None]], title: str) -> Table:
    """Rows of numbers under the names of the first."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(
            *(
                "" if value is None else f"{value:g}" if isinstance(value, int) else f"{value:.2f}"
                for value in row.values()
            )
        )
    return table
