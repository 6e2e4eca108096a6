"""The stage that pairs: of each prompt a candidate that misses it, to be seen, and one that meets it, to be drawn.

Scores are those of the model's own judge (``RewardMap.sample_score``); a candidate whose judgement failed is neither.
The exact checker takes no part.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from srum.config import PairConfig
from srum.processes import Processes
from srum.records import Candidate, Pair, RewardMap
from srum.run import Run, console
from srum.run_dir import RunError, finished, read_by_id, write_json, write_records

PAIRED = "paired"
REASONS = {  # outcome of a prompt -> what to do about it, where no prompt has a pair
    "nothing judged": "reward.on_failure=keep keeps candidates of which only a part could be judged",
    "none aligned": "a lower pairs.aligned, or pairs.select=relative",
    "none misaligned": "a higher pairs.misaligned, or pairs.select=relative",
    "neither": "pairs.select=relative",
    "too close": "a smaller pairs.min_gap",
}


class Scored(NamedTuple):
    """A candidate and its score in [-1, 1]."""

    candidate: Candidate
    score: float


def pair_stage(run: Run, k: int) -> None:
    """pairs.jsonl, pair_counts.json: the pairs of round ``k``. Raises RunError, saying why, where there are none."""
    folder = run.round(k)
    if finished(folder, "pairs"):
        return

    def write() -> None:
        candidates = read_by_id(folder / "candidates.jsonl", Candidate)
        rewards = read_by_id(folder / "rewards.jsonl", RewardMap, candidates, gaps=True)
        pairs, counts = make_pairs(candidates, rewards, run.config.pairs, run.seed(k, "pairs"))
        write_json(folder / "pair_counts.json", counts)
        console.print(f"{folder.name}: {json.dumps(counts)}")
        if not pairs:
            raise RunError(_why_none(counts))
        write_records(folder / "pairs.jsonl", pairs)

    Processes.here().once(write)


def make_pairs(
    candidates: Mapping[str, Candidate], rewards: Mapping[str, RewardMap], config: PairConfig, seed: int
) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs of all prompts, in their order, and what became of the prompts.

    The counts: prompts, pairs, prompts by outcome (``REASONS``), the share of planned images on each side.
    """
    groups: dict[str, list[Scored]] = {candidate.prompt_id: [] for candidate in candidates.values()}
    for name, reward in rewards.items():
        groups[candidates[name].prompt_id].append(Scored(candidates[name], reward.sample_score))
    outcomes: Counter[str] = Counter()
    chosen: list[tuple[Scored, Scored]] = []
    for prompt, group in groups.items():
        outcome, own = pairs_of(group, config, random.Random(f"{seed} {prompt}"))
        outcomes[outcome] += 1
        chosen += own
    counts = {"prompts": len(groups), "pairs": len(chosen), "outcomes": dict(sorted(outcomes.items()))}
    return _records(chosen), counts | {"planned": _planned(chosen)}


def pairs_of(
    group: Sequence[Scored], config: PairConfig, rng: random.Random
) -> tuple[str, list[tuple[Scored, Scored]]]:
    """(misaligned, aligned) of the candidates of one prompt, at most ``config.per_prompt``, and the outcome.

    One pair has the best aligned candidate, the lower index where scores are equal, and a misaligned one drawn by
    ``rng``, so that degrees of misalignment vary; of several pairs no two are the same.
    """
    if not group:
        return "nothing judged", []
    ranked = sorted(group, key=lambda one: (-one.score, one.candidate.index))
    if config.select == "relative":
        good, bad = ranked[:1], ranked[-1:]
    else:
        good = [one for one in ranked if one.score >= config.aligned]
        bad = [one for one in ranked if one.score <= config.misaligned]
    if not good or not bad:
        return ("neither" if not good and not bad else "none aligned" if not good else "none misaligned"), []
    drawn = rng.sample(bad, len(bad))
    pairs = [(b, g) for g in good for b in drawn if g.score - b.score >= config.min_gap]
    return (PAIRED if pairs else "too close"), pairs[: config.per_prompt]


def _records(chosen: Sequence[tuple[Scored, Scored]]) -> list[Pair]:
    numbers: dict[str, int] = defaultdict(int)
    pairs = []
    for bad, good in chosen:
        prompt = good.candidate.prompt_id
        pairs.append(
            Pair(
                id=f"{prompt}-pair-{numbers[prompt]}",
                prompt_id=prompt,
                prompt=good.candidate.prompt,
                misaligned=bad.candidate.id,
                aligned=good.candidate.id,
                misaligned_score=bad.score,
                aligned_score=good.score,
            )
        )
        numbers[prompt] += 1
    return pairs


def _planned(chosen: Sequence[tuple[Scored, Scored]]) -> dict[str, float]:
    """Share of the images that were drawn after a plan: RvR then also learns what planning gives."""
    sides = zip(("misaligned", "aligned"), zip(*chosen, strict=True), strict=True) if chosen else ()
    return {name: round(sum(one.candidate.plan is not None for one in side) / len(side), 3) for name, side in sides}


def _why_none(counts: Mapping[str, Any]) -> str:
    outcomes = counts["outcomes"]
    most = max(outcomes, key=lambda name: outcomes[name])
    listed = ", ".join(f"{name}: {count}" for name, count in outcomes.items())
    return f"pairs: no prompt of {counts['prompts']} has one ({listed}); try {REASONS[most]}"
