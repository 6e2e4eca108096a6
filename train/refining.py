"""Refinement by the model's own judge: the score of an image, how an evaluation draws, and ``srum refine``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL.Image import Image

from grounding.stage import load_proposer
from judging.stage import load_judging
from srum.config import RunConfig
from srum.drawing import Chain, Draw, Shot
from srum.evaluation.accuracy import drawn
from srum.models.base import TrainableModel
from srum.records import Grounding, Judgement, Prompt
from srum.refining import Score, refine
from srum.reward_map import reason_to_skip, sample_score
from srum.seeding import seed_for


def self_scorer(model: TrainableModel, config: RunConfig, seed: int) -> Score:
    """Scores in [-1, 1] as a round's candidates get them: grounded, judged, the lowest of regions and layout."""
    propose, judge = load_proposer(config, model), load_judging(config, model, seed)

    def score(images: Sequence[Image], prompts: Sequence[str]) -> list[float | None]:
        proposed = propose(images, prompts)
        judged = judge(images, prompts, [{}] * len(images), [regions for regions, _ in proposed])
        scores: list[float | None] = []
        for (regions, error), (of_regions, layout) in zip(proposed, judged, strict=True):
            grounding = Grounding(candidate_id="image", regions=regions, error=error)
            judgement = Judgement(candidate_id="image", regions=of_regions, layout=layout)
            failed = reason_to_skip(grounding, judgement, config.reward.on_failure)
            scores.append(None if failed else sample_score(judgement))
        return scores

    return score


def drawn_again(model: TrainableModel, config: RunConfig, seed: int) -> Draw:
    """Images of prompts as the evaluation draws them, the same first ones, then again as ``config.refine`` says."""
    score = self_scorer(model, config, seed_for(seed, "refine", "judge"))

    def draw(prompts: Mapping[str, Prompt]) -> list[Chain]:
        firsts = [Shot(made.image) for made in drawn(model, prompts, config.eval, seed)]
        texts = [prompt.text for prompt in prompts.values()]
        return refine(model, score, list(prompts), texts, firsts, config.refine, seed)

    return draw
