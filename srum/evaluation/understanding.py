"""What a model sees in images that it or another has drawn, by the truth of the embedded world (R3's ITA and VQA).

    ITA   does this image show its prompt? the judge's sample score, against the exact checker
    VQA   what is there, how many, where: short answers, against what the checker finds; only where all is well drawn

On images of its own a model that draws easier ones seems to see more, so both are also asked of a fixed set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from srum.evaluation.judge_quality import auroc
from srum.models.base import Decoding, Segment, UnifiedModel
from srum.seeding import seed_for
from srum.shapes.checker import parse
from srum.shapes.questions import SHORT
from srum.shapes.scenes import Scene

ANSWER = Decoding(max_tokens=12)


@dataclass(frozen=True)
class Alignment:
    """Of ``n`` images the shares in [0, 1] that were told right from wrong: of all, the mean of both kinds' (None where
    one is absent), and how well scores separate them (as ``auroc``). ``failures`` have no score and count as wrong."""

    accuracy: float
    balanced: float | None
    auroc: float | None
    n: int
    failures: int


def alignment(scores: Sequence[float | None], right: Sequence[bool]) -> Alignment:
    """ITA of the judge's ``scores`` in [-1, 1], above 0 for right. Raises ValueError for none at all."""
    if not scores:
        raise ValueError("there are no scores to compare")
    told = np.array([score is not None and (score > 0) == truth for score, truth in zip(scores, right, strict=True)])
    truth = np.array(right)
    both = truth.any() and not truth.all()
    known = [(score, one) for score, one in zip(scores, right, strict=True) if score is not None]
    separable = len({one for _, one in known}) == 2
    return Alignment(
        accuracy=float(told.mean()),
        balanced=float((told[truth].mean() + told[~truth].mean()) / 2) if both else None,
        auroc=auroc([score for score, _ in known], [one for _, one in known]) if separable else None,
        n=len(scores),
        failures=len(scores) - len(known),
    )


def answered(model: UnifiedModel, images: Sequence[Image], seed: int) -> list[bool]:
    """Whether each answer is right: one of each kind of short question about every image whose things are all well
    drawn; questions are drawn by ``seed``, alike for every model."""
    asked = [(image, *qa) for n, image in enumerate(images) for qa in questions(image, seed_for(seed, n, "vqa"))]
    contexts = [[Segment("seen", image=image), Segment("text", text=question)] for image, question, _ in asked]
    replies = model.write(contexts, ANSWER, [0] * len(contexts)) if contexts else []
    return [reply.text.strip() == answer for reply, (_, _, answer) in zip(replies, asked, strict=True)]


def questions(image: Image, seed: int) -> list[tuple[str, str]]:
    """Questions about an image with their answers; none where something is badly drawn, or nothing is there."""
    found, rng = parse(np.asarray(image.convert("RGB"))), np.random.default_rng(seed)
    things = tuple(thing.placed for thing in found)
    cells = {(thing.row, thing.column) for thing in things}
    if not things or len(cells) < len(things) or not all(thing.well_formed and not thing.stray for thing in found):
        return []
    return [ask(Scene(things), rng) for ask in SHORT]
