"""What proposes regions: the protocol, how a grounder is found by name, and the checks on what it returns."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from PIL.Image import Image

from grounding.classical import ClassicalGrounder
from grounding.filtering import largest
from grounding.grid import GridGrounder
from grounding.native import NativeGrounder
from srum.geometry import clip_box, coverage, rle_decode
from srum.models.base import UnifiedModel
from srum.records import Region, Size

SHIPPED = ("classical", "native", "grid")


class Grounder(Protocol):
    """Proposes regions of images. Ids, order, number and overlaps are free: ``ground`` puts them in order."""

    def propose(self, images: Sequence[Image], prompts: Sequence[str]) -> list[list[Region]]:
        """Regions per image, boxes (x0, y0, x1, y1) and masks in pixels of that image. ``prompts`` may be ignored."""
        ...


class GrounderError(ValueError):
    """A grounder that cannot be found; the message is one line and says what was looked for."""


def load_grounder(name: str, model: UnifiedModel) -> Grounder:
    """A shipped grounder by name, or the user's class by ``module:Class``, made without arguments.

    The current directory is importable. Raises GrounderError; an error inside the user's module is raised as it is.
    """
    if name == "classical":
        return ClassicalGrounder()
    if name == "native":
        return NativeGrounder(model)
    if name == "grid":
        return GridGrounder()
    return _load_class(name)()


def ground(
    grounder: Grounder, images: Sequence[Image], prompts: Sequence[str], max_regions: int
) -> list[tuple[list[Region], str | None]]:
    """The regions of each image, or an empty list and what went wrong.

    Boxes are cut to the image, the ``max_regions`` largest regions stay, largest first, with ids from 1. The
    background, region 0, comes last: its box is the whole image, its area what the others leave; it is absent where
    they leave nothing. When a batch fails, by an exception or by nonsense, its images are tried one by one.
    """
    try:
        proposals = grounder.propose(images, prompts)
        if len(proposals) != len(images):
            raise ValueError(f"{len(proposals)} lists of regions for {len(images)} images")
        return [
            (_finish(regions, (image.height, image.width), max_regions), None)
            for regions, image in zip(proposals, images, strict=True)
        ]
    except Exception as error:
        if len(images) == 1:
            return [([], f"{type(error).__name__}: {error}")]
    return [
        outcome
        for image, prompt in zip(images, prompts, strict=True)
        for outcome in ground(grounder, [image], [prompt], max_regions)
    ]


def _load_class(name: str) -> type[Grounder]:
    module_name, colon, class_name = name.partition(":")
    if not (module_name and colon and class_name):
        raise GrounderError(f"no grounder {name!r}: give one of {', '.join(SHIPPED)} or module:Class")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, something that it imports does not
        raise GrounderError(f"grounder {name!r}: no module {error.name!r} here or installed") from None
    grounder = getattr(module, class_name, None)
    if not isinstance(grounder, type):
        raise GrounderError(f"grounder {name!r}: {module_name} has no class {class_name!r}")
    if not callable(getattr(grounder, "propose", None)):
        raise GrounderError(f"grounder {name!r}: {class_name} has no method propose(images, prompts)")
    return grounder


def _finish(regions: Sequence[Region], size: Size, max_regions: int) -> list[Region]:
    """Checked, cut, sorted and numbered regions of an image of ``size`` (H, W), and the background."""
    inside = [cut for region in regions if (cut := _cut(region, size)) is not None]
    by_size = sorted(largest(inside, max_regions), key=lambda region: -region.area)
    numbered = [region.model_copy(update={"id": index}) for index, region in enumerate(by_size, start=1)]
    return numbered + _background(numbered, size)


def _cut(region: Region, size: Size) -> Region | None:
    """The region with its box inside the image; None where nothing is left. Raises for what is no region."""
    if not isinstance(region, Region):
        raise TypeError(f"expected a Region, got {type(region).__name__}")
    if region.mask is not None and region.mask.size != size:
        raise ValueError(f"a mask of {region.mask.size} for an image of {size}")
    x0, y0, x1, y1 = box = clip_box(region.box, size)
    if not (x0 < x1 and y0 < y1):
        return None
    if region.mask is None:
        return region.model_copy(update={"box": box, "area": (x1 - x0) * (y1 - y0)})
    pixels = int(rle_decode(region.mask).sum())
    return region.model_copy(update={"box": box, "area": float(pixels)}) if pixels else None


def _background(regions: Sequence[Region], size: Size) -> list[Region]:
    covered = torch.zeros(size, dtype=torch.float64)
    for region in regions:
        covered = torch.maximum(covered, _pixels(region, size))
    height, width = size
    left = height * width - covered.sum().item()
    return [Region(id=0, box=(0, 0, width, height), area=left, source="background")] if left > 1e-6 else []


def _pixels(region: Region, size: Size) -> torch.Tensor:
    """Share (H, W) of each pixel that lies in the region."""
    if region.mask is not None:
        return torch.from_numpy(rle_decode(region.mask)).to(torch.float64)
    return coverage(torch.tensor([region.box], dtype=torch.float64), size, size)[0]
