"""What training reads of a round, as examples: candidates with their latents and reward maps, the judge's replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from srum.config import TrainConfig
from srum.errors import TrainingError
from srum.json_files import read_json
from srum.judging.instructions import Instructions, load_instructions
from srum.lazy import Lazy
from srum.models.base import Segment
from srum.records import Candidate, Grounding, Judged, Judgement, RewardMap
from srum.run_dir import RunError, read_by_id
from srum.tensors import read_tensor
from srum.train.examples import Example, hold_out
from srum.train.feed import Mix, Part

ROUNDING = 1e-5  # how far float32 arithmetic may carry a reward past its range


class Array:
    """A field that is given as a tensor, as a file, or as what makes it; the latter two each time it is asked for."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, record: object | None, owner: type | None = None) -> Tensor:
        if record is None:
            raise AttributeError("the field has no default")
        kept = vars(record)[self.name]
        return read_tensor(kept) if isinstance(kept, Path) else kept if isinstance(kept, Tensor) else kept()

    def __set__(self, record: object, value: Tensor | Path | Callable[[], Tensor]) -> None:
        vars(record)[self.name] = value


@dataclass(frozen=True)
class TrainingRecord:
    """One candidate, ready to train on.

    ``latent`` (C, H', W') clean, scaled, float32; ``reward_map`` (h, w) float32 on the grid of latent tokens, in
    [-1, 1] (``mapping`` signed) or [0, 1] (unit); ``alpha`` in [0, 1]; ``sample_score`` in [-1, 1] (``RewardMap``).
    """

    candidate: Candidate
    latent: Array = Array()
    reward_map: Array = Array()
    _: KW_ONLY
    mapping: Literal["signed", "unit"]
    alpha: float
    sample_score: float

    @property
    def mapped_score(self) -> float:
        """The sample's one score on the scale of its reward map."""
        return self.sample_score if self.mapping == "signed" else (self.sample_score + 1) / 2

    @property
    def target(self) -> Segment:
        """The latent as what is to be drawn; one in a file is read at every visit."""
        kept = vars(self)["_latent"]
        if isinstance(kept, Path):
            return Segment("noisy", file=kept, loss=True)
        return Segment("noisy", latent=self.latent, loss=True)


def load_training_records(folder: Path) -> Sequence[TrainingRecord]:
    """The training records in the folder of a round, in the order of its candidates, made when they are asked for.

    Reads ``candidates.jsonl`` and ``rewards.jsonl``; a candidate whose judgement failed is in the first only. Raises
    RunError for a missing or malformed file and, where it is asked for, for a reward map that is not what its line
    says, and TrainingError where there are none.
    """
    candidates = read_by_id(folder / "candidates.jsonl", Candidate)
    rewards = read_by_id(folder / "rewards.jsonl", RewardMap, candidates, gaps=True)
    if not rewards:
        skipped = read_json(folder / "counts.json")["skipped"]
        raise TrainingError(f"nothing to train on: no candidate of {folder} has a reward map, because of {skipped}")
    names = [name for name in candidates if name in rewards]
    return Lazy(names, lambda name: _record(folder, candidates[name], rewards[name]))


def candidate_mix(
    records: Sequence[TrainingRecord],
    credits: Sequence[Tensor],
    train: TrainConfig,
    seed: int,
    replies: Sequence[Example] = (),
) -> Mix:
    """Candidates with their ``credits`` (h, w) each, ``train.batch_size`` a step; and ``train.replies`` of the replies.

    Those of a share ``validation.share`` of the prompts are held out, drawn by ``seed``.
    """
    examples = candidate_examples(records, credits, train.plan_in_context)
    training, held_out = hold_out(examples, train.validation.share, seed)
    return Mix([Part("", training, train.batch_size), Part("replies", replies, train.replies)], held_out)


def candidate_examples(
    records: Sequence[TrainingRecord], credits: Sequence[Tensor], plan_in_context: bool = False
) -> Sequence[Example]:
    """Text -> image: the prompt, its plan where wanted and made, and the latent with its loss and credit.

    Texts drop together.
    """

    def example(number: int) -> Example:
        record = records[number]
        texts = texts_of(record.candidate, plan_in_context)
        return Example(
            id=record.candidate.id,
            group=record.candidate.prompt_id,
            segments=[*(Segment("text", text=text, droppable=True) for text in texts), record.target],
            credit=Lazy([number], credits.__getitem__),
        )

    return Lazy(range(len(records)), example)


def texts_of(candidate: Candidate, plan_in_context: bool) -> list[str]:
    """What the candidate's image was drawn from: its prompt and, where wanted, its plan."""
    return [candidate.prompt] if candidate.plan is None or not plan_in_context else [candidate.prompt, candidate.plan]


def load_replies(folder: Path, instructions: str) -> Sequence[Example]:
    """The replies of a round's judgements that could be read at once: image, question, reply with its loss.

    Questions are those of the ``instructions`` that were asked. Raises TrainingError where there are none.
    """
    asked = load_instructions(instructions)
    candidates = read_by_id(folder / "candidates.jsonl", Candidate)
    groundings = read_by_id(folder / "regions.jsonl", Grounding, candidates)
    judgements = read_by_id(folder / "judgements.jsonl", Judgement, candidates)

    def questions(name: str) -> list[tuple[str, Sequence[Judged]]]:
        return _questions(asked, candidates[name], groundings[name], judgements[name])

    def reply(place: tuple[str, int]) -> Example:
        name, number = place
        question, judged = questions(name)[number]
        return _reply(f"{name}/{number}", folder / candidates[name].image, question, judged[0].raw)

    places = [
        (name, number)
        for name in judgements
        for number, (_, judged) in enumerate(questions(name))
        if all(one.failure is None and one.attempts == 1 and one.raw for one in judged)
    ]
    if not places:
        raise TrainingError("train.replies: there is no reply to learn; the judge's were unreadable, or forced")
    return Lazy(places, reply)


def _questions(
    asked: Instructions, candidate: Candidate, grounding: Grounding, judgement: Judgement
) -> list[tuple[str, Sequence[Judged]]]:
    """Each question about a candidate, and what was judged in the reply to it."""
    regions = {region.id: region for region in grounding.regions}
    size = asked.regions_per_question
    topics = [judgement.regions[first : first + size] for first in range(0, len(judgement.regions), size)]
    about = [
        (asked.about_regions(candidate.prompt, [regions[one.region_id] for one in topic]), topic) for topic in topics
    ]
    return [*about, (asked.about_layout(candidate.prompt), [judgement.layout])]


def _reply(name: str, image: Path, question: str, reply: str) -> Example:
    segments = [
        Segment("seen", image=image),
        Segment("text", text=question),
        Segment("text", text=reply, loss=True),
    ]
    return Example(id=name, segments=segments)


def _record(folder: Path, candidate: Candidate, reward: RewardMap) -> TrainingRecord:
    return TrainingRecord(
        candidate=candidate,
        latent=folder / candidate.latent,
        reward_map=lambda: _reward_map(folder, reward),
        mapping=reward.mapping,
        alpha=reward.alpha,
        sample_score=reward.sample_score,
    )


def _reward_map(folder: Path, reward: RewardMap) -> Tensor:
    values = read_tensor(folder / reward.values)
    low = -1.0 if reward.mapping == "signed" else 0.0
    in_range = bool(((values >= low - ROUNDING) & (values <= 1 + ROUNDING)).all())
    if tuple(values.shape) != reward.grid or not in_range:
        raise RunError(f"{reward.values}: expected {reward.grid} in [{low}, 1], got {tuple(values.shape)}: {values}")
    return values
