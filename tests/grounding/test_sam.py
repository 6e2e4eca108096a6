"""SAM over small random checkpoints: loading, batching, frames, thresholds."""

from __future__ import annotations

import importlib.util
import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srum.geometry import rle_decode
from srum.grounding.base import GrounderError, load_grounder
from srum.grounding.sam import SamGrounder, point_grid, stability
from srum.records import Region
from tests.fakes import FakeModel

ANYTHING: dict[str, Any] = {"points_per_side": 3, "min_iou": 0.0, "min_stability": 0.0}


def masks(regions: list[Region]) -> list[np.ndarray]:
    return [rle_decode(region.mask) for region in regions if region.mask is not None]


def attentive(model: Any) -> Any:
    """The model with point prompts that count ten times, so that every point has a mask of its own."""
    embeddings = model.prompt_encoder
    for weight in (*embeddings.point_embed.parameters(), *embeddings.not_a_point_embed.parameters()):
        weight.data *= 10
    return model


def test_the_same_regions_as_the_processors_own_prompting_point_by_point(
    sam: Path, photographs: dict[str, Image.Image]
) -> None:
    """The grid, the padding, the batches and the way back to the image, against one call of SamProcessor a point.

    The masks of any two points differ in more than ten times as many pixels as ours may differ from theirs.
    """
    image = photographs["coffee"].resize((150, 100))
    processor = transformers.SamProcessor(transformers.SamImageProcessorPil.from_pretrained(sam))
    model = attentive(transformers.SamModel.from_pretrained(sam).eval())
    expected: list[tuple[float, np.ndarray]] = []
    for x, y in point_grid(3).tolist():
        inputs = processor(image, input_points=[[[150 * x, 100 * y]]], return_tensors="pt")
        inputs["input_points"] = inputs["input_points"].float()
        with torch.inference_mode():
            output = model(**inputs)
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        (logits,) = processor.post_process_masks(output.pred_masks, *sizes, binarize=False)
        for mask, iou in zip(logits[0], output.iou_scores[0, 0].tolist(), strict=True):
            if iou > 0 and (mask > 1).any():
                expected.append((iou, (mask > 0).numpy()))
    expected.sort(key=lambda pair: -pair[0])
    assert len(expected) > 5
    assert min((a != b).mean() for (_, a), (_, b) in combinations(expected, 2)) > 1e-2

    for points_per_batch in (1, 4, 64):
        grounder = SamGrounder(str(sam), points_per_batch=points_per_batch, max_overlap=1.0, **ANYTHING)
        attentive(grounder.model)
        found = masks(grounder.propose([image], [""])[0])
        assert len(found) == len(expected)
        for ours, (_, theirs) in zip(found, expected, strict=True):
            assert (ours != theirs).mean() < 1e-3


@pytest.mark.parametrize("family", ["sam", "sam_hq", "sam2"])
def test_the_image_is_embedded_once_and_regions_are_masks_of_it(
    family: str, request: pytest.FixtureRequest, photographs: dict[str, Image.Image]
) -> None:
    if family == "sam2":
        pytest.importorskip("torchvision", reason="SAM 2's image processor needs it")
    grounder = SamGrounder(str(request.getfixturevalue(family)), points_per_batch=2, **ANYTHING)
    calls: list[Any] = []
    grounder.model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    images = [photographs["rocket"].convert("RGB"), photographs["astronaut"]]
    proposals = grounder.propose(images, ["", ""])
    assert len(calls) == 2
    for image, regions in zip(images, proposals, strict=True):
        assert regions
        for region, mask in zip(regions, masks(regions), strict=True):
            x0, y0, x1, y1 = map(int, region.box)
            assert mask.shape == (image.height, image.width) and mask.sum() == region.area
            assert mask[y0:y1, x0:x1].sum() == region.area and region.source == "sam"
    assert grounder.propose(images[1:], [""]) == proposals[1:]


class Discs:
    """In place of a SAM of 64x64 px: one disc of 6 px around each point, in the frame of the points.

    It is the surer of it the later the point comes, row by row.
    """

    device = torch.device("cpu")
    config = SimpleNamespace(model_type="sam")

    def get_image_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.shape == (1, 3, 64, 64)
        return pixels

    def __call__(self, image_embeddings: Any, input_points: torch.Tensor, multimask_output: bool) -> SimpleNamespace:
        centres = (point_grid(64) * 64).reshape(64, 64, 2)
        points = input_points[0, :, 0]
        logits = 40 * (6 - (centres - points[:, None, None]).norm(dim=-1))
        ious = 0.9 + (points @ torch.tensor([1.0, 2.0])) / 2000
        return SimpleNamespace(pred_masks=logits[None, :, None], iou_scores=ious[None, :, None])


@pytest.mark.parametrize(("width", "height"), [(640, 400), (400, 640), (64, 64), (20, 50)])
def test_points_and_masks_are_in_the_frame_of_the_image(sam: Path, width: int, height: int) -> None:
    grounder = SamGrounder(str(sam), points_per_side=2, min_stability=0.5)
    grounder.model = Discs()
    (regions,) = grounder.propose([Image.new("RGB", (width, height))], [""])
    radius = 6 * max(width, height) / 64
    assert len(regions) == 4
    best_first = reversed((point_grid(2) * torch.tensor([width, height])).tolist())
    for region, (x, y) in zip(regions, best_first, strict=True):
        around = [x - radius, y - radius, x + radius, y + radius]
        assert region.box == pytest.approx(around, abs=0.6 * max(width, height) / 64 + 1)


def test_thresholds_leave_out_and_overlapping_masks_go(sam: Path, photographs: dict[str, Image.Image]) -> None:
    def found(**options: Any) -> list[Region]:
        return SamGrounder(str(sam), **{**ANYTHING, "max_overlap": 1.0, **options}).propose([image], [""])[0]

    image = photographs["astronaut"].resize((64, 64))
    everything = found()
    assert 0 < len(found(max_overlap=0.2)) < len(everything)
    assert len(found(min_stability=0.5)) < len(everything)
    assert found(min_iou=1.0) == [] or len(found(min_iou=1.0)) < len(everything)


@pytest.mark.parametrize("family", ["sam", "sam_hq"])
def test_an_image_without_a_mask_that_the_model_rates_highly_has_no_regions(
    family: str, request: pytest.FixtureRequest, photographs: dict[str, Image.Image]
) -> None:
    """A head of zeros predicts an IoU of 0 for every mask, which is not above 0."""
    grounder = SamGrounder(str(request.getfixturevalue(family)), **ANYTHING)
    for parameter in grounder.model.mask_decoder.iou_prediction_head.parameters():
        torch.nn.init.zeros_(parameter)
    assert grounder.propose([photographs["coffee"]], [""]) == [[]]


def test_a_large_image_is_taken_mask_by_mask(
    sam: Path, photographs: dict[str, Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    grounder = SamGrounder(str(sam), **ANYTHING)
    at_once = grounder.propose([photographs["coffee"]], [""])
    monkeypatch.setattr("srum.grounding.sam.PIXELS_AT_ONCE", 1)
    assert grounder.propose([photographs["coffee"]], [""]) == at_once


def test_the_grid_is_of_cell_centres() -> None:
    assert point_grid(1).tolist() == [[0.5, 0.5]]
    assert point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


@settings(max_examples=30)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_stability_is_a_share(logits: list[float]) -> None:
    """By hand: of (-2, 0, 0, 2) one pixel is above 1 and three are above -1, so 1/3."""
    assert stability(torch.tensor([[[-2.0, 0.0], [0.0, 2.0]]])).item() == pytest.approx(1 / 3)
    share = stability(torch.tensor(logits).reshape(1, 2, 2)).item()
    assert np.isnan(share) or 0 <= share <= 1


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is there")
def test_sam2_without_torchvision_says_what_it_needs(sam2: Path) -> None:
    with pytest.raises(GrounderError, match=r"(?i)cannot load .*torchvision"):
        load_grounder("sam", FakeModel(), checkpoint=str(sam2))


def test_checkpoints_that_cannot_be_used(sam: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(GrounderError) as error:
            load_grounder("sam", FakeModel(), checkpoint=str(folder))
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        return str(error.value)

    refused(tmp_path / "nowhere")
    refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert "it holds a clip model, expected one of sam, sam_hq, sam2" in refused(tmp_path)
    for file in sam.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 2000 if file.suffix == ".safetensors" else None])
    refused(tmp_path)
