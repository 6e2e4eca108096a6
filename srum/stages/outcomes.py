"""What became of a round's candidates: counted for ``counts.json``, and said in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from srum.records import Grounding, Judgement


def count_outcomes(
    groundings: Iterable[Grounding], judgements: Iterable[Judgement], skipped: Sequence[str]
) -> dict[str, Any]:
    """What became of a round's candidates: how many, and how many failed at what (``skipped``: why, each)."""
    grounded = Counter(_of_grounding(grounding) for grounding in groundings)
    judged, regions, layouts = 0, Counter[str](), Counter[str]()
    for judgement in judgements:
        judged += len(judgement.regions)
        regions.update(str(region.failure) for region in judgement.regions if region.failure)
        layouts.update([str(judgement.layout.failure)] * (judgement.layout.failure is not None))
    return {
        "candidates": grounded.total(),
        "grounding_errors": grounded["error"],
        "without_regions": grounded["empty"],
        "regions_judged": judged,
        "region_failures": _in_order(regions),
        "layout_failures": _in_order(layouts),
        "skipped": _in_order(Counter(skipped)),
        "reward_maps": grounded.total() - len(skipped),
    }


def _of_grounding(grounding: Grounding) -> Literal["error", "empty", "found"]:
    if grounding.error is not None:
        return "error"
    return "empty" if all(region.id == 0 for region in grounding.regions) else "found"


def _in_order(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def in_words(counts: Mapping[str, Any]) -> str:
    """The counts of ``count_outcomes`` as sentences; of what did not happen they say nothing."""
    made, maps = counts["candidates"], counts["reward_maps"]
    skipped = made - maps
    said = [f"{_of(made, 'candidate')}, {'all' if not skipped else maps} with a reward map"]
    said += [f"{skipped} without one: {_kinds(counts['skipped'])}"] * bool(skipped)
    said += [f"{_of(counts['regions_judged'], 'region')} judged"]
    said += [f"grounding failed on {_of(counts['grounding_errors'], 'image')}"] * bool(counts["grounding_errors"])
    said += [f"no region found on {_of(counts['without_regions'], 'image')}"] * bool(counts["without_regions"])
    said += [f"replies about regions that failed: {_kinds(counts['region_failures'])}"] * bool(
        counts["region_failures"]
    )
    said += [f"replies about layouts that failed: {_kinds(counts['layout_failures'])}"] * bool(
        counts["layout_failures"]
    )
    return ". ".join(sentence[0].upper() + sentence[1:] for sentence in said) + "."


def undrawn_in_words(counts: Mapping[str, Any]) -> str:
    """What a server of images made of its requests (``rollout_counts.json``)."""
    kinds = f": {_kinds(counts['not_drawn'])}" if counts["not_drawn"] else ""
    return f"Of {_of(counts['asked'], 'image')} asked of the server {counts['drawn']} drawn{kinds}."


def _of(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _kinds(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items())
