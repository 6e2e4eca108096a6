"""What training reads, and when: files at the visit alone, each process its own, and nothing of them stays open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import save_file
from torch import Tensor

from srum.config import TrainConfig
from srum.models.bagel import Bagel
from srum.models.base import Segment
from srum.processes import Processes
from srum.tensors import read_tensor, tensor_shape
from srum.train.examples import Example, draw_order
from srum.train.feed import Mix, Part
from srum.train.packs import measured, opened
from tests.train.ranks import CHECKPOINT

SHAPES = {"a": (16, 2, 6), "b": (16, 4, 4), "c": (16, 2, 2), "d": (16, 6, 4)}


@pytest.fixture
def latents(tmp_path: Path) -> dict[str, Path]:
    files = {name: tmp_path / f"{name}.safetensors" for name in SHAPES}
    for name, file in files.items():
        save_file({"latent": torch.randn(SHAPES[name])}, file)
    return files


def test_no_map_of_a_file_stays_open(latents: dict[str, Path]) -> None:
    """The kernel allows a process 65,530; two for every latent ended a training of 32,700 candidates."""
    kept = [read_tensor(file) for file in latents.values()]
    assert [tensor.shape for tensor in kept] == [tensor_shape(file) for file in latents.values()]
    maps = Path("/proc/self/maps")
    assert not maps.exists() or "a.safetensors" not in maps.read_text()


def test_a_length_is_that_of_what_is_opened_then(tmp_path: Path, latents: dict[str, Path]) -> None:
    """Also of a photograph that lies on its side, and of an image that is seen at a size of its own."""
    model = Bagel.load(CHECKPOINT)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (140, 42)).save(tmp_path / "lying.jpg", exif=exif)
    Image.new("RGBA", (57, 131)).save(tmp_path / "plain.png")
    for segment in (
        Segment("seen", image=tmp_path / "lying.jpg"),
        Segment("seen", image=tmp_path / "plain.png"),
        Segment("seen", image=tmp_path / "plain.png", side=42),
        Segment("clean", file=latents["a"]),
        Segment("noisy", file=latents["d"], loss=True),
    ):
        example = Example(id="x", segments=[segment, Segment("text", text="a red square")])
        assert measured(model, example) == model.length(opened(model, example).segments)


def test_a_process_reads_the_latents_of_its_packs_alone(
    latents: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes read two latents each, together all, and no credit of another's."""
    model, read = Bagel.load(CHECKPOINT), list[str]()

    def noted(file: Path) -> Tensor:
        read.append(file.stem)
        return read_tensor(file)

    monkeypatch.setattr("srum.train.packs.read_tensor", noted)
    monkeypatch.setattr(Processes, "total", lambda self, values: values)
    mix = Mix(
        [Part("", [Example(id=n, segments=[Segment("noisy", file=f, loss=True)]) for n, f in latents.items()], 4)]
    )
    config = TrainConfig(batch_size=4)
    shares = []
    for rank in range(2):
        mix.feed(model, config, 0, Processes(rank, 2)).step(0)
        shares.append(sorted(read))
        read.clear()
    assert sorted(shares[0] + shares[1]) == sorted(latents) and all(shares)


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    permuted = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **how: drawn.append(n) or permuted(n, **how))
    steps = [draw_order(1009, first, first + 7, seed=20) for first in range(0, 2018, 7)]
    places = [index for step in steps for epoch, index in step if epoch == 1]
    assert drawn == [1009, 1009, 1009] and sorted(places) == list(range(1009))
