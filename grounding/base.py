"""What proposes regions: the protocol, how a grounder is found by name, and what becomes of its proposals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image

from srum.errors import SrumError
from srum.geometry import clip_box, coverage, rle_decode, rle_encode
from srum.grounding.filtering import by_area, without_overlaps
from srum.images import ImageError, open_image, to_rgb
from srum.models.base import UnifiedModel
from srum.plugins import PluginError, construct, find_class, raised_by
from srum.records import Region, Size

SHIPPED = {
    "sam": "srum.grounding.sam:SamGrounder",
    "segment_anything": "srum.grounding.segment_anything:SegmentAnythingGrounder",
    "detector": "srum.grounding.detector:DetectorGrounder",
    "native": "srum.grounding.native:NativeGrounder",
    "classical": "srum.grounding.classical:ClassicalGrounder",
    "grid": "srum.grounding.grid:GridGrounder",
}
MESSAGE_LENGTH = 500  # characters of an error that a record keeps

Relevant = Callable[[Image, str, Sequence[Region]], list[Region]]


class GrounderError(SrumError, ValueError):
    """A grounder that cannot be found, made or loaded; the message is one line and says what is missing."""


class ProposalError(SrumError, ValueError):
    """Proposals for one image that are none: not regions, of another image's frame, or a reply without any."""


class Grounder(Protocol):
    """Proposes regions of images. Ids, order, number and overlaps are free: ``ground`` puts them in order."""

    def propose(self, images: Sequence[Image], prompts: Sequence[str]) -> Sequence[Sequence[Region] | ProposalError]:
        """Regions per RGB image, boxes (x0, y0, x1, y1) and masks in pixels of that image; ``prompts`` may be ignored.

        An image without regions has an empty list; an image that failed alone has its ProposalError in the list's
        place, and what is raised fails the call: its images are then tried one by one (``ground`` says which errors).
        """
        ...


def load_grounder(name: str, model: UnifiedModel | None, /, **options: Any) -> Grounder:
    """A shipped grounder by name, one of an installed package by its entry point, or a class by ``module:Class``.

    ``options`` are arguments of its constructor. A parameter called ``model`` receives the unified model, one called
    ``device``, unless it is among the options, that model's; a grounder that has no use for either needs no model. The
    current directory is importable. Raises GrounderError, also for options that the constructor has not or refuses and
    for a ValueError or OSError of a user's constructor; any other error inside a module is raised as it is.
    """
    try:
        return construct("grounder", name, find_class("grounder", name, "propose", SHIPPED), model, options)
    except PluginError as error:
        raise GrounderError(str(error)) from error.__cause__


def masked_region(index: int, mask: np.ndarray, source: str) -> Region:
    """The region of a binary mask (H, W) of the image, not empty; its box is the smallest of whole pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Region(id=index, box=box, mask=rle_encode(mask), area=float(mask.sum()), source=source)


def cannot_load(grounder: str, checkpoint: str | Path, error: Exception) -> GrounderError:
    """What to raise for a checkpoint that ``error`` refused; of its message the first line."""
    reason = str(error).strip() or type(error).__name__
    return GrounderError(f"{grounder}: cannot load {checkpoint}: {reason.splitlines()[0]}")


def ground(
    grounder: Grounder,
    images: Sequence[Image | Path],
    prompts: Sequence[str],
    max_regions: int,
    *,
    min_area: float = 0.0,
    max_area: float = 1.0,
    max_overlap: float = 1.0,
    relevant: Relevant | None = None,
) -> list[tuple[list[Region], str | None]]:
    """The regions of each image (or file of one), or an empty list and what went wrong, as ``Type: message``.

    Boxes are cut to the image. Of what is left, regions go whose area is not within the fractions ``min_area`` and
    ``max_area`` of the image or whose box has an IoU above ``max_overlap`` with one proposed before, then those that
    are not ``relevant``; of the others the ``max_regions`` largest stay, largest first, with ids from 1. The
    background, region 0, comes last: its box is the whole image, its area what the others leave; it is absent where
    they leave nothing.

    Errors, of one image each: ImageError (no image, or an empty one), ProposalError (nonsense, or boxes in a wrong
    frame), or what a user's grounder raises when asked about that image alone. An error is the grounder's where the
    innermost frame of its traceback that is the grounder's or ours is the grounder's: an error of a library that it
    calls is its own, one inside a module of this project is not, be it called by the grounder, and ends the stage.
    So does memory that has run out, wherever it does.
    """
    rgb: dict[int, Image] = {}
    outcomes: dict[int, tuple[list[Region], str | None]] = {}
    for index, image in enumerate(images):
        try:
            rgb[index] = open_image(image) if isinstance(image, Path) else to_rgb(image)
        except ImageError as error:
            outcomes[index] = [], _one_line(error)
    proposals = _propose(grounder, list(rgb.values()), [prompts[index] for index in rgb])
    for (index, image), proposal in zip(rgb.items(), proposals, strict=True):
        size = (image.height, image.width)
        proposed = _checked(proposal, size)
        if isinstance(proposed, Exception):
            outcomes[index] = [], _one_line(proposed)
            continue
        kept = without_overlaps(by_area(proposed, size, min_area, max_area), max_overlap)
        if relevant is not None:
            kept = relevant(image, prompts[index], kept)
        outcomes[index] = _finish(kept, size, max_regions), None
    return [outcomes[index] for index in range(len(images))]


def _propose(grounder: Grounder, images: Sequence[Image], prompts: Sequence[str]) -> list[Sequence[Region] | Exception]:
    """What the grounder returns for each image, or the exception that it raises for that image alone.

    Raises what is not the grounder's (``ground``).
    """
    if not images:
        return []
    try:
        answer = grounder.propose(images, prompts)
        if not isinstance(answer, Iterable):
            raise ProposalError(f"expected a list of regions per image, got {type(answer).__name__}")
        proposals = list(answer)
        if len(proposals) != len(images):
            raise ProposalError(f"{len(proposals)} lists of regions for {len(images)} images")
        return [*proposals]
    except Exception as error:
        if not _is_of(type(grounder), error):
            raise
        if len(images) == 1:
            return [error]
    return [
        outcome
        for image, prompt in zip(images, prompts, strict=True)
        for outcome in _propose(grounder, [image], [prompt])
    ]


def _is_of(grounder: type[Grounder], error: Exception) -> bool:
    """Whether an error is an outcome of one image, not a fault of ours nor memory that has run out (``ground``)."""
    if isinstance(error, ImageError | ProposalError):
        return True
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return False
    return raised_by(grounder.__module__, error)


def _checked(proposal: Sequence[Region] | Exception, size: Size) -> list[Region] | Exception:
    """The proposed regions, cut to an image of ``size`` (H, W), or what failed."""
    try:
        return proposal if isinstance(proposal, Exception) else _inside(proposal, size)
    except ProposalError as error:
        return error


def _inside(proposal: Sequence[Region], size: Size) -> list[Region]:
    """The proposed regions, cut to an image of ``size`` (H, W). Raises ProposalError for nonsense."""
    if not isinstance(proposal, Sequence):
        raise ProposalError(f"expected a list of regions, got {type(proposal).__name__}")
    inside = [cut for region in proposal if (cut := _cut(region, size)) is not None]
    if proposal and not inside:
        height, width = size
        raise ProposalError(
            f"none of {len(proposal)} regions covers a pixel of the image of {width}x{height}; the first has the box "
            f"{proposal[0].box}: are boxes (x0, y0, x1, y1) in pixels of the image?"
        )
    return inside


def _cut(region: Region, size: Size) -> Region | None:
    """The region with its box inside the image; None where less than a pixel is left."""
    if not isinstance(region, Region):
        raise ProposalError(f"expected a Region, got {type(region).__name__}")
    if region.mask is not None and region.mask.size != size:
        raise ProposalError(f"a mask of {region.mask.size} for an image of {size}")
    try:
        x0, y0, x1, y1 = box = clip_box(region.box, size)
        area = (x1 - x0) * (y1 - y0) if region.mask is None else float(rle_decode(region.mask).sum())
    except (TypeError, ValueError) as error:  # a box that was never checked, runs of a mask of another size
        raise ProposalError(f"{error}") from None
    if not (x0 < x1 and y0 < y1 and area >= 1):
        return None
    return region.model_copy(update={"box": box, "area": area})


def _finish(regions: Sequence[Region], size: Size, max_regions: int) -> list[Region]:
    """The largest regions of an image of ``size`` (H, W), sorted and numbered, and the background."""
    by_size = sorted(regions, key=lambda region: -region.area)[:max_regions]
    numbered = [region.model_copy(update={"id": index}) for index, region in enumerate(by_size, start=1)]
    return numbered + _background(numbered, size)


def _background(regions: Sequence[Region], size: Size) -> list[Region]:
    covered = torch.zeros(size, dtype=torch.float64)
    for region in regions:  # a pixel on the border of two boxes is covered by both together
        covered = (covered + _pixels(region, size)).clamp(max=1)
    height, width = size
    left = height * width - covered.sum().item()
    return [Region(id=0, box=(0, 0, width, height), area=left, source="background")] if left > 1e-6 else []


def _pixels(region: Region, size: Size) -> torch.Tensor:
    """Share (H, W) of each pixel that lies in the region."""
    if region.mask is not None:
        return torch.from_numpy(rle_decode(region.mask)).to(torch.float64)
    return coverage(torch.tensor([region.box], dtype=torch.float64), size, size)[0]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MESSAGE_LENGTH]
