"""Which regions bear on the prompt, as the model sees it: the filter of the paper's Sec. 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image

from srum.geometry import format_box, scale_box
from srum.models.base import Segment, UnifiedModel, box_frame
from srum.records import Box, Region

QUESTION = """Prompt: {prompt}
Bounding Box: {box}
Does what is in this box bear on the prompt? Answer yes or no."""
YES_OR_NO = ("Yes", "No")
AT_ONCE = 64  # questions per forward pass, each with its copy of the image's cache


class RelevanceFilter:
    """Keeps the regions that bear on the prompt with at least the probability ``threshold``, in [0, 1].

    The probability is that of "Yes" against "No" as the model's reply, without decoding.
    """

    def __init__(self, model: UnifiedModel, threshold: float) -> None:
        self.model = model
        self.threshold = threshold

    def __call__(self, image: Image, prompt: str, regions: Sequence[Region]) -> list[Region]:
        """Of the ``regions`` (boxes in pixels of ``image``) those that stay, in their order."""
        kept: list[Region] = []
        seen, size = Segment("seen", image=image), (image.height, image.width)
        frames = size, box_frame(self.model, size)
        for first in range(0, len(regions), AT_ONCE):
            some = regions[first : first + AT_ONCE]
            contexts = [[seen, Segment("text", text=_question(prompt, scale_box(r.box, *frames)))] for r in some]
            logprobs = torch.stack(self.model.score(contexts, YES_OR_NO))
            probabilities = logprobs.double().softmax(dim=-1)[:, 0].tolist()
            kept += [region for region, yes in zip(some, probabilities, strict=True) if yes >= self.threshold]
        return kept


def _question(prompt: str, box: Box) -> str:
    return QUESTION.format(prompt=prompt, box=format_box(box))
