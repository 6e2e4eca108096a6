"""The protocol that every unified multimodal model meets; stages know models only through it.

A context, that which is drawn from, written after or scored after, is a sequence of ``Segment``s, and so is an example
of training (docs/design.md 3).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from srum.errors import SrumError
from srum.flow import Rule, Transition, schedule

# ``global_batch`` takes one norm over all images of a call, as the reference does; the others are per image or token.
Renorm = Literal["global", "channel", "text_channel", "global_batch"]


# RvR's interface (docs/specs/rvr.md, 2), byte for byte. Its published weights were trained with the first text before
# the image and are drawn from with the second.
REFINE_SYSTEM = (
    "Analyze the potential misalignment between the generated image and the user's prompt. "
    "Then, re-generate the image to precisely align with the user's prompt.\n"
)
REFINE_SYSTEM_RELEASED = REFINE_SYSTEM + "\nHere is the generated image:\n"
REFINE_USER = "Here is the user's prompt: {prompt}. "
REFLECT_STOP = "No further edit needed."
REFLECT_QUESTION = (
    "The image was made for this prompt: {prompt}\n"
    "Compare the two. Reply with one line that tells an image editor what to change so that the image matches the "
    f"prompt, or with the line: {REFLECT_STOP}"
)

# What a model can do beside drawing from texts and writing after texts.
Ability = Literal[
    "seen",  # looks at images
    "clean",  # has images in its contexts as latents
    "edit",  # changes the image of its context: clean and seen, then what is to be changed
    "plan",  # writes a planning text before it draws
    "path",  # tells the way to an image
    "explore",  # takes random steps on the way to an image, and tells them
    "train",  # can be trained: ``corrupt``, ``pack`` and ``forward``
    "velocity",  # is a flow model: ``forward`` predicts velocities, ``corrupt`` draws noise
    "compile",  # runs through torch.compile
    "prepare",  # before training, ``prepare(examples)`` computes once what its frozen weights make of their segments
    "infill",  # ``infill(contexts, latents, holes, sampling, seeds)`` draws anew where ``holes`` (h, w) are True
    "remember",  # within ``remembering()`` calls whose contexts begin with the same images share what these cost
    "frames",  # ``box_frame`` and ``crop_box`` say what of an image its boxes and its latents are of
]


class MissingAbility(SrumError):
    """A model cannot do what is asked of it."""


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
    guidance_every: int = 1  # of the guided steps one in so many compares; those between keep its differences
    velocity_every: int = 1  # of all steps one in so many runs the network; between them the velocity is extrapolated
    plan_temperature: float = 0.0  # of the planning text; 0 is greedy (every candidate of a prompt has the same plan)
    decoder_steps: int = 50  # of a model whose decoder draws, too, as BLIP3-o's does
    decoder_guidance: float = 3.0  # of such a decoder; <= 1 is off
    temperature: float = 1.0  # of a model that draws token by token, as Show-o does (docs/showo.md)


def guided_branches(sampling: Sampling) -> list[int]:
    """Of how many branches each Euler step is made: 1 without guidance, 2 with text guidance, 3 with both."""
    timesteps = schedule(sampling.timesteps, sampling.timestep_shift)[:-1]
    low, high = torch.tensor(sampling.guidance_interval)  # float32 as the timesteps: a tie falls as in the reference
    guided = (low < timesteps) & (timesteps <= high) & (sampling.guidance > 1)
    return [(2 + (sampling.image_guidance > 1)) if here else 1 for here in guided.tolist()]


def branch_counts(sampling: Sampling) -> list[int]:
    """How many of them the network runs in each step: all, without ``guidance_every`` and ``velocity_every``.

    None where the velocity is extrapolated, which the first two steps and the last never are.
    """
    made_of, every = guided_branches(sampling), sampling.velocity_every
    run = [step < 2 or step % every == 0 or step == len(made_of) - 1 for step in range(len(made_of))]
    guided = [step for step, branches in enumerate(made_of) if run[step] and branches > 1]
    compared = set(guided[:: sampling.guidance_every])
    counts = [made if step in compared else 1 for step, made in enumerate(made_of)]
    return [count * here for count, here in zip(counts, run, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of text decoding. The token that begins a text counts as one; ``temperature`` 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    until: str = ""  # a text that comes to say this is cut behind it, where the model can; it has not ended by itself


@dataclass(frozen=True)
class SampledPath:
    """The way to an image in S steps: the ``states`` x_t (S, C, h, w) from which they start at ``timesteps`` (S,), from
    1 down, and the guided ``velocities`` there (S, C, h, w)."""

    states: Tensor
    timesteps: Tensor
    velocities: Tensor

    @property
    def predictions(self) -> Tensor:
        """The clean latents x_t - t v that the steps head for, (S, C, h, w); the last is that of the image."""
        return self.states - self.timesteps[:, None, None, None] * self.velocities


@dataclass(frozen=True)
class Exploration:
    """Steps of the sampler that are drawn at random instead (``srum.flow.transition``): images with a probability.

    ``steps``: the numbers of these steps, from 0, of each image, ``seeds`` of their noise.
    """

    rule: Rule
    level: float
    steps: Sequence[Collection[int]]
    seeds: Sequence[int]


@dataclass(frozen=True)
class RandomStep:
    """A random step on the way to an image: the ``state`` x_t (C, h, w) at ``t``, the guided ``velocity`` there, by
    what ``transition``, and the state that was ``reached``."""

    state: Tensor
    t: float
    velocity: Tensor
    reached: Tensor
    transition: Transition

    @property
    def sought(self) -> Tensor:
        """The velocity (C, h, w) that would have led to what was reached without noise."""
        return self.transition.velocity_to(self.state, self.reached)


@dataclass(frozen=True)
class Generated:
    """One drawn image: pixels, the sampler's clean, scaled latent (C, h, w), of integers where the model draws ids,
    and where asked for the way to it and the random steps on it."""

    image: Image
    latent: Tensor
    path: SampledPath | None = None
    steps: tuple[RandomStep, ...] = ()


@dataclass(frozen=True)
class Written:
    """One written text, without the beginning that it was given, and the tokens ``ids`` that were chosen.

    ``logprobs`` (len(ids) + 1,) where it ``ended`` by itself, (len(ids),) where the limit cut it off: of each token,
    and of the end, under the distribution that it was sampled from (greedy: that of temperature 1).
    """

    text: str
    ids: Sequence[int]
    logprobs: Tensor
    ended: bool


@dataclass(frozen=True)
class Segment:
    """One segment of a context or of a training example (docs/design.md 3).

    kind ``text``: ``text``, or its token ``ids`` as they were sampled (without the markers around a text); ``seen``:
    ``image`` through the understanding encoder (a file only in an example, whose images are read step by step);
    ``clean`` / ``noisy``: a scaled latent (C, h, w) as context / as target. A noisy segment may bring ``state``, a
    stored (x_t as tokens (N, D), t), in place of noise that is drawn for it; without a ``latent`` beside it there is no
    error, only a prediction, and its ``grid`` (h, w) has to be given.

    Only in an example, settled at every visit: ``texts``, of which one is drawn, and the ``file`` of a latent.
    ``side``: the longest side in pixels at which an image is seen, resized from the image as it is; None: the model's
    own rule.

    ``loss``: on a text cross-entropy, on a noisy latent flow matching. ``droppable``: left out for guidance, in
    training at a rate and in drawing where the guidance asks. ``dropped``: left out here; an image keeps its position.
    ``written``: a text that the model wrote in view of all before it, such as a plan, which no guidance branch has.
    ``open``: a text that is begun and not closed, the last of a context; ``write`` and ``score`` go on with it.
    ``branch``: segments of branch 0, the trunk, come first; those of any other branch go on from its end and do not see
    one another's, such as several questions about one image.
    """

    kind: Literal["text", "seen", "clean", "noisy"]
    text: str | None = None
    texts: Sequence[str] = ()
    ids: Sequence[int] | None = None
    image: Image | Tensor | Path | None = None
    side: int | None = None
    latent: Tensor | None = None
    file: Path | None = None
    state: tuple[Tensor, float] | None = None
    grid: tuple[int, int] | None = None
    loss: bool = False
    droppable: bool = False
    dropped: bool = False
    written: bool = False
    open: bool = False
    branch: int = 0


class Corruption(Protocol):
    """What a model draws for the noisy segment of an example: noise and t, or masks. Stored, it can be replayed."""

    @property
    def t(self) -> float:
        """How far from clean, in [0, 1]."""
        ...


class Distance(NamedTuple):
    """How far the predictions of image tokens (N,) are from those of old weights on the same pack, in two parts.

    ``drift`` is at least 0, and 0 where they are the same; ``change`` is that of the error to first order in their
    distance, so that pushing by it and holding by the drift settles at a distance in proportion to the push.
    """

    change: Tensor
    drift: Tensor


@dataclass(frozen=True)
class TrainingForward:
    """Result of the training forward pass, per predicted token, in the order of the pack; each kind of model has a
    subclass with further tensors, those that it predicts.

    Image tokens, only those that are predicted (``UnifiedModel.targets`` counts them): how far from clean in [0, 1]
    (``timestep`` (N,)), the number of the noisy segment with a loss, counted over the pack, that they are of
    (``image_segment`` (N,)), and the ``cell`` (N,) of its grid, row-major. Text tokens: ``logits`` (M, V) where the
    next token is a target, these targets (``labels`` (M,)), the text segment with a loss that they are of
    (``text_segment`` (M,)). Methods see errors and distances alone, whatever it is that a model predicts.
    """

    timestep: Tensor
    image_segment: Tensor
    cell: Tensor
    logits: Tensor
    labels: Tensor
    text_segment: Tensor

    @property
    def image_error(self) -> Tensor:
        """What is minimised, per image token (N,)."""
        raise NotImplementedError

    @property
    def text_error(self) -> Tensor:
        """Cross-entropy per text token, (M,): minus its log-probability."""
        return cross_entropy(self.logits, self.labels, reduction="none")

    @property
    def extra(self) -> dict[str, Tensor]:
        """What the model minimises besides per image token (N,), by name: terms that no method weights."""
        return {}

    def distance(self, old: Any) -> Distance:
        """From ``old``, a forward pass of the same class over the same pack by other weights."""
        raise NotImplementedError


@dataclass(frozen=True)
class FlowForward(TrainingForward):
    """That of a flow model: ``velocity`` (N, D) predicted and ``target`` (N, D), NaN for a segment without a latent."""

    velocity: Tensor
    target: Tensor

    @cached_property
    def image_error(self) -> Tensor:
        """Squared error of the velocity per image token, (N,): the mean over channels."""
        return (self.velocity - self.target).square().mean(dim=-1)

    def distance(self, old: FlowForward) -> Distance:
        """With e = v_old - u and d = v - v_old: 2 e.d and |d|^2, means over channels. |v - u|^2 = |e + d|^2 gives the
        former without velocities."""
        drift = (self.velocity - old.velocity).square().mean(dim=-1)
        return Distance(self.image_error - old.image_error - drift, drift)


@dataclass(frozen=True)
class DiscreteForward(TrainingForward):
    """That of a model whose latents are ids: ``logprob`` (N,), the log-probability p of each id that was masked."""

    logprob: Tensor

    @property
    def image_error(self) -> Tensor:
        """Cross-entropy per masked id, (N,)."""
        return -self.logprob

    def distance(self, old: DiscreteForward) -> Distance:
        """With d = log p - log p_old: -d and d^2 / 2, so that A change + beta drift settles at d = A / beta
        (docs/specs/showo.md, 13)."""
        d = self.logprob - old.logprob
        return Distance(-d, d.square() / 2)


class UnifiedModel(Protocol):
    """One network that understands and generates images. Methods are batched, seeded per item, and on one device.

    Contexts of a call that begin with the same Segment objects share what these cost: an image is seen once, whatever
    is asked about it.
    """

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def abilities(self) -> frozenset[Ability]:
        """What it can do; the rest is refused (:func:`require`)."""
        ...

    @property
    def plan_instruction(self) -> str:
        """The text before a prompt that has the model write a plan first (ability ``plan``)."""
        ...

    @property
    def refine_texts(self) -> tuple[str, str]:
        """The text before an image that is to be drawn again, and the one after it, with the place ``{prompt}``."""
        ...

    @property
    def reflect_question(self) -> str:
        """The question about an image, with the place ``{prompt}``, whose reply ends in a line that says what must
        change, or is ``reflect_stop``."""
        ...

    @property
    def reflect_stop(self) -> str:
        """The last line of a reply that wants nothing changed."""
        ...

    def draw(
        self,
        contexts: Sequence[Sequence[Segment]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        path: bool = False,
        explore: Exploration | None = None,
    ) -> list[Generated]:
        """An image after each context, its noise drawn by its seed; ``sizes`` (H, W) where not all have that of
        ``sampling``, ``path``: with the way to it, ``explore``: with random steps on it. Guidance compares with
        :func:`without_text` and :func:`without_images` of the context."""
        ...

    def write(
        self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]
    ) -> Sequence[Written]:
        """A text after each context, sampled by its seed; it goes on with the context's last text if that is open."""
        ...

    def score(self, contexts: Sequence[Sequence[Segment]], continuations: Sequence[str]) -> list[Tensor]:
        """Per context (continuations,): the log-probability of each as the text that ``write`` would begin with."""
        ...

    def resized(self, image: Image) -> Image:
        """The image at the size at which ``encode`` sees it, which has a ``latent_grid``."""
        ...

    def encode(self, images: Sequence[Image]) -> list[Tensor]:
        """Clean, scaled latents (C, h, w): the posterior mean, so that the result is a function of the image; int16
        where they are ids."""
        ...

    def decode(self, latents: Sequence[Tensor]) -> list[Image]:
        """Images of clean latents (C, h, w)."""
        ...

    def latent_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) in latent *tokens* of an image of (H, W) pixels: the grid of the reward map. Raises ValueError."""
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
        """How many image and text tokens of an example are predicted with a loss: the masked ones where it masks."""
        ...

    def length(self, segments: Sequence[Segment]) -> int:
        """Tokens that an example takes in a pack, markers included."""
        ...

    def pack(self, samples: Sequence[Sequence[Segment]], corruptions: Sequence[Any], *, sees: bool = False) -> Any:
        """A batch for ``forward``: examples of segments, and a corruption for each noisy segment without ``state``.

        ``sees``: run what sees images also where no example has any, since the processes that share the network must
        all gather the same weights; asked of models that see alone.
        """
        ...

    def forward(self, batch: Any) -> TrainingForward:
        """The training forward pass over a packed batch; differentiable."""
        ...


class TrainableModel(UnifiedModel, Protocol):
    """A unified model whose weights are here."""

    @property
    def network(self) -> nn.Module:
        """All that has weights, but for what turns images into latents."""
        ...

    def layers(self) -> list[nn.Module]:
        """The layers that repeat, parts of ``network``: what is sharded, and may be recomputed, one by one."""
        ...

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """What may be trained."""
        ...

    def generation_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Those of the generation expert: what ``trainable: generation`` trains. None where one network does both."""
        ...

    def read_weights(self) -> None:
        """Fill the network, which was made empty: each tensor, or the part of it that this process holds."""
        ...

    def save(self, folder: Path, dtype: torch.dtype, *, weights: Mapping[str, Tensor]) -> None:
        """Write the model's published layout with these ``weights`` of its network, as ``dtype``."""
        ...

    def compile(self) -> None:
        """From now on run through torch.compile (ability ``compile``). Raises ValueError where it cannot work."""
        ...


def require(model: UnifiedModel, abilities: Collection[str], purpose: str) -> None:
    """Raises MissingAbility where the model lacks one of the abilities, which ``purpose`` needs."""
    if missing := sorted(set(abilities) - model.abilities):
        raise MissingAbility(
            f"{purpose} needs a model with the ability {', '.join(missing)}: {name_of(model)} has none"
        )


def name_of(model: UnifiedModel) -> str:
    """What a model is called in messages."""
    return type(model).__name__


def box_frame(writer: object, size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of the frame in whose pixels a model, or what writes in its place, names boxes in an image of ``size``
    (H, W), and reads them: the image itself unless it has the ability ``frames``."""
    framed: Any = writer
    return framed.box_frame(size) if "frames" in getattr(writer, "abilities", ()) else size


def remembering(writer: object) -> AbstractContextManager[None]:
    """A block within which several calls see an image once, where the model can (ability ``remember``)."""
    able: Any = writer
    return able.remembering() if "remember" in getattr(writer, "abilities", ()) else nullcontext()


def crop_box(model: UnifiedModel, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part (x0, y0, x1, y1) of an image of ``size`` (H, W) that ``resized`` shows, in pixels of the image."""
    framed: Any = model
    return framed.crop_box(size) if "frames" in model.abilities else (0.0, 0.0, float(size[1]), float(size[0]))


def without_text(context: Sequence[Segment]) -> list[Segment]:
    """The context that text guidance compares with: without the texts that may be dropped, and what was written."""
    return [s for s in context if s.kind != "text" or not (s.droppable or s.written)]


def without_images(context: Sequence[Segment]) -> list[Segment]:
    """The context that image guidance compares with: without images, and what was written in view of them."""
    return [s for s in context if s.kind == "text" and not s.written]


def to_edit(model: UnifiedModel, image: Image) -> tuple[list[Segment], tuple[int, int]]:
    """An image that is to be changed, as a context begins with it, and the size (H, W) of what is drawn then."""
    require(model, {"edit"}, "changing an image")
    resized = model.resized(image)
    return [Segment("clean", latent=model.encode([resized])[0]), Segment("seen", image=resized)], resized.size[::-1]
