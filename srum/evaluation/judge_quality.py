"""How good the judge is, by the truth of the embedded world: do its scores tell right from wrong?

Measured on what a round left behind (``judge_quality``), and on prompts about positions, the two things of the image in
each other's place, which a judge that takes shortcuts accepts (``flipped_relations``). Never part of the reward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from scipy.stats import rankdata

from srum.records import Candidate, Grounding, Judgement, LayoutJudgement, Region, RegionJudgement
from srum.shapes.hard_negatives import flip_relation
from srum.shapes.prompts import sample_prompt
from srum.shapes.render import render
from srum.shapes.scenes import sample_scene
from srum.shapes.truth import found_layout_truth, found_region_truth


class Judge(Protocol):
    """What is measured: scores regions and layouts; an unreadable reply is a failure in its judgement."""

    def judge(
        self, images: Sequence[Image.Image], prompts: Sequence[str], regions: Sequence[Sequence[Region]]
    ) -> list[tuple[list[RegionJudgement], LayoutJudgement]]:
        """Per image the judgements of its ``regions`` (boxes in image pixels), in their order, and of its layout."""
        ...


@dataclass(frozen=True)
class Separation:
    """How well scores separate right from wrong: AUROC in [0, 1], None where one of the two kinds is absent.

    ``right`` and ``wrong`` count what was scored, ``failures`` the judgements without a score, which are left out.
    """

    auroc: float | None
    right: int
    wrong: int
    failures: int


@dataclass(frozen=True)
class JudgeQuality:
    """The judge on proposed regions, on the background and on the layout of the same images."""

    regions: Separation
    background: Separation
    layout: Separation


@dataclass(frozen=True)
class FlippedRelations:
    """Shares in [0, 1] of ``n`` prompts: ``rejected``, the layout score of the flipped scene is below 0; ``accepted``,
    that of the scene as asked for is above 0. A failed judgement is neither."""

    rejected: float
    accepted: float
    n: int


def auroc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """The chance, in [0, 1], that something right scores above something wrong; a tie counts half.

    Raises ValueError where one of the two kinds is absent, for NaN scores and for unequal lengths.
    """
    values, labels = np.asarray(scores, dtype=float), np.asarray(right, dtype=bool)
    if values.shape != labels.shape or np.isnan(values).any():
        raise ValueError(f"expected a number for each of {labels.size} labels, got {values.size} scores: {values}")
    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        raise ValueError(f"AUROC needs both kinds, got {positive} right and {negative} wrong")
    above = rankdata(values)[labels].sum() - positive * (positive + 1) / 2  # pairs in the right order
    return float(above / (positive * negative))


def judge_quality(
    candidates: Sequence[Candidate],
    groundings: Sequence[Grounding],
    judgements: Sequence[Judgement],
    metadata: Mapping[str, dict[str, Any]],
    images: Iterable[Image.Image],
) -> JudgeQuality:
    """The judgements of a round against the truth, read from the pixels.

    ``metadata`` (GenEval's layout) is by prompt id; ``images``, 64x64, are in the order of the candidates.
    """
    boxes = {g.candidate_id: {region.id: region.box for region in g.regions} for g in groundings}
    judged = {judgement.candidate_id: judgement for judgement in judgements}
    things: list[tuple[float | None, bool]] = []
    backgrounds: list[tuple[float | None, bool]] = []
    layouts: list[tuple[float | None, bool]] = []
    for candidate, image in zip(candidates, images, strict=True):
        pixels, asked = np.asarray(image.convert("RGB")), metadata[candidate.prompt_id]
        judgement = judged[candidate.id]
        for region in judgement.regions:
            box = boxes[candidate.id][region.region_id] if region.region_id else None
            (backgrounds if box is None else things).append((region.score, found_region_truth(box, pixels, asked)))
        layouts.append((judgement.layout.score, found_layout_truth(pixels, asked)))
    return JudgeQuality(_separation(things), _separation(backgrounds), _separation(layouts))


def _separation(judged: Sequence[tuple[float | None, bool]]) -> Separation:
    scored = [(score, right) for score, right in judged if score is not None]
    scores, labels = [score for score, _ in scored], [right for _, right in scored]
    right, wrong = sum(labels), len(labels) - sum(labels)
    value = auroc(scores, labels) if right and wrong else None
    return Separation(value, right, wrong, failures=len(judged) - len(scored))


def flipped_relations(judge: Judge, n: int, seed: int) -> FlippedRelations:
    """Judge ``n`` rendered scenes as asked for, and flipped: the things are right, the relation between them is not.

    The prompts are of the development split, so that no judge has been pretrained on them.
    """
    rng = np.random.default_rng(seed)
    asked = [sample_prompt(rng, "development", "position") for _ in range(n)]
    scenes = [sample_scene(spec, rng) for spec, _ in asked]
    flipped = [flip_relation(scene, spec) for scene, (spec, _) in zip(scenes, asked, strict=True)]
    images = [Image.fromarray(render(scene)) for scene in [*scenes, *flipped]]
    prompts = [text for _, text in asked] * 2
    scores = [layout.score for _, layout in judge.judge(images, prompts, [[]] * len(images))]
    rejected = [score is not None and score < 0 for score in scores[n:]]
    accepted = [score is not None and score > 0 for score in scores[:n]]
    return FlippedRelations(sum(rejected) / n, sum(accepted) / n, n)
