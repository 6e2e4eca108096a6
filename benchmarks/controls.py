"""What the laboratory trains beside region-NFT, to know what the judge is worth: the same on the same candidates, with
something else where the judge's score stands. Each is a method, named ``benchmarks.controls:Name``.

    Contrast   no judge: every planned candidate 1, every bare one -1
    WithinModes  the judge's scores, compared among the planned and among the bare candidates of a prompt only
    Separated  the sum of both, half of each
    Shuffled   the judge's scores, dealt out anew among the candidates of a prompt
    Checker    the exact checker's verdict, 1 or -1: the judge that makes no mistake
    PlannedSft SFT on the planned candidates alone

An advantage lies evenly on its image, as that of region-NFT with ``credit=sample``, with which they compare.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from srum.records import Prompt
from srum.run_dir import open_image, read_by_id
from srum.seeding import seed_for
from srum.shapes.checker import is_right
from srum.train.advantages import sample_advantages
from srum.train.data import TrainingRecord, candidate_mix, load_training_records
from srum.train.feed import Mix
from srum.train.methods.region_nft import RegionNft, RegionNftConfig
from srum.train.methods.sft import Sft

if TYPE_CHECKING:
    from srum.run import Run


class Control(RegionNft):
    """Region-NFT whose advantages are made of something else."""

    def examples(self, run: Run, k: int, config: RegionNftConfig) -> Mix:
        """Every candidate that has a reward map, its advantage in all of its cells."""
        records = self.chosen(load_training_records(run.round(k)), config)
        made = self.advantages(records, run, k)
        credits = [r.reward_map.new_full(r.reward_map.shape, a) for a, r in zip(made, records, strict=True)]
        return candidate_mix(records, credits, config.train, run.seed(k, "train"))

    def advantages(self, records: Sequence[TrainingRecord], run: Run, k: int) -> list[float]:
        """One in [-1, 1] for each candidate."""
        raise NotImplementedError


class Contrast(Control):
    """Planned against bare, in place of right against wrong."""

    name, label = "contrast", "planned against bare"

    def advantages(self, records: Sequence[TrainingRecord], run: Run, k: int) -> list[float]:
        """Of the modes."""
        return sample_advantages([mode(record) for record in records], prompts(records))


class WithinModes(Control):
    """The judge without the contrast."""

    name, label = "within_modes", "the judge within a mode"

    def advantages(self, records: Sequence[TrainingRecord], run: Run, k: int) -> list[float]:
        """Of the judge's scores, among candidates of the same prompt and mode."""
        groups = [f"{record.candidate.prompt_id} {mode(record)}" for record in records]
        return sample_advantages(scores(records), groups)


class Separated(Control):
    """The judge and the contrast, neither of which the other's mean can take away."""

    name, label = "separated", "contrast + the judge within a mode"

    def advantages(self, records: Sequence[TrainingRecord], run: Run, k: int) -> list[float]:
        """Half the sum of those two."""
        both = [control.advantages(records, run, k) for control in (Contrast(), WithinModes())]
        return [(a + b) / 2 for a, b in zip(*both, strict=True)]


class Shuffled(Control):
    """As many good and bad scores in every prompt as the judge gave, without what they say."""

    name, label = "shuffled", "scores shuffled within the prompt"

    def advantages(self, records: Sequence[TrainingRecord], run: Run, k: int) -> list[float]:
        """Of the scores, dealt out by the run's seed."""
        return sample_advantages(shuffled(scores(records), prompts(records), run.seed(k, "shuffle")), prompts(records))


class Checker(Control):
    """The truth in place of the judge."""

    name, label = "checker", "the exact checker as judge"

    def advantages(self, records: Sequence[TrainingRecord], run: Run, k: int) -> list[float]:
        """Of the verdicts."""
        folder = run.round(k)
        asked = {name: p.metadata for name, p in read_by_id(folder / "prompts.jsonl", Prompt).items()}
        verdicts = [
            is_right(open_image(folder / c.image), asked[c.prompt_id]) for c in (record.candidate for record in records)
        ]
        return sample_advantages([1.0 if right else -1.0 for right in verdicts], prompts(records))


class PlannedSft(Sft):
    """Distillation of the stronger mode."""

    name, label = "planned_sft", "SFT on planned candidates"

    def examples(self, run: Run, k: int, config: Any) -> Mix:
        """The planned candidates, with weight one."""
        records = [r for r in load_training_records(run.round(k)) if r.candidate.plan is not None]
        return candidate_mix(records, self.credits(records, config), config.train, run.seed(k, "train"))


def mode(record: TrainingRecord) -> float:
    """1 of a planned candidate, -1 of a bare one."""
    return -1.0 if record.candidate.plan is None else 1.0


def scores(records: Sequence[TrainingRecord]) -> list[float]:
    """The judge's."""
    return [record.sample_score for record in records]


def prompts(records: Sequence[TrainingRecord]) -> list[str]:
    """The id of each one's prompt."""
    return [record.candidate.prompt_id for record in records]


def shuffled(values: Sequence[float], groups: Sequence[str], seed: int) -> list[float]:
    """The values (N,) dealt out anew within their groups (N,)."""
    dealt: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        dealt.setdefault(group, []).append(value)
    for group, members in dealt.items():
        random.Random(seed_for(seed, group)).shuffle(members)
    return [dealt[group].pop() for group in groups]
