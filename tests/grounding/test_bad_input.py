"""What cannot be grounded costs its own image and says why: files that are no image, grounders that talk nonsense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srum.geometry import rle_encode
from srum.grounding.base import ground
from srum.grounding.classical import ClassicalGrounder
from srum.grounding.grid import GridGrounder
from srum.images import to_rgb
from srum.records import MaskRLE, Region

GREY = (240, 240, 240)


def drawn(mode: str = "RGB") -> Image.Image:
    """A red square of 20 px at (10, 20) on grey, 64x48 px."""
    image = Image.new("RGB", (64, 48), GREY)
    image.paste((220, 30, 30), (10, 20, 30, 40))
    return image.convert(mode)


# --- images


def transparent() -> Image.Image:
    """The square on black that is fully transparent."""
    image = drawn("RGBA")
    pixels = np.asarray(image).copy()
    outside = (pixels[..., :3] == GREY).all(axis=-1)
    pixels[outside] = 0
    return Image.fromarray(pixels)


def sixteen_bits() -> Image.Image:
    grey = np.asarray(drawn("L")).astype(np.uint16)
    return Image.fromarray(grey * 257)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(
    ("image", "colour", "ground_colour"),
    [
        (drawn(), (220, 30, 30), GREY),
        (drawn("P"), None, None),
        (drawn("CMYK"), (220, 30, 30), GREY),
        (drawn("L"), (87, 87, 87), GREY),
        (drawn("1").convert("L").convert("1"), None, None),
        (transparent(), (220, 30, 30), (255, 255, 255)),
        (transparent().convert("LA"), (87, 87, 87), (255, 255, 255)),
        (sixteen_bits(), (87, 87, 87), GREY),
    ],
    ids=["RGB", "palette", "CMYK", "grey", "bilevel", "transparent", "transparent grey", "16 bit"],
)
def test_every_mode_is_seen_in_rgb(
    image: Image.Image,
    colour: tuple[int, int, int] | None,
    ground_colour: tuple[int, int, int] | None,
    suffix: str,
    tmp_path: Path,
) -> None:
    if image.mode == "CMYK" and suffix == ".png":
        suffix = ".jpg"  # the format that has them
    image.save(tmp_path / f"image{suffix}")
    seen: list[Image.Image] = []

    class Looks(ClassicalGrounder):
        def propose(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[list[Region]]:
            seen.extend(images)
            return super().propose(images, prompts)

    ((regions, error),) = ground(Looks(), [tmp_path / f"image{suffix}"], ["p"], max_regions=8)
    assert error is None and seen[0].mode == "RGB" and seen[0].size == (64, 48)
    if colour is not None:
        assert np.abs(np.asarray(seen[0])[30, 20].astype(int) - colour).max() <= 2
        assert np.abs(np.asarray(seen[0])[5, 5].astype(int) - ground_colour).max() <= 2  # type: ignore[operator]
        assert regions[0].box == pytest.approx((10, 20, 30, 40), abs=2) and regions[-1].id == 0


def test_rgb_stays_as_it_is() -> None:
    image = drawn()
    assert to_rgb(image).tobytes() == image.tobytes()


def test_files_that_are_no_image(tmp_path: Path) -> None:
    drawn().save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("I am an image.")
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[20] ^= 255  # in the header, which has a checksum
    (tmp_path / "damaged.png").write_bytes(damaged)
    (tmp_path / "bomb.png").write_bytes(b"P6 20000 20000 255 ")  # Pillow goes by the content: 1.2 GB are announced
    (tmp_path / "folder.png").mkdir()
    names = ["good", "empty", "text", "truncated", "damaged", "bomb", "folder", "missing", "good"]
    outcomes = ground(GridGrounder(), [tmp_path / f"{name}.png" for name in names], ["p"] * len(names), max_regions=9)
    for name, (regions, error) in zip(names, outcomes, strict=True):
        if name == "good":
            assert error is None and len(regions) == 9
        else:
            assert regions == [] and error is not None and "\n" not in error
            assert error.startswith("ImageError: ") and f"{name}.png" in error


def test_an_image_without_pixels() -> None:
    outcomes = ground(GridGrounder(), [Image.new("RGB", (0, 5)), drawn()], ["p", "p"], max_regions=8)
    assert outcomes[0] == ([], "ImageError: an image of 0x5 pixels")
    assert outcomes[1][1] is None


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3000, 2000)])
def test_tiny_thin_and_large_images(size: tuple[int, int]) -> None:
    for grounder in (ClassicalGrounder(), GridGrounder(1)):
        ((regions, error),) = ground(grounder, [Image.new("RGB", size, "red")], ["p"], max_regions=8)
        assert error is None and [region.box for region in regions] == [(0, 0, *size)]


# --- grounders


class Says:
    """Proposes the same for every image, and an empty list for one of 1x1."""

    def __init__(self, proposal: Any) -> None:
        self.proposal = proposal

    def propose(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Any]:
        return [[] if image.size == (1, 1) else self.proposal for image in images]


def region(x0: float, y0: float, x1: float, y1: float) -> Region:
    return Region(id=7, box=(x0, y0, x1, y1), area=1, source="test")


UNCHECKED = {"id": 1, "area": 1.0, "source": "test", "mask": None, "label": None}
SMALL_MASK = rle_encode(np.ones((3, 3)))
BROKEN_MASK = MaskRLE(size=(48, 64), counts=[1, 2, 3])


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        (None, "expected a list of regions, got NoneType"),
        (3, "expected a list of regions, got int"),
        ([(0, 0, 1, 1)], "expected a Region, got tuple"),
        ("boxes", "expected a Region, got str"),
        ([region(70, 0, 90, 10), region(0, 50, 9, 60)], "none of 2 regions covers a pixel of the image of 64x48"),
        ([region(0.1, 0.2, 0.5, 0.9)], "none of 1 regions covers a pixel"),  # in shares of the image
        ([Region.model_construct(box=(float("nan"), 0, 9, 9), **UNCHECKED)], "none of 1 regions covers a pixel"),
        ([Region.model_construct(box=(9, 9, 2, 2), **UNCHECKED)], "none of 1 regions covers a pixel"),
        ([region(0, 0, 9, 9).model_copy(update={"mask": SMALL_MASK})], "a mask of (3, 3) for an image of (48, 64)"),
        ([region(0, 0, 9, 9).model_copy(update={"mask": BROKEN_MASK})], "runs of a mask 48x64 sum to 6"),
        ([Region.model_construct(box=None, **UNCHECKED)], ""),
        ([Region.model_construct(box=("a", 0, 9, 9), **UNCHECKED)], ""),
    ],
)
def test_nonsense_costs_its_image(proposal: Any, message: str) -> None:
    bad, good = ground(Says(proposal), [drawn(), Image.new("RGB", (1, 1))], ["p", "p"], max_regions=8)
    assert bad[0] == [] and bad[1] is not None and message in bad[1] and "Error: " in bad[1]
    assert good == ([region(0, 0, 1, 1).model_copy(update={"id": 0, "area": 1.0, "source": "background"})], None)


def test_a_region_that_cannot_be_made_is_the_grounders_own_error() -> None:
    """Inverted, empty and NaN boxes are refused where the grounder makes its Region."""

    class Inverted:
        def propose(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[list[Region]]:
            return [[region(9, 9, 2, 2)] for _ in images]

    ((regions, error),) = ground(Inverted(), [drawn()], ["p"], max_regions=8)
    assert regions == [] and error is not None and error.startswith("ValidationError: ") and "inverted" in error
    with pytest.raises(ValueError, match="finite"):
        region(float("nan"), 0, 1, 1)


def test_boxes_partly_outside_are_cut_and_the_others_stay() -> None:
    proposal = [region(-5, -5, 10, 10), region(60, 40, 1000, 1000), region(100, 100, 200, 200)]
    ((regions, error),) = ground(Says(proposal), [drawn()], ["p"], max_regions=8)
    assert error is None
    assert [(r.id, r.box) for r in regions[:-1]] == [(1, (0, 0, 10, 10)), (2, (60, 40, 64, 48))]


def test_thousands_of_proposals() -> None:
    rng = np.random.default_rng(0)
    sides = rng.uniform([0, 0, 2], [40, 40, 8], (5000, 3)).tolist()
    proposal = [region(x, y, x + side, y + side) for x, y, side in sides]
    ((regions, error),) = ground(Says(proposal), [drawn()], ["p"], max_regions=8, max_overlap=0.5)
    assert error is None and len(regions) == 9


def test_a_long_error_is_cut_to_one_line() -> None:
    class Verbose:
        def propose(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[list[Region]]:
            raise RuntimeError("line\n" * 1000)

    ((_, error),) = ground(Verbose(), [drawn()], ["p"], max_regions=8)
    assert error is not None and error.startswith("RuntimeError: line line") and len(error) == 500
