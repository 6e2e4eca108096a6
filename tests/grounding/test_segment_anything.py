"""The original package: what is asked of it, by a stand-in; the package itself where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from srum.grounding.base import GrounderError, ground, load_grounder
from tests.fakes import FakeModel


class FakeSam(nn.Module):
    """As wide as the smallest SAM, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Module()
        self.image_encoder.pos_embed = nn.Parameter(torch.ones(1, 2, 2, 768))


class FakeGenerator:
    """Two masks an image: the left half and the upper left quarter."""

    def __init__(self, model: FakeSam, **options: Any) -> None:
        assert not model.training and model.image_encoder.pos_embed.sum() == 0  # type: ignore[union-attr, operator]
        self.options = options

    def generate(self, rgb: np.ndarray) -> list[dict[str, Any]]:
        half = np.zeros(rgb.shape[:2], bool)
        half[:, : rgb.shape[1] // 2] = True
        quarter = half.copy()
        quarter[rgb.shape[0] // 2 :] = False
        return [{"segmentation": quarter}, {"segmentation": half}]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("segment_anything")
    module.SamAutomaticMaskGenerator = FakeGenerator  # type: ignore[attr-defined]
    module.sam_model_registry = {"vit_b": FakeSam}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "segment_anything", module)


def load(checkpoint: Path, **options: Any) -> Any:
    return load_grounder("segment_anything", FakeModel(), checkpoint=str(checkpoint), **options)


@pytest.mark.usefixtures("package")
def test_masks_become_regions_and_options_reach_the_generator(tmp_path: Path) -> None:
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 2, 2, 768)}, tmp_path / "sam_vit_b.pth")
    grounder = load(tmp_path / "sam_vit_b.pth", points_per_side=7, min_iou=0.5)
    assert grounder.generator.options["points_per_side"] == 7
    assert grounder.generator.options["pred_iou_thresh"] == 0.5
    ((regions, error),) = ground(grounder, [Image.new("RGB", (20, 10))], [""], max_regions=8)
    assert error is None
    assert [(r.box, r.area, r.source) for r in regions] == [
        ((0, 0, 10, 10), 100, "segment_anything"),
        ((0, 0, 10, 5), 50, "segment_anything"),
        ((0, 0, 20, 10), 100, "background"),
    ]


@pytest.mark.usefixtures("package")
def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").touch()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(FakeSam(), tmp_path / "code.pth")  # a pickle that would run code
    for name in ("missing", "text", "empty", "other", "code"):
        with pytest.raises(GrounderError, match=f"{name}.pth"):
            load(tmp_path / f"{name}.pth")


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(GrounderError, match=r"pip install 'srum\[sam\]'"):
        load(tmp_path / "sam_vit_b.pth")


@pytest.mark.slow
def test_the_package_itself_over_random_weights(tmp_path: Path, photographs: dict[str, Image.Image]) -> None:
    segment_anything = pytest.importorskip("segment_anything")
    torch.save(segment_anything.sam_model_registry["vit_b"]().state_dict(), tmp_path / "sam_vit_b.pth")
    grounder = load(tmp_path / "sam_vit_b.pth", points_per_side=2, min_iou=0.0, min_stability=0.0)
    ((regions, error),) = ground(grounder, [photographs["coffee"]], [""], max_regions=8)
    assert error is None and regions[-1].source == "background"
