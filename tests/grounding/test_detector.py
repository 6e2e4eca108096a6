"""Detectors over small random checkpoints, and the phrases that they are asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srum.grounding.base import GrounderError, ground, load_grounder
from srum.grounding.detector import DetectorGrounder
from srum.grounding.phrases import noun_phrases
from tests.fakes import FakeModel

APPLES = "two red apples in a wooden bowl"


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a red cube", ["red cube"]),
        ("a photo of a bench", ["bench"]),
        ("A photo of two red apples to the left of a wooden bowl", ["red apples", "wooden bowl"]),
        ("an oil painting of a ship", ["ship"]),
        ("a painting on the wall", ["painting", "wall"]),
        ("a large red circle and two small blue squares", ["large red circle", "small blue squares"]),
        ("a green triangle above a yellow star", ["green triangle", "yellow star"]),
        ("three cats", ["cats"]),
        ("a dog and a dog", ["dog"]),
        ("a cat wearing a hat", ["cat", "hat"]),
        ("a man without a hat", ["man", "hat"]),
        ("a group of people riding bicycles", ["people", "bicycles"]),
        ("a cup of coffee next to a book", ["cup", "coffee", "book"]),
        ("The round cookie is on the square table.", ["round cookie", "square table"]),
        ("A close-up of a hummingbird's wing", ["hummingbird's wing"]),
        ("12 eggs, a t-shirt; salt", ["eggs", "t-shirt", "salt"]),
        ("a soft, fluffy blanket", ["soft", "fluffy blanket"]),
        ("une pomme rouge", ["une pomme rouge"]),
        ("ein Löwe und ein Schaf", ["ein löwe und ein schaf"]),
        ("两个红苹果", ["两个红苹果"]),
        ("of the and", []),
        ("...", []),
        ("", []),
    ],
)
def test_noun_phrases(prompt: str, phrases: list[str]) -> None:
    assert noun_phrases(prompt) == phrases


@settings(max_examples=50)
@given(st.text())
def test_phrases_of_anything_are_distinct_words_of_it(prompt: str) -> None:
    phrases = noun_phrases(prompt)
    assert len(set(phrases)) == len(phrases)
    assert all(word in prompt.lower() for phrase in phrases for word in phrase.split())


@pytest.mark.parametrize("family", ["owlv2", "grounding_dino"])
def test_detections_are_boxes_of_the_image_labelled_with_phrases(
    family: str, request: pytest.FixtureRequest, photographs: dict[str, Image.Image]
) -> None:
    grounder = DetectorGrounder(str(request.getfixturevalue(family)), min_score=0.0, max_overlap=0.9)
    images = [photographs["coffee"].resize((60, 40)), photographs["astronaut"].resize((40, 60))]
    images.append(photographs["camera"].convert("RGB").resize((50, 50)))
    prompts = [APPLES, "of", f"{APPLES} " * 40]
    proposals = grounder.propose(images, prompts)
    assert proposals[0]
    for image, regions in zip(images, proposals, strict=True):
        for region in regions:
            x0, y0, x1, y1 = region.box
            assert 0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height
            assert region.source == "detector"
    labels = {region.label for region in proposals[0]}
    assert labels <= {"red apples", "wooden bowl"} if family == "owlv2" else labels
    assert grounder.propose(images[1:2], prompts[1:2]) == proposals[1:2]
    ((_, error),) = ground(grounder, images[:1], prompts[:1], max_regions=3)
    assert error is None


class Fixed:
    """In place of a detector: the same ``logits`` (queries, classes or tokens) and ``boxes`` for every image."""

    device = torch.device("cpu")

    def __init__(self, logits: torch.Tensor, boxes: list[list[float]]) -> None:
        self.output = {"logits": logits[None], "pred_boxes": torch.tensor([boxes])}

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(**self.output, input_ids=inputs["input_ids"])


def test_boxes_come_back_from_the_padded_square_best_first(owlv2: Path) -> None:
    """OWLv2 pads to the right and below: boxes are shares of the longer side, and the padding is cut off.

    By hand, 600x400 px: the centre and size (0.5, 0.5, 0.2, 0.4) is (240, 180, 360, 420), cut at 400.
    """
    grounder = DetectorGrounder(str(owlv2), min_score=0.2)
    boxes = [[0.5, 0.9, 0.1, 0.1], [0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.2, 0.39]]
    scores = torch.tensor([0.9, 0.5, 0.7, 0.1])
    grounder.model = Fixed(torch.stack([scores.logit(), torch.full((4,), -9.0)], dim=-1), boxes)
    (regions,) = grounder.propose([Image.new("RGB", (600, 400))], [APPLES])
    assert [region.label for region in regions] == ["red apples", "red apples"]
    assert regions[0].box == pytest.approx((0, 0, 120, 120), abs=1e-3)
    assert regions[1].box == pytest.approx((240, 180, 360, 400), abs=1e-3)


def test_boxes_that_are_shares_of_each_side(grounding_dino: Path) -> None:
    """As Grounding DINO's are. By hand, 600x400 px: centre and size (0.5, 0.25, 0.2, 0.4) is (240, 20, 360, 180)."""
    grounder = DetectorGrounder(str(grounding_dino), min_score=0.3)
    logits = torch.tensor([[-9.0, 2.0, 2.0, -9.0, -9.0, -9.0, -9.0, -9.0]])  # of [CLS] red apples . wooden bowl . [SEP]
    grounder.model = Fixed(logits, [[0.5, 0.25, 0.2, 0.4]])
    ((region,),) = grounder.propose([Image.new("RGB", (600, 400))], [APPLES])
    assert region.label == "red apples" and region.box == pytest.approx((240, 20, 360, 180), abs=1e-3)


def test_checkpoints_that_cannot_be_used(sam: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path, sam):
        with pytest.raises(GrounderError, match="detector: cannot load"):
            load_grounder("detector", FakeModel(), checkpoint=str(folder))
