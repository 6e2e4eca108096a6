"""Every grounder that needs no download, end to end on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srum import models
from srum.geometry import rle_decode
from srum.grounding.base import ground, load_grounder


@pytest.mark.parametrize("name", ["classical", "grid", "sam", "native"])
def test_photographs(name: str, photographs: dict[str, Image.Image], sam: Path) -> None:
    options: dict[str, Any] = {}
    images = list(photographs.values())
    if name == "sam":
        options = {"checkpoint": str(sam), "points_per_side": 3, "min_iou": 0.0, "min_stability": 0.0}
    if name == "native":
        images = [image.convert("RGB").resize((64, 64)) for image in images[:2]]  # what the embedded model can see
        options = {"max_tokens": 40}  # a reply that is cut off is read as far as it goes
    grounder = load_grounder(name, models.load("srum-tiny") if name == "native" else None, **options)
    outcomes = ground(grounder, images, [""] * len(images), max_regions=12, max_overlap=0.9)
    assert name == "native" or all(error is None and len(regions) > 1 for regions, error in outcomes)
    for image, (regions, error) in zip(images, outcomes, strict=True):
        assert (error is None) == bool(regions)
        covered = np.zeros((image.height, image.width), bool)
        for region in (region for region in regions if region.id != 0):
            x0, y0, x1, y1 = region.box
            assert 0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height
            if region.mask is not None:
                mask = rle_decode(region.mask)
                assert mask.sum() == region.area == mask[int(y0) : int(y1), int(x0) : int(x1)].sum()
                covered |= mask
        if covered.any():
            assert [region.area for region in regions if region.id == 0] == pytest.approx([(~covered).sum()])
