"""GenEval: what the original scorer decides, on its cases; the network's inputs; the layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from srum.evaluation.benchmarks.geneval import Geneval, faults, relations, selected
from srum.evaluation.data import DataError
from srum.evaluation.detection import Detection, _alone, _clip_pixels, detections, prepared
from tests.golden_cases import cases


def test_decisions_are_those_of_the_original() -> None:
    decided = []
    for case in cases("geneval-decision"):
        objects = {
            name: [Detection(0, box[4], tuple(box[:4])) for box in boxes]  # type: ignore[misc]
            for name, boxes in case["detections"].items()
        }

        def colours(name: str, things: Sequence[Detection], told: Any = case["colours"]) -> list[str]:
            return told[name][: len(things)]  # type: ignore[no-any-return]

        decided.append(faults(case["metadata"], objects, colours))
    assert [not reasons for reasons in decided] == [case["correct"] for case in cases("geneval-decision")]
    assert [len(reasons) for reasons in decided] == [case["reasons"] for case in cases("geneval-decision")]


def test_counting_wants_to_be_surer() -> None:
    things = {"a": [Detection(0, score, (0, 0, 1, 1)) for score in (0.95, 0.9, 0.31, 0.3)]}
    assert [len(selected(things, tag)["a"]) for tag in ("counting", "colors")] == [1, 3]
    assert len(selected({"a": things["a"][:1] * 20}, "colors")["a"]) == 16


def test_relations_are_those_of_the_original() -> None:
    for case in cases("geneval-relation"):
        assert sorted(relations(case["a"], case["b"])) == sorted(case["relations"])


@pytest.mark.parametrize("case", cases("geneval-detection"), ids=lambda case: "x".join(map(str, case["original"])))
def test_detections_are_those_of_mmdetection(case: dict[str, Any]) -> None:
    sizes = (tuple(case[name]) for name in ("padded", "resized", "original"))
    things = detections(torch.tensor(case["class_logits"]), torch.tensor(case["mask_logits"]), *sizes)  # type: ignore[arg-type]
    assert [thing.label for thing in things] == [thing["class"] for thing in case["detections"]]
    for thing, expected in zip(things, case["detections"], strict=True):
        assert thing.mask is not None
        assert list(thing.box) == expected["box"] and thing.mask.sum() == expected["area"]
        assert thing.score == pytest.approx(expected["score"], abs=2e-6)


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((1024, 1024), (800, 800), (800, 800)),
        ((640, 480), (1067, 800), (1088, 800)),
        ((2000, 500), (1333, 333), (1344, 352)),
    ],
)
def test_the_network_sees_the_image_padded_and_not_stretched(
    size: tuple[int, int], resized: tuple[int, int], padded: tuple[int, int]
) -> None:
    pixels, inner = prepared(Image.new("RGB", size, "white"))
    assert inner == resized[::-1] and tuple(pixels.shape[2:]) == padded[::-1]
    assert (pixels[..., inner[0] :, :] == 0).all() and (pixels[..., inner[1] :] == 0).all()
    assert pixels[0, 0, 0, 0].item() == pytest.approx((1 - 0.485) / 0.229, abs=1e-5)


def test_colours_are_looked_at_without_what_is_around() -> None:
    pixels = np.zeros((10, 10, 3), np.uint8)
    pixels[2:5, 3:7] = 255, 0, 0
    mask = np.zeros((10, 10), bool)
    mask[2:5, 3:5] = True
    alone = np.asarray(_alone(Image.fromarray(pixels), Detection(0, 1.0, (2.6, 2.0, 6.4, 5.0), mask)))
    assert alone.shape == (3, 3, 3)
    assert (alone[:, :2] == (255, 0, 0)).all() and (alone[:, 2] == 0x99).all()
    assert _clip_pixels(Image.new("RGB", (30, 500))).shape == (3, 224, 224)


def test_a_checkout_of_another_revision_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps({"tag": "colors", "prompt": "x"}) + "\n")
    with pytest.raises(DataError, match=r"has 1 prompts, not the 553 of https://github.com/djghosh13/geneval at"):
        Geneval(checkout=tmp_path).items(4)
    with pytest.raises(DataError, match=r"evaluation_metadata_long.jsonl is not in"):
        Geneval("rewritten", tmp_path).items(4)
