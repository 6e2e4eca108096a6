"""SAM by the original ``segment_anything`` package, from its official .pth files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from pydantic import validate_call

from srum.config import Count, Fraction
from srum.grounding.base import GrounderError, cannot_load, masked_region
from srum.records import Region

SIZES = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # by the width of the image encoder


class SegmentAnythingGrounder:
    """The package's automatic mask generator over ``checkpoint``, a .pth file of any of the three sizes.

    Options as those of ``srum.grounding.sam.SamGrounder``. Raises GrounderError without the package or
    torchvision, and for a file that is no SAM checkpoint.
    """

    @validate_call
    def __init__(
        self,
        checkpoint: Path,
        points_per_side: Count = 32,
        points_per_batch: Count = 64,
        min_iou: Fraction = 0.88,
        min_stability: Fraction = 0.95,
        max_overlap: Fraction = 0.7,
        device: str = "cpu",
    ) -> None:
        try:
            from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
        except ImportError as error:
            raise GrounderError(f"segment_anything: {error}; pip install 'srum[sam]'") from error
        state = _read(checkpoint)
        model = sam_model_registry[SIZES[state["image_encoder.pos_embed"].shape[-1]]]()
        model.load_state_dict(state)
        self.generator = SamAutomaticMaskGenerator(
            model.to(device).eval(),
            points_per_side=points_per_side,
            points_per_batch=points_per_batch,
            pred_iou_thresh=min_iou,
            stability_score_thresh=min_stability,
            box_nms_thresh=max_overlap,
        )

    def propose(self, images: Sequence[Image], prompts: Sequence[str]) -> list[list[Region]]:
        """Regions with masks per RGB image, in no particular order; the prompts are not used."""
        return [
            [
                masked_region(index, found["segmentation"], "segment_anything")
                for index, found in enumerate(self.generator.generate(np.asarray(image)), start=1)
            ]
            for image in images
        ]


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that is no checkpoint the unpickler raises whatever its bytes lead to
        raise cannot_load("segment_anything", checkpoint, error) from error
    position = state.get("image_encoder.pos_embed") if isinstance(state, dict) else None
    if position is None or position.shape[-1] not in SIZES:
        raise GrounderError(f"segment_anything: {checkpoint} is no official SAM checkpoint")
    return state
