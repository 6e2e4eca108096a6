"""Rewards in place of a judge: plain functions of images, prompts and metadata that return scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL.Image import Image

from srum.errors import SrumError
from srum.judging.base import Outcome
from srum.plugins import find
from srum.records import Failure, LayoutJudgement, Region, RegionJudgement


class RewardError(SrumError, ValueError):
    """A reward function that returns no scores; the message is one line."""


class Reward:
    """A function that judges: ``name`` is ``module:function``, called with images, prompts and their metadata.

    It returns for every image a score in [-1, 1], or None where it has none. One with a parameter ``regions`` is given
    the proposals of each image, too, and returns pairs: the score of the image, and a list of one per region.
    A score of the image alone is that of its layout and of all of its regions.
    """

    def __init__(self, name: str) -> None:
        self.name, self.function = name, find("reward", name)
        if not callable(self.function):
            raise RewardError(f"judge.reward: {name} is no function")
        self.by_region = "regions" in inspect.signature(self.function).parameters

    def judge(
        self,
        images: Sequence[Image],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        regions: Sequence[Sequence[Region]],
    ) -> list[Outcome]:
        """Per image the judgements of its regions, in their order, and of its layout. Raises RewardError."""
        extra = [list(regions)] if self.by_region else []
        scores = list(self.function(list(images), list(prompts), list(metadata), *extra))
        if len(scores) != len(images):
            raise RewardError(f"judge.reward: {self.name} returned {len(scores)} scores for {len(images)} images")
        pairs = scores if self.by_region else [(s, [s] * len(own)) for s, own in zip(scores, regions, strict=True)]
        return [self._outcome(score, own, of) for (score, own), of in zip(pairs, regions, strict=True)]

    def _outcome(self, score: float | None, by_region: Sequence[float | None], regions: Sequence[Region]) -> Outcome:
        if len(by_region) != len(regions):
            raise RewardError(f"judge.reward: {self.name} returned {len(by_region)} scores for {len(regions)} regions")
        judged = [
            RegionJudgement(region_id=region.id, **self._judged(own))
            for region, own in zip(regions, by_region, strict=True)
        ]
        return judged, LayoutJudgement(**self._judged(score))

    def _judged(self, score: float | None) -> dict[str, Any]:
        if score is None:
            return {"score": None, "failure": Failure.NO_SCORE, "raw": f"{self.name} gave none"}
        if not -1 <= score <= 1:  # NaN is none, too
            raise RewardError(f"judge.reward: {self.name} returned {score}; a score is a number in [-1, 1], or None")
        return {"score": float(score)}


Judging = Callable[
    [Sequence[Image], Sequence[str], Sequence[Mapping[str, Any]], Sequence[Sequence[Region]]], Sequence[Outcome]
]  # images, prompts, metadata, regions
