"""BLIP3-o (docs/specs/blip3o.md): what ``srum.models.queries`` leaves to an architecture.

Its parts are language model, generator, EVA tower and decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn

from srum.errors import ModelError
from srum.geometry import Box, Size
from srum.models.base import Sampling, Segment
from srum.models.blip3o import chat
from srum.models.blip3o.checkpoint import (
    GENERATOR,
    check,
    empty_generator,
    load_qwen,
    load_tower,
    official_name,
    read_headers,
    save_checkpoint,
)
from srum.models.blip3o.config import Blip3oConfig
from srum.models.blip3o.decoder import Decoder, require_decoder
from srum.models.blip3o.generator import Blip3oGenerator
from srum.models.blip3o.images import seen_size
from srum.models.blip3o.language import Qwen
from srum.models.blip3o.tower import EvaTower, pool
from srum.models.checkpoints import read_into
from srum.models.pixels import crop_box, cropped, normalised
from srum.models.queries.chat import Part
from srum.models.queries.language import Run
from srum.models.queries.model import AT_ONCE, QueryModel, batches, drawn_noise
from srum.seeding import seed_for

DEFAULTS = Sampling(timesteps=31, timestep_shift=1.0, guidance=3.0)  # of the reference; the blank features' always
RECONSTRUCTED = (448, 448)  # at which an image is seen that another is drawn after; its proportions are not kept
DECODED_PIXELS = 2**22  # of all images of a decoder's call
BLANK_SEED = 0  # of the features of the blank prompt, and of the noise of ``decode``


class Blip3o(QueryModel[Blip3oGenerator, Qwen]):
    """A BLIP3-o checkpoint of any size. Meets ``TrainableModel``."""

    name = "BLIP3-o"
    special = ("<|im_end|>", chat.IMAGE)
    always = (None,)  # the blank prompt, which the decoder's guidance compares with
    config: Blip3oConfig

    # ---------------------------------------------------------------- parts

    def open(self, folder: Path) -> None:
        """Read headers, and check that they fit."""
        self.headers = read_headers(folder)
        self.config = Blip3oConfig.from_folder(folder, self.headers)
        check(folder, self.config, self.headers)
        require_decoder(folder)

    def empty_network(self) -> Blip3oGenerator:
        """Queries and diffusion transformer."""
        return empty_generator(self.config)

    def fill(self, generator: Blip3oGenerator) -> None:
        """From the folder's files."""
        read_into(generator, self.headers, lambda name: official_name(name, GENERATOR))

    def load_language(self) -> Qwen:
        """Qwen2.5-VL."""
        return Qwen(load_qwen(self.config, self.headers, self.device, self.computed_in))

    def stored_queries(self) -> Tensor:
        """(1, Q, H)."""
        return self.headers.read("model.latent_queries")

    @cached_property
    def tower(self) -> EvaTower:
        """What makes features of images."""
        return load_tower(self.folder, self.config, self.headers, self.device, self.computed_in)

    @cached_property
    def decoder(self) -> Decoder:
        """What makes images of features."""
        return Decoder(self.folder, self.device, self.computed_in)

    def save(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, *, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the official layout: the generator's ``weights`` as ``dtype``, all else as it is in the model's folder.

        Raises ModelError for that folder itself.
        """
        weights = self.network.state_dict() if weights is None else weights
        cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in weights.items()}
        save_checkpoint(self.folder, Path(folder), self.headers, cast)

    def layers(self) -> list[nn.Module]:
        """Those of the diffusion transformer: what training shards, and may recompute, one by one."""
        return list(self.network.dit.layers)

    def generation_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The diffusion transformer: with frozen queries a prompt's condition is computed once."""
        return [(name, p) for name, p in self.network.named_parameters() if name != "latent_queries"]

    # ---------------------------------------------------------------- images and features

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(C, h, w) of the features, the same whatever the size (H, W). Raises ModelError for what is no image's."""
        if size[0] % 8 or size[1] % 8 or min(size) < 8:
            raise ModelError(f"image size {size} is not a multiple of 8 pixels")
        return self.config.transformer.channels, self.config.grid, self.config.grid

    def resized(self, image: Image) -> Image:
        """The middle square of the image, all that its features are made of."""
        if self.config.tower is None:
            return cropped(image, RECONSTRUCTED[0])
        return cropped(image, self.config.tower.side * self.config.tower.patch)

    def crop_box(self, size: Size) -> Box:
        """Which part of an image of ``size`` (H, W) ``resized`` shows, in its pixels."""
        return crop_box(size)

    def box_frame(self, size: Size) -> Size:
        """(H, W) of the frame whose pixels the language model names boxes in: the image as it is seen."""
        vision = self.config.qwen.vision_config
        return seen_size(size, vision.patch_size * vision.spatial_merge_size)

    @torch.no_grad()
    def encode(self, images: Sequence[Image]) -> list[Tensor]:
        """Features (C, h, w) of the middle squares of images. Raises ModelError without EVA tensors."""
        pixels = [normalised(self.resized(image)) for image in images]
        made: list[Tensor] = []
        for some in batches(pixels, AT_ONCE):
            tokens = self.tower(torch.stack(list(some)).to(self.device, self.computed_in))
            made += pool(tokens.float(), self.config.pooling).cpu()
        return made

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> list[Image]:
        """Images of features, of the decoder's usual size, settings and one noise: renderings, not an inverse of
        ``encode``."""
        size = (self.decoder.side, self.decoder.side)
        noise = [self.decoder.noise(size, BLANK_SEED) for _ in latents]
        return self._rendered(latents, noise, [size] * len(latents), DEFAULTS)

    def _rendered(
        self, latents: Sequence[Tensor], noise: Sequence[Tensor], sizes: Sequence[Size], sampling: Sampling
    ) -> list[Image]:
        """Neighbours of one size go through the decoder together."""
        blank = self.blank_features() if sampling.decoder_guidance > 1 else None
        images: list[Image] = []
        for run in _alike(sizes, lambda size: max(1, DECODED_PIXELS // math.prod(size))):
            features = torch.stack([self.tokens(latents[i]) for i in run]).to(self.device)
            made = self.decoder.latents(
                features,
                blank,
                torch.stack([noise[i] for i in run]),
                sizes[run[0]],
                sampling.decoder_steps,
                sampling.decoder_guidance,
            )
            images += self.decoder.images(made)
        return images

    def rendered(
        self, latents: Sequence[Tensor], sizes: Sequence[Size], seeds: Sequence[int], sampling: Sampling
    ) -> list[Image]:
        """Images of features; the decoder's noise has a seed that follows from the image's."""
        noise = [self.decoder.noise(size, seed_for(seed, "decoder")) for seed, size in zip(seeds, sizes, strict=True)]
        return self._rendered(latents, noise, sizes, sampling)

    def blank_features(self) -> Tensor:
        """Features (h w, C) of the blank prompt, which the decoder's guidance compares with: from a seed of their own,
        so that no image depends on what was drawn before it."""
        shape = (self.config.transformer.channels, self.config.grid, self.config.grid)
        noise = drawn_noise(shape, BLANK_SEED)[None].to(self.device)
        (made,) = self.sampled(noise, self.conditions([None]), DEFAULTS)
        return self.tokens(made)

    # ---------------------------------------------------------------- words

    def seen(self, images: Sequence[Image], drawn: bool) -> list[Run]:
        """At the size of their own; where they are drawn after, at one size."""
        return self.language.images(images, [RECONSTRUCTED] * len(images) if drawn else None)

    @property
    def seen_tokens(self) -> int:
        """Of an image of ``RECONSTRUCTED`` pixels."""
        return math.prod(side // self.language.factor for side in RECONSTRUCTED)

    def asked(self, context: Sequence[Segment]) -> list[Part]:
        """The conversation up to where the assistant answers."""
        return chat.asked(context, self.text_of)

    def requested(self, context: Sequence[Segment]) -> list[Part]:
        """The conversation up to the marker before the queries."""
        return chat.requested(context, self.text_of)

    def conditioned(self, contexts: Sequence[Sequence[Segment] | None]) -> Tensor:
        """The states of the queries (B, Q, H), zeros of an empty context."""
        given = [context for context in contexts if context is None or context]
        states = iter(self.queried(given) if given else ())
        shape = (self.config.queries, self.config.transformer.condition)
        zeros = torch.zeros(shape, dtype=self.computed_in, device=self.device)
        return torch.stack([next(states) if context is None or context else zeros for context in contexts])

    def queried(self, contexts: Sequence[Sequence[Segment] | None], closed: bool = False) -> Tensor:
        """The hidden states (B, Q, H) of the queries behind each context, or behind the blank prompt (None);
        ``closed``: with the empty turn that the authors' training has before them. Differentiable in the queries."""
        return self.behind(
            [
                [chat.BLANK + chat.IMAGE] if context is None else chat.requested(context, self.text_of, closed)
                for context in contexts
            ]
        )


def _alike(sizes: Sequence[Size], limit: Callable[[Size], int]) -> Iterator[list[int]]:
    """Neighbours of one size by their places, at most ``limit`` of it together."""
    group: list[int] = []
    for place, size in enumerate(sizes):
        if group and (size != sizes[group[0]] or len(group) == limit(size)):
            yield group
            group = []
        group.append(place)
    if group:
        yield group
