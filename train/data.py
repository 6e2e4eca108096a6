"""What training reads of a round: candidates, their latents, their reward maps, the judge's replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL.Image import Image
from torch import Tensor

from judging.instructions import load_instructions
from srum.models.base import Segment
from srum.records import Candidate, Grounding, Judged, Judgement, RewardMap
from srum.run_dir import read_by_id
from srum.seeding import seed_for
from srum.tensors import read_tensor

ROUNDING = 1e-5  # how far float32 arithmetic may carry a reward past its range


@dataclass(frozen=True)
class TrainingRecord:
    """One candidate, ready to train on.

    ``latent`` (C, H', W') clean, scaled, float32; ``reward_map`` (h, w) float32 on the grid of latent tokens, in
    [-1, 1] (``mapping`` signed) or [0, 1] (unit); ``alpha`` in [0, 1]; ``sample_score`` in [-1, 1] (``RewardMap``).
    """

    candidate: Candidate
    latent: Tensor
    reward_map: Tensor
    mapping: Literal["signed", "unit"]
    alpha: float
    sample_score: float

    @property
    def mapped_score(self) -> float:
        """The sample's one score on the scale of its reward map."""
        return self.sample_score if self.mapping == "signed" else (self.sample_score + 1) / 2


def load_training_records(round_dir: Path | str) -> tuple[list[TrainingRecord], int]:
    """The training records of a round in the order of its candidates, and how many candidates have no reward map.

    Reads ``candidates.jsonl`` and ``rewards.jsonl``; a candidate whose judgement failed is in the first only. Raises
    RunError for a missing or malformed file and ValueError where a reward map is not what its line says.
    """
    folder = Path(round_dir)
    candidates = read_by_id(folder / "candidates.jsonl", Candidate)
    rewards = read_by_id(folder / "rewards.jsonl", RewardMap, candidates, gaps=True)
    judged = [candidate for name, candidate in candidates.items() if name in rewards]
    return [_load(folder, candidate, rewards[candidate.id]) for candidate in judged], len(candidates) - len(judged)


@dataclass(frozen=True)
class Reply:
    """What the judge was asked about an image (a file), and what it replied."""

    id: str
    image: Path
    question: str
    text: str

    def segments(self, image: Image | None = None) -> list[Segment]:
        """The image as it was seen (left out where None), the question, and the reply with its loss."""
        seen = [Segment("seen", image=image)] if image is not None else []
        return [*seen, Segment("text", text=self.question), Segment("text", text=self.text, loss=True)]


def load_replies(round_dir: Path | str, instructions: str) -> list[Reply]:
    """The replies of a round's judgements that could be read at once, and their questions by these ``instructions``."""
    folder, asked = Path(round_dir), load_instructions(instructions)
    candidates = read_by_id(folder / "candidates.jsonl", Candidate)
    groundings = read_by_id(folder / "regions.jsonl", Grounding, candidates)
    replies = []
    for name, judgement in read_by_id(folder / "judgements.jsonl", Judgement, candidates).items():
        candidate = candidates[name]
        regions = {region.id: region for region in groundings[name].regions}
        size = asked.regions_per_question
        topics = [judgement.regions[first : first + size] for first in range(0, len(judgement.regions), size)]
        questions = [asked.about_regions(candidate.prompt, [regions[said.region_id] for said in own]) for own in topics]
        said: list[Sequence[Judged]] = [*topics, [judgement.layout]]
        for number, (question, own) in enumerate(
            zip([*questions, asked.about_layout(candidate.prompt)], said, strict=True)
        ):
            if all(one.failure is None and one.attempts == 1 and one.raw for one in own):
                replies.append(Reply(f"{candidate.id}/{number}", folder / candidate.image, question, own[0].raw))
    return replies


def hold_out(
    records: Sequence[TrainingRecord], share: float, seed: int
) -> tuple[list[TrainingRecord], list[TrainingRecord]]:
    """The records to train on, and those of a ``share`` of the prompts, drawn by ``seed``, to validate with.

    A share above 0 is at least one prompt.
    """
    prompts = sorted({r.candidate.prompt_id for r in records}, key=lambda name: seed_for(seed, "validation", name))
    chosen = set(prompts[: max(1, round(share * len(prompts))) if share else 0])
    return (
        [record for record in records if record.candidate.prompt_id not in chosen],
        [record for record in records if record.candidate.prompt_id in chosen],
    )


def _load(folder: Path, candidate: Candidate, reward: RewardMap) -> TrainingRecord:
    values = read_tensor(folder / reward.values)
    low = -1.0 if reward.mapping == "signed" else 0.0
    in_range = bool(((values >= low - ROUNDING) & (values <= 1 + ROUNDING)).all())
    if tuple(values.shape) != reward.grid or not in_range:
        raise ValueError(f"{reward.values}: expected {reward.grid} in [{low}, 1], got {tuple(values.shape)}: {values}")
    return TrainingRecord(
        candidate=candidate,
        latent=read_tensor(folder / candidate.latent),
        reward_map=values,
        mapping=reward.mapping,
        alpha=reward.alpha,
        sample_score=reward.sample_score,
    )
