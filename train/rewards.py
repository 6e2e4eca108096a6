"""What an image is worth to a policy: V in [0, 1], by the judge of the run, which is not trained meanwhile.

A judgement that failed is no value. Where V reaches ``right_at`` the image counts as right, and V as 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL.Image import Image
from torch import Tensor

from srum.config import RunConfig
from srum.judging.questions import answers, questions_of
from srum.judging.stage import load_answering
from srum.records import Failure, Grounding, Judgement, Prompt
from srum.run import Run, load_model
from srum.shapes.checker import is_right
from srum.shapes.prompts import is_checkable
from srum.stages.reward_map import Skipped, rasterize, sample_score
from srum.train.refining import as_candidate, image_judge
from srum.train.reinforced import Opinion, PolicyConfig

NO_QUESTIONS, NO_FACTS = "no_questions", "no_facts"  # the failures of prompts that bring none


@dataclass(frozen=True)
class Value:
    """V in [0, 1], or None where the judgement failed; and the reward map (h, w) in [-1, 1] of a judged image."""

    value: float | None
    reward_map: Tensor | None = None
    failure: str | None = None  # why there is no value


Reward = Callable[[Sequence[Image], Sequence[Prompt]], Sequence[Value]]


class JudgeReward:
    """V = (s + 1) / 2 of the sample score s (``RewardMap``), regions and layout judged as the config of the run says.

    The judge has the weights that entered the round, in a network of its own: what is trained must not score itself.
    """

    def __init__(self, run: Run, k: int, config: RunConfig, right_at: float) -> None:
        self.right_at, self.batch_size = right_at, config.judge.batch_size
        self.model = load_model(config, run.newest(k))
        self.judge, self.rules = image_judge(self.model, config, run.seed(k, "judge")), config.reward.signed_rules()

    def __call__(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> list[Value]:
        """What each image is worth, by batches."""
        starts = range(0, len(images), self.batch_size)
        batches = [slice(start, start + self.batch_size) for start in starts]
        return [value for some in batches for value in self._judged(images[some], prompts[some])]

    def _judged(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> list[Value]:
        judged = self.judge(images, [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts])
        return [self._value(image, *said) for image, said in zip(images, judged, strict=True)]

    def _value(self, image: Image, grounding: Grounding, judgement: Judgement) -> Value:
        one = as_candidate(image)
        made = rasterize(one, grounding, judgement, self.model.latent_grid(one.size), **self.rules)
        if isinstance(made, Skipped):
            return Value(None, failure=made)
        return Value(rounded((sample_score(judgement) + 1) / 2, self.right_at), made[0])


class QuestionReward:
    """V = the share of right answers to questions about the prompt's facts (``judging.questions``), each by its
    probability, or by the likelier answer (``hard``). A question that failed has no answer, and the image no value.

    Whoever answers has the weights that entered the round, as the judge; ``judge.model`` and ``judge.server`` name
    another.
    """

    def __init__(self, run: Run, k: int, config: RunConfig, right_at: float, hard: bool) -> None:
        self.right_at, self.hard, self.batch_size = right_at, hard, config.judge.batch_size
        self.model = load_answering(config, run.newest(k))

    def __call__(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> list[Value]:
        """What each image is worth, by batches. Raises QuestionsError."""
        starts = range(0, len(images), self.batch_size)
        batches = [slice(start, start + self.batch_size) for start in starts]
        return [value for some in batches for value in self._asked(images[some], prompts[some])]

    def _asked(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> list[Value]:
        asked = [questions_of(prompt.metadata) for prompt in prompts]
        return [self._value(own) for own in answers(self.model, images, asked, self.hard)]

    def _value(self, told: Sequence[float | Failure]) -> Value:
        failed = next((one for one in told if isinstance(one, Failure)), None)
        if failed is not None or not told:
            return Value(None, failure=failed or NO_QUESTIONS)
        known = [one for one in told if not isinstance(one, Failure)]
        return Value(rounded(sum(known) / len(known), self.right_at))


def rounded(value: float, right_at: float) -> float:
    """The value, or 1 where it counts as right."""
    return 1.0 if value >= right_at else value


def checker_value(images: Sequence[Image], prompts: Sequence[Prompt]) -> list[Value]:
    """V = 1 where the exact checker finds what was asked for, else 0: a second opinion that is the truth. The image of
    a prompt that is not of the embedded world, or of another size, has no value."""
    return [
        Value(float(is_right(image, prompt.metadata)))
        if is_checkable(prompt.metadata, (image.height, image.width))
        else Value(None, failure=NO_FACTS)
        for image, prompt in zip(images, prompts, strict=True)
    ]


def reward_of(opinion: Opinion, run: Run, k: int, config: PolicyConfig) -> Reward:
    """What a config calls by this name."""
    if opinion == "questions":
        return QuestionReward(run, k, config, config.right_at, config.hard)
    return checker_value if opinion == "checker" else JudgeReward(run, k, config, config.right_at)
