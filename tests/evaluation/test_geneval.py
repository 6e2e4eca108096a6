"""GenEval: what the original scorer decides, on its cases; the network's inputs; the layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from srum.evaluation import detection
from srum.evaluation.benchmarks.geneval import Geneval, faults, relations, selected
from srum.evaluation.data import DataError
from srum.evaluation.detection import (
    COLOURS,
    LEAST,
    Detection,
    Mask2FormerClip,
    _alone,
    _clip_pixels,
    detections,
    prepared,
)
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


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Mask2Former and a CLIP of small random weights, as transformers writes them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("geneval")
    swin = transformers.SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    small = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 2, "num_queries": 6}
    small |= {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
    config = transformers.Mask2FormerConfig(backbone_config=swin, num_labels=80, **small)
    detector = transformers.Mask2FormerForUniversalSegmentation(config)
    detector.class_predictor.weight.data.mul_(60)  # sure of what it sees
    detector.save_pretrained(folder / "mask2former")
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 64, "max_position_embeddings": 77, "eos_token_id": 1, "bos_token_id": 0}
    clip = transformers.CLIPConfig(
        text_config=part | text, vision_config=part | {"image_size": 224, "patch_size": 56}, projection_dim=8
    )
    transformers.CLIPModel(clip).save_pretrained(folder / "clip")
    letters = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), "-</w>"]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters]
    tokenizer = transformers.CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    tokenizer.save_pretrained(folder / "clip")
    return folder / "mask2former", folder / "clip"


def test_the_networks_find_objects_and_tell_colours(
    networks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection, "SHORT", 96)
    evaluator = Mask2FormerClip("cpu", str(networks[0]), str(networks[1]))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    things = evaluator.detect(image)
    assert things and all(LEAST < thing.score <= 1 for thing in things)
    assert [thing.score for thing in things] == sorted((thing.score for thing in things), reverse=True)
    for thing in things:
        assert thing.mask is not None and thing.mask.shape == (90, 120)
        rows, columns = np.nonzero(thing.mask)
        assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    told = evaluator.colours(image, things[:2], "cup")
    assert len(told) == len(things[:2]) and set(told) <= set(COLOURS)
    alone = [evaluator.colours(image, [thing], "cup")[0] for thing in things[:2]]
    assert alone == told
    features = evaluator._colours_of("cup")
    assert features.shape == (10, 8) and torch.allclose(features.norm(dim=1), torch.ones(10))
