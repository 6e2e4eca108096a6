"""OpenUni (docs/specs/openuni.md): what ``srum.models.queries`` leaves to an architecture.

Its parts are language model, generator and autoencoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from PIL.Image import Image
from torch import Tensor, nn

from srum.errors import ModelError
from srum.geometry import Box, Size
from srum.models.base import Sampling, Segment
from srum.models.checkpoints import read_into
from srum.models.openuni import chat, solver
from srum.models.openuni.checkpoint import (
    TRANSFORMER,
    check,
    empty_generator,
    load_autoencoder,
    load_internvl,
    read_headers,
    save_checkpoint,
)
from srum.models.openuni.config import INTERNVL, OpenUniConfig
from srum.models.openuni.generator import Conditioner, OpenUniGenerator
from srum.models.openuni.images import levels, pixels, seen_asked, seen_drawn, squared
from srum.models.openuni.language import InternVL
from srum.models.pixels import crop_box
from srum.models.precision import computing
from srum.models.queries.chat import Part
from srum.models.queries.language import Run
from srum.models.queries.model import QueryModel, batches
from srum.models.queries.sampler import Step, even_schedule

CODED = 8  # images per pass of the autoencoder
FRAME = (1000, 1000)  # in whose units InternVL3 names boxes


class OpenUni(QueryModel[OpenUniGenerator, InternVL]):
    """An OpenUni checkpoint of any size. Meets ``TrainableModel``."""

    name = "OpenUni"
    special = ("<|im_end|>", chat.IMAGE, "</img>")
    always = ([],)  # the request for just any image, which guidance compares with
    config: OpenUniConfig

    # ---------------------------------------------------------------- parts

    def open(self, folder: Path) -> None:
        """Read headers, and check that they fit."""
        self.headers = read_headers(folder)
        self.config = OpenUniConfig.from_folder(folder, self.headers)
        check(folder, self.config, self.headers)

    @property
    def tokenizer_folder(self) -> Path:
        """Its own, or InternVL3's."""
        own = self.folder / "tokenizer"
        return own if own.is_dir() else self.folder / INTERNVL

    def empty_network(self) -> OpenUniGenerator:
        """Queries, connector, projector and diffusion transformer."""
        return empty_generator(self.folder, self.config)

    def fill(self, generator: OpenUniGenerator) -> None:
        """From the folder's files, which have our names."""
        read_into(generator, self.headers, str)

    def load_language(self) -> InternVL:
        """InternVL3."""
        return InternVL(load_internvl(self.config, self.headers, self.device, self.computed_in))

    def stored_queries(self) -> Tensor:
        """(Q, H)."""
        return self.headers.read("meta_queries")

    @cached_property
    def autoencoder(self) -> AutoencoderDC:
        """What makes latents of images, and images of latents."""
        return load_autoencoder(self.folder, self.config, self.headers, self.device, self.computed_in)

    def save(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, *, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the layout: the generator's ``weights`` as ``dtype``, all else as it is in the model's folder.

        Raises ModelError for that folder itself.
        """
        weights = self.network.state_dict() if weights is None else weights
        cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in weights.items()}
        save_checkpoint(self.folder, Path(folder), self.headers, cast)

    def layers(self) -> list[nn.Module]:
        """Those of the diffusion transformer: what training shards, and may recompute, one by one."""
        return list(self.network.transformer.transformer_blocks)

    def generation_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The diffusion transformer: with all before it frozen a prompt's condition is computed once."""
        return [(name, p) for name, p in self.network.named_parameters() if name.startswith(TRANSFORMER)]

    # ---------------------------------------------------------------- images and latents

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(C, h, w). Raises ModelError unless both sides are whole latents."""
        shrinks = self.config.shrinks
        if size[0] % shrinks or size[1] % shrinks or min(size) < shrinks:
            raise ModelError(f"image size {size} is not a multiple of {shrinks} pixels")
        return self.config.channels, size[0] // shrinks, size[1] // shrinks

    def resized(self, image: Image) -> Image:
        """The middle square of the image, at the size of the images that the model was trained on."""
        return squared(image, self.config.side)

    def crop_box(self, size: Size) -> Box:
        """Which part of an image of ``size`` (H, W) ``resized`` shows, in its pixels."""
        return crop_box(size)

    def box_frame(self, size: Size) -> Size:
        """(H, W) of the frame in whose units the language model names boxes, whatever the image."""
        return FRAME

    @torch.no_grad()
    def encode(self, images: Sequence[Image]) -> list[Tensor]:
        """Latents (C, h, w) of the middle squares of images, scaled."""
        made: list[Tensor] = []
        for some in batches([pixels(self.resized(image)) for image in images], CODED):
            values = torch.stack(list(some)).to(self.device, self.computed_in)
            made += self.autoencoder.encode(values).latent.float().cpu() * self.autoencoder.config.scaling_factor
        return made

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> list[Image]:
        """Images of scaled latents of any shapes."""
        return [levels(self.decoded(latent[None]))[0] for latent in latents]

    def decoded(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), in [-1, 1] but for what goes beyond, of scaled latents (B, C, h, w)."""
        values = (latents / self.autoencoder.config.scaling_factor).to(self.device, self.computed_in)
        decoded: Tensor = self.autoencoder.decode(values).sample.float()
        return decoded

    def rendered(
        self, latents: Sequence[Tensor], sizes: Sequence[Size], seeds: Sequence[int], sampling: Sampling
    ) -> list[Image]:
        """What the latents decode to, whose sizes these are."""
        return self.decode(latents)

    def schedule(self, sampling: Sampling, explored: bool) -> Tensor:
        """Sana's timesteps; random steps take those of Euler's, which begin at noise."""
        return even_schedule(sampling) if explored else solver.schedule(sampling)

    def solver(self) -> Step:
        """DPM-Solver++."""
        return solver.Multistep().step

    # ---------------------------------------------------------------- words

    def seen(self, images: Sequence[Image], drawn: bool) -> list[Run]:
        """One tile of each. Images that are drawn after are first cropped as those that are drawn."""
        if not images:
            return []
        side = self.config.seen_side
        if drawn:
            return self.language.images(seen_drawn([pixels(self.resized(image)) for image in images], side))
        return self.language.images(seen_asked(images, side))

    @property
    def seen_tokens(self) -> int:
        """Of any image."""
        return self.config.seen_tokens

    def asked(self, context: Sequence[Segment]) -> list[Part]:
        """The conversation up to where the assistant answers."""
        return chat.asked(context, self.text_of)

    def requested(self, context: Sequence[Segment]) -> list[Part]:
        """The conversation up to the marker before the queries."""
        return chat.requested(context, self.text_of)

    def conditioned(self, contexts: Sequence[Sequence[Segment] | None]) -> Tensor:
        """What the connector and the projector make of the states of the queries, (B, Q, D)."""
        states = self.behind([self.requested(context or []) for context in contexts])
        with computing(self.device, self.precision):
            return self.conditioner.condition(states)

    @property
    def conditioner(self) -> Conditioner:
        """That of the generator, or while it is empty one from the file."""
        return self.stored_conditioner if self.network.meta_queries.is_meta else self.network

    @cached_property
    def stored_conditioner(self) -> Conditioner:
        """Queries, connector and projector, frozen."""
        with torch.device("meta"):
            conditioner = Conditioner(self.config).to(self.dtype)
        read_into(conditioner.to_empty(device=self.device), self.headers, str)
        return conditioner.eval().requires_grad_(False)
