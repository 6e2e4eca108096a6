"""What became of a round's candidates: counted for ``counts.json``, and said in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from srum.records import Grounding, Judgement


def count_outcomes(
    groundings: Sequence[Grounding], judgements: Sequence[Judgement], skipped: Sequence[str]
) -> dict[str, Any]:
    """What became of a round's candidates: how many, and how many failed at what (``skipped``: why, each)."""
    return {
        "candidates": len(groundings),
        "grounding_errors": sum(g.error is not None for g in groundings),
        "without_regions": sum(g.error is None and all(region.id == 0 for region in g.regions) for g in groundings),
        "regions_judged": sum(len(j.regions) for j in judgements),
        "region_failures": _count(region.failure for j in judgements for region in j.regions),
        "layout_failures": _count(j.layout.failure for j in judgements),
        "skipped": _count(skipped),
        "reward_maps": len(groundings) - len(skipped),
    }


def _count(kinds: Iterable[str | None]) -> dict[str, int]:
    return {str(kind): number for kind, number in sorted(Counter(kind for kind in kinds if kind is not None).items())}


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


def _of(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _kinds(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items())
