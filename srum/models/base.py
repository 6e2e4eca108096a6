"""The protocol that every unified multimodal model meets; stages know models only through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

# ``global_batch`` takes one norm over all images of a call, as the reference does; the others are per image or token.
Renorm = Literal["global", "channel", "text_channel", "global_batch"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the image sampler. ``timesteps`` points give one Euler step fewer (docs/specs/bagel.md, 10)."""

    size: tuple[int, int] = (1024, 1024)  # (H, W) in pixels
    timesteps: int = 50
    timestep_shift: float = 3.0
    guidance: float = 4.0  # text guidance scale; <= 1 is off
    image_guidance: float = 1.0  # <= 1 is off
    guidance_interval: tuple[float, float] = (0.4, 1.0)  # active where lo < t <= hi, t the shifted timestep
    renorm: Renorm = "global"
    renorm_min: float = 0.0
    plan_temperature: float = 0.0  # of the planning text; 0 is greedy (every candidate of a prompt has the same plan)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of text decoding. ``temperature`` 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """One generated image: pixels, the sampler's clean, scaled latent (C, h, w), and the planning text."""

    image: Image
    latent: Tensor
    plan: str | None = None


@dataclass(frozen=True)
class Question:
    """One question about an image, and the beginning of the reply where the model is to continue a given text."""

    text: str
    reply_prefix: str = ""


@dataclass(frozen=True)
class Segment:
    """One segment of a training sample (docs/design.md 3).

    kind ``text``: ``text``; ``seen``: ``image`` through the understanding encoder; ``clean`` / ``noisy``: a scaled
    latent (C, h, w) as context / as target. ``loss``: cross-entropy on the text, flow matching on a noisy latent.
    ``droppable``: may be dropped to train guidance. ``branch``: segments of branch 0, the trunk, come first; those of
    any other branch go on from its end and do not see one another's, such as several questions about one image.
    """

    kind: Literal["text", "seen", "clean", "noisy"]
    text: str | None = None
    image: Image | Tensor | None = None
    latent: Tensor | None = None
    loss: bool = False
    droppable: bool = False
    branch: int = 0


@dataclass(frozen=True)
class TrainingForward:
    """Result of the training forward pass.

    ``velocity`` (N, D): prediction per latent token of the noisy segments, in order; ``logits`` (M, V) at the positions
    whose next token is a target, ``labels`` (M,) those targets.
    """

    velocity: Tensor
    logits: Tensor
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


class UnifiedModel(Protocol):
    """One network that understands and generates images. Methods are batched, seeded per item, and on one device."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, seeds: Sequence[int], plan: bool = False
    ) -> list[Generated]:
        """Images of ``prompts``; with ``plan`` a planning text is decoded first and conditions the image."""
        ...

    def predictions(
        self, prompts: Sequence[str], sampling: Sampling, seeds: Sequence[int], plan: bool = False
    ) -> list[Tensor]:
        """Where each Euler step of ``generate`` heads for: clean latents (steps, C, h, w) per prompt.

        A step's is x_t - t v, v the guided velocity at x_t; the last is the latent of the image that is generated.
        """
        ...

    def answer(
        self, images: Sequence[Image], questions: Sequence[Sequence[Question]], decoding: Decoding
    ) -> list[list[str]]:
        """Reply texts, ``[i][j]`` for question j about image i. The image's cache is written once per image."""
        ...

    def continuation_logprobs(
        self, images: Sequence[Image], questions: Sequence[Sequence[Question]], continuations: Sequence[str]
    ) -> list[Tensor]:
        """Per image a float tensor (questions, continuations): log p(continuation | image, question, reply_prefix)."""
        ...

    def resized(self, image: Image) -> Image:
        """The image at the size at which ``encode`` sees it, which has a ``latent_grid``."""
        ...

    def encode(self, images: Sequence[Image]) -> list[Tensor]:
        """Clean, scaled latents (C, h, w): the posterior mean, so that the result is a function of the image."""
        ...

    def decode(self, latents: Sequence[Tensor]) -> list[Image]:
        """Images of clean latents (C, h, w)."""
        ...

    def latent_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) in latent *tokens* of an image of (H, W) pixels: the grid of the reward map."""
        ...

    def tokens(self, latent: Tensor) -> Tensor:
        """A latent (C, h*p, w*p) as tokens (h*w, p*p*C), row-major, channel fastest."""
        ...

    def pack(self, samples: Sequence[Sequence[Segment]], noise: Sequence[Tensor], t: Sequence[float]) -> Any:
        """A batch for ``velocity``: samples of segments; noise (h*w, D) and t in [0, 1] for each noisy segment."""
        ...

    def length(self, sample: Sequence[Segment]) -> int:
        """Tokens that a sample takes in a pack, markers included."""
        ...

    def velocity(self, batch: Any) -> TrainingForward:
        """The training forward pass over a packed batch; differentiable."""
        ...
