"""SAM by transformers: every mask that a grid of points finds in an image, without a prompt.

As the automatic mask generator of the original package: each point of the grid gives masks, those stay that the model
rates highly and that hardly change with the threshold, and of masks with nearly the same box the best rated stays.
Left out: crops of the image, and the removal of small islands and holes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL.Image import Image
from pydantic import validate_call
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForMaskGeneration

from srum.config import Count, Fraction
from srum.grounding.base import cannot_load, masked_region
from srum.grounding.filtering import without_overlaps
from srum.records import Region

FAMILIES = ("sam", "sam_hq", "sam2", "sam2_video")  # model types; SAM 3 is prompted with concepts, not with points
STABILITY_OFFSET = 1.0  # of the mask logits, both ways
PIXELS_AT_ONCE = 2**25  # mask logits at the size of the image that are in memory together


class SamGrounder:
    """SAM, SAM-HQ or SAM 2 from ``checkpoint``, a folder that transformers wrote or a name on the hub.

    ``points_per_side``: the grid has so many points along each side, and ``points_per_batch`` go through the mask
    decoder at a time. ``min_iou``: masks stay above this IoU, as the model predicts it. ``min_stability``: masks stay
    whose IoU between a stricter and a looser threshold is above this. ``max_overlap``: IoU of boxes above which the
    mask of lower predicted IoU goes. ``device``: where it runs. Raises GrounderError for a checkpoint that cannot
    be used, such as SAM 2's without torchvision, which its image processor needs.
    """

    @validate_call
    def __init__(
        self,
        checkpoint: str = "facebook/sam-vit-base",
        points_per_side: Count = 32,
        points_per_batch: Count = 64,
        min_iou: Fraction = 0.88,
        min_stability: Fraction = 0.95,
        max_overlap: Fraction = 0.7,
        device: str = "cpu",
    ) -> None:
        self.model, self.processor = _load(checkpoint, device)
        self.points_per_side = points_per_side
        self.points_per_batch = points_per_batch
        self.min_iou = min_iou
        self.min_stability = min_stability
        self.max_overlap = max_overlap

    def propose(self, images: Sequence[Image], prompts: Sequence[str]) -> list[list[Region]]:
        """Regions with masks per RGB image, by falling predicted IoU; the prompts are not used."""
        return [self._regions(image) for image in images]

    @torch.inference_mode()
    def _regions(self, image: Image) -> list[Region]:
        inputs = self.processor(image, return_tensors="pt").to(self.model.device)
        pixels = inputs["pixel_values"]
        # SAM and SAM-HQ pad the resized image, whose frame that of the points is; SAM 2 stretches it over the whole.
        sizes = {key: inputs[key].tolist() for key in ("original_sizes", "reshaped_input_sizes") if key in inputs}
        height, width = sizes.get("reshaped_input_sizes", [pixels.shape[-2:]])[0]
        points = (point_grid(self.points_per_side) * torch.tensor([width, height])).to(pixels)
        embeddings = self._embed(pixels)
        rated: list[tuple[float, Region]] = []
        for some in points.split(self.points_per_batch):
            output = self.model(**embeddings, input_points=some[None, :, None], multimask_output=True)
            rated += self._masks(output.pred_masks[0].flatten(0, 1), output.iou_scores[0].flatten(), sizes)
        best_first = sorted(rated, key=lambda pair: -pair[0])
        return without_overlaps([region for _, region in best_first], self.max_overlap)

    def _embed(self, pixels: Tensor) -> dict[str, Any]:
        """What the decoder needs of the image, computed once for all points."""
        embeddings = self.model.get_image_embeddings(pixels)
        if self.model.config.model_type == "sam_hq":
            return {"image_embeddings": embeddings[0], "intermediate_embeddings": embeddings[1]}
        return {"image_embeddings": embeddings}

    def _masks(self, logits: Tensor, ious: Tensor, sizes: dict[str, Any]) -> Iterator[tuple[float, Region]]:
        """Predicted IoU and region of the good ones among low-resolution ``logits`` (N, h, w), of ``ious`` (N,)."""
        good = ious > self.min_iou
        if not good.any():  # the processor enlarges no empty batch
            return
        height, width = sizes["original_sizes"][0]
        at_once = max(1, PIXELS_AT_ONCE // (height * width))
        for some, rating in zip(logits[good].split(at_once), ious[good].split(at_once), strict=True):
            (enlarged,) = self.processor.post_process_masks([some[None]], **sizes, binarize=False)
            stable = stability(enlarged[0]) > self.min_stability
            masks = (enlarged[0][stable] > 0).cpu().numpy()
            for mask, iou in zip(masks, rating[stable].tolist(), strict=True):
                yield iou, masked_region(1, mask, "sam")


def point_grid(side: int) -> Tensor:
    """Points (side * side, 2), (x, y) in [0, 1], row by row: the centres of the cells of a grid over the image."""
    centres = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def stability(logits: Tensor) -> Tensor:
    """IoU (N,), in [0, 1], of masks (N, H, W) cut from ``logits`` at a higher and at a lower threshold than 0.

    NaN where both are empty.
    """
    inner = (logits > STABILITY_OFFSET).flatten(1).sum(dim=1)
    outer = (logits > -STABILITY_OFFSET).flatten(1).sum(dim=1)
    return inner / outer


def _load(checkpoint: str, device: str) -> tuple[Any, Any]:
    """The model, in float32 on ``device``, and its image processor."""
    try:
        family = AutoConfig.from_pretrained(checkpoint).model_type
        if family not in FAMILIES:
            raise ValueError(f"it holds a {family} model, expected one of {', '.join(FAMILIES)}")
        processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        model = AutoModelForMaskGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise cannot_load("sam", checkpoint, error) from error
    return model.to(device).eval(), processor
