"""The protocol that every unified multimodal model meets; stages know models only through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

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
    """One segment of a context or of a training example (docs/design.md 3).

    kind ``text``: ``text``, or its token ``ids`` as they were sampled (without the markers around a text); ``seen``:
    ``image`` through the understanding encoder (a file only in an example, whose images are read step by step);
    ``clean`` / ``noisy``: a scaled latent (C, h, w) as context / as target. A noisy segment may bring ``state``, a
    stored (x_t as tokens (N, D), t), in place of noise that is drawn for it; without a ``latent`` beside it there is no
    error, only a prediction, and its ``grid`` (h, w) has to be given.

    ``loss``: on a text cross-entropy, on a noisy latent flow matching. ``droppable``: left out for guidance, in
    training at a rate and in drawing where the guidance asks. ``dropped``: left out here; an image keeps its position.
    ``branch``: segments of branch 0, the trunk, come first; those of any other branch go on from its end and do not see
    one another's, such as several questions about one image.
    """

    kind: Literal["text", "seen", "clean", "noisy"]
    text: str | None = None
    ids: Sequence[int] | None = None
    image: Image | Tensor | Path | None = None
    latent: Tensor | None = None
    state: tuple[Tensor, float] | None = None
    grid: tuple[int, int] | None = None
    loss: bool = False
    droppable: bool = False
    dropped: bool = False
    branch: int = 0


class Corruption(Protocol):
    """What a model draws for the noisy segment of an example: noise and t, or masks. Stored, it can be replayed."""

    @property
    def t(self) -> float:
        """How far from clean, in [0, 1]."""
        ...


@dataclass(frozen=True)
class TrainingForward:
    """Result of the training forward pass of a flow model, per predicted token, in the order of the pack.

    Image tokens: ``velocity`` (N, D) predicted and ``target`` (N, D) (NaN for a segment without a latent), their
    ``timestep`` (N,), the number of the noisy segment with a loss, counted over the pack, that they are of
    (``image_segment`` (N,)), and the ``cell`` (N,) of its grid, row-major. Text tokens: ``logits`` (M, V) where the
    next token is a target, these targets (``labels`` (M,)), the text segment with a loss that they are of
    (``text_segment`` (M,)). Methods see ``image_error``, ``text_error`` and ``drift`` alone, so that a model that
    predicts something else than velocities has a class of its own with these.
    """

    velocity: Tensor
    target: Tensor
    timestep: Tensor
    image_segment: Tensor
    cell: Tensor
    logits: Tensor
    labels: Tensor
    text_segment: Tensor

    @property
    def image_error(self) -> Tensor:
        """Squared error of the velocity per image token, (N,): the mean over channels."""
        return (self.velocity - self.target).square().mean(dim=-1)

    @property
    def text_error(self) -> Tensor:
        """Cross-entropy per text token, (M,): minus its log-probability."""
        return cross_entropy(self.logits, self.labels, reduction="none")

    def drift(self, old: TrainingForward) -> Tensor:
        """Squared distance of the prediction from that of ``old`` weights on the same pack, per image token (N,)."""
        return (self.velocity - old.velocity).square().mean(dim=-1)


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

    def corrupt(
        self, latent: Tensor, generator: torch.Generator, timestep_shift: float, t: float | None = None
    ) -> Corruption:
        """What is drawn for a noisy segment of this clean latent; ``t`` fixes how far from clean it lies."""
        ...

    def targets(self, segments: Sequence[Segment], corruptions: Sequence[Corruption]) -> tuple[int, int]:
        """How many image and text tokens of an example are predicted with a loss."""
        ...

    def length(self, segments: Sequence[Segment]) -> int:
        """Tokens that an example takes in a pack, markers included."""
        ...

    def pack(self, samples: Sequence[Sequence[Segment]], corruptions: Sequence[Any]) -> Any:
        """A batch for ``forward``: examples of segments, and a corruption for each noisy segment without ``state``."""
        ...

    def forward(self, batch: Any) -> TrainingForward:
        """The training forward pass over a packed batch; differentiable."""
        ...
