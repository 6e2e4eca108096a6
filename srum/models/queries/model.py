"""What a frozen language model with queries and a diffusion transformer does behind ``srum.models.base``, whatever the
architecture: drawing, reading and writing, training.

Parts are read from the folder when each is first needed: a stage has in memory what it uses. What an image is drawn
after is a condition, a function of its context as long as the queries, and what follows them, are not trained; it is
then computed once (``prepare``), and the language model leaves the memory.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from srum import flow
from srum.errors import ModelError
from srum.flow import FlowNoise
from srum.geometry import Size
from srum.models.base import (
    REFINE_SYSTEM,
    REFINE_USER,
    REFLECT_QUESTION,
    REFLECT_STOP,
    Ability,
    Corruption,
    Exploration,
    FlowForward,
    Generated,
    RandomStep,
    SampledPath,
    Sampling,
    Segment,
)
from srum.models.checkpoints import load_tokenizer
from srum.models.exploring import Explorer
from srum.models.precision import Precision, computing
from srum.models.queries.chat import Part
from srum.models.queries.generator import Generator, timestep
from srum.models.queries.language import Language, Rows, Run, flattened, joined
from srum.models.queries.reading import Reader, image_of
from srum.models.queries.sampler import Step, Steps, euler, even_schedule, paths, sample
from srum.models.texts import token_id

T = TypeVar("T")
G = TypeVar("G", bound=Generator)
L = TypeVar("L", bound=Language)
Drawn = tuple[Tensor, SampledPath | None, tuple[RandomStep, ...]]  # a latent, the way to it, the random steps on it
AT_ONCE = 64  # prompts per pass of the language model, images per pass of an encoder


@dataclass(frozen=True)
class Batch:
    """Noisy latents (B, C, h, w) at ``t`` (B,), the velocity (B, N, C) wanted, and what each is drawn after: its
    ``contexts``, for conditions (B, Q, D) that are known; those of trained queries are computed in the forward pass."""

    x: Tensor
    t: Tensor
    target: Tensor
    learned: Tensor  # (B,), whether with a loss
    conditions: Tensor | None
    contexts: Sequence[Sequence[Segment]]


class QueryModel(Reader, Generic[G, L]):
    """A checkpoint of any size, its generator and its language model. Meets ``TrainableModel``.

    Weights that are never trained have the type that is computed in; those of the generator ``dtype``.
    """

    abilities: frozenset[Ability] = frozenset({"seen", "path", "explore", "train", "velocity", "prepare", "frames"})
    plan_instruction = ""
    refine_texts = (REFINE_SYSTEM, REFINE_USER)
    reflect_question, reflect_stop = REFLECT_QUESTION, REFLECT_STOP
    always: ClassVar[Sequence[Sequence[Segment] | None]] = ()  # contexts that drawing needs whatever is drawn
    config: Any  # has ``queries``, how many there are, and ``vocabulary``

    def __init__(
        self, folder: Path, device: torch.device, precision: Precision, dtype: torch.dtype, empty: bool = False
    ) -> None:
        self.folder, self.device, self.precision, self.dtype, self.empty = folder, device, precision, dtype, empty
        self.open(folder)
        self.tokenizer = load_tokenizer(self.tokenizer_folder)
        self.ids = lru_cache(maxsize=65536)(lambda text: tuple(self.tokenizer.encode(text, add_special_tokens=False)))
        (self.stop, *_) = (token_id(self.tokenizer, name, self.tokenizer_folder) for name in self.special)
        self.known: dict[bytes, Tensor] = {}  # conditions (Q, D) by their context, of queries that are not trained

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        dtype: torch.dtype = torch.float32,
        empty: bool = False,
    ) -> Self:
        """A folder in the official layout, its headers alone. With ``empty`` the generator gets no storage by itself:
        it may be sharded, is then given its storage (``to_empty``), and filled by ``read_weights``.

        Raises ModelError for a folder of another model, without one of its parts, and for tensors that do not fit.
        """
        return cls(Path(folder), torch.device(device), precision, dtype, empty)

    # ---------------------------------------------------------------- what an architecture says

    special: ClassVar[Sequence[str]]  # tokens that its tokenizer must have, first that which ends a turn

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is."""
        return self.folder

    @abstractmethod
    def open(self, folder: Path) -> None:
        """Read configs and headers. Raises ModelError."""

    @abstractmethod
    def empty_network(self) -> G:
        """What may be trained, without storage."""

    @abstractmethod
    def fill(self, generator: G) -> None:
        """Read its weights into it, or of each the part that this process holds."""

    @abstractmethod
    def load_language(self) -> L:
        """The language model, which reads, writes, and sees images."""

    @abstractmethod
    def stored_queries(self) -> Tensor:
        """The queries (..., Q, H), from the file."""

    @abstractmethod
    def seen(self, images: Sequence[Image], drawn: bool) -> list[Run]:
        """Images as the language model sees them, when it is asked, or where another image is ``drawn`` after them."""

    def looked_at(self, segments: Sequence[Segment], drawn: bool) -> list[Run]:
        """``seen`` of their images."""
        return self.seen([image_of(segment) for segment in segments], drawn)

    @property
    @abstractmethod
    def seen_tokens(self) -> int:
        """How many tokens an image is that another is drawn after."""

    @abstractmethod
    def requested(self, context: Sequence[Segment]) -> list[Part]:
        """The conversation up to where the queries follow."""

    @abstractmethod
    def conditioned(self, contexts: Sequence[Sequence[Segment] | None]) -> Tensor:
        """What images are drawn after, (B, Q, D). Differentiable in what is trained."""

    @abstractmethod
    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of (H, W) pixels. Raises ModelError for a size that cannot be drawn."""

    @abstractmethod
    def rendered(
        self, latents: Sequence[Tensor], sizes: Sequence[Size], seeds: Sequence[int], sampling: Sampling
    ) -> list[Image]:
        """Images of drawn latents, of these sizes."""

    def schedule(self, sampling: Sampling, explored: bool) -> Tensor:
        """The sampler's timesteps (timesteps,) down to 0, or those of one that takes random steps."""
        return even_schedule(sampling)

    def solver(self) -> Step:
        """What takes the steps of a call of the sampler."""
        return euler

    # ---------------------------------------------------------------- parts

    @property
    def computed_in(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @cached_property
    def network(self) -> G:
        """What may be trained."""
        generator = self.empty_network().to(self.dtype)
        if not self.empty:
            self.fill(generator.to_empty(device=self.device))
        return generator.eval()

    @cached_property
    def language(self) -> L:
        """The language model, frozen."""
        return self.load_language()

    def read_weights(self) -> None:
        """Fill the generator from the model's folder: each tensor, or the part of it that this process holds."""
        self.fill(self.network)

    def compile(self) -> None:
        """Not an ability of this model."""
        raise ModelError(f"compile: {self.name} does not run through torch.compile; leave it false")

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All of the generator; judge and grounder stay what they are."""
        return list(self.network.named_parameters())

    # ---------------------------------------------------------------- drawing

    def latent_grid(self, size: Size) -> Size:
        """(h, w) of the latent of an image of (H, W) pixels. Raises ModelError for a size that cannot be drawn."""
        return self.latent_shape(size)[1:]

    def tokens(self, latent: Tensor) -> Tensor:
        """(C, h, w) to (h w, C)."""
        return latent.flatten(1).T

    @torch.no_grad()
    def draw(
        self,
        contexts: Sequence[Sequence[Segment]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        sizes: Sequence[Size] | None = None,
        path: bool = False,
        explore: Exploration | None = None,
    ) -> list[Generated]:
        """An image after each context of texts and seen images; guidance compares with the condition of an empty one.
        Raises ValueError unless all are as many."""
        sizes = [sampling.size] * len(contexts) if sizes is None else sizes
        if not len(contexts) == len(sizes) == len(seeds):
            raise ValueError(f"{len(contexts)} contexts, {len(sizes)} sizes and {len(seeds)} seeds")
        if not contexts:
            return []
        noise = [drawn_noise(self.latent_shape(size), seed) for size, seed in zip(sizes, seeds, strict=True)]
        conditions, drawn = self.conditions(contexts), dict[int, Drawn]()
        for rows in _of_one_shape(noise):
            some = torch.stack([noise[row] for row in rows]).to(self.device)
            drawn |= zip(rows, self._drawn(some, conditions[rows], sampling, path, _only(explore, rows)), strict=True)
        made = [drawn[row] for row in range(len(noise))]
        images = self.rendered([latent for latent, *_ in made], sizes, seeds, sampling)
        return [Generated(image, *one) for image, one in zip(images, made, strict=True)]

    def _drawn(
        self, noise: Tensor, conditions: Tensor, sampling: Sampling, path: bool, explore: Exploration | None
    ) -> list[Drawn]:
        """Latents of noise (B, C, h, w) of one shape, each with what is to be told of its way."""
        steps: Steps | None = [] if path else None
        explorer = None if explore is None else Explorer(explore, [1] * len(noise))
        latents = self.sampled(noise, conditions, sampling, steps, explorer).cpu()
        timesteps = self.schedule(sampling, explore is not None)
        ways = [None] * len(noise) if steps is None else paths(steps, timesteps)
        taken = [()] * len(noise) if explorer is None else explorer.told(lambda rows: [x[0].cpu() for x in rows])
        return list(zip(latents, ways, taken, strict=True))

    def sampled(
        self,
        noise: Tensor,
        conditions: Tensor,
        sampling: Sampling,
        steps_out: Steps | None = None,
        explorer: Explorer | None = None,
        without: Tensor | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) of noise behind conditions (B, Q, D). Guidance compares with those ``without`` what is
        asked for, the condition of an empty context unless they are given."""
        guided = sampling.guidance > 1
        compared = (self.conditions([[]]) if without is None else without) if guided else None
        timesteps = self.schedule(sampling, explorer is not None)
        step = self.solver() if explorer is None else explorer.step
        with computing(self.device, self.precision):
            return sample(self.network, noise, conditions, compared, sampling.guidance, timesteps, step, steps_out)

    # ---------------------------------------------------------------- conditions

    def conditions(self, contexts: Sequence[Sequence[Segment] | None]) -> Tensor:
        """What images are drawn after, (B, Q, D). Those that are known are not computed again."""
        keys = [_key(context) for context in contexts]
        missing = {key: context for key, context in zip(keys, contexts, strict=True) if key not in self.known}
        made = dict(self.known)
        for some in batches(list(missing.items()), AT_ONCE):
            made |= zip((key for key, _ in some), self.conditioned([context for _, context in some]), strict=True)
        return torch.stack([made[key].to(self.device) for key in keys])

    def behind(self, requests: Sequence[Sequence[Part]]) -> Tensor:
        """The hidden states (B, Q, H) of the queries behind each conversation. Differentiable in the queries."""
        language = self.language
        queries = language.inputs(self.queries().to(language.device, language.text.dtype))
        images = self._image_runs([part for parts in requests for part in parts], drawn=True)
        rows = [flattened(joined([*self._runs(parts, images), queries])) for parts in requests]
        for parts, row in zip(requests, rows, strict=True):
            self._require_fit(parts, len(row.inputs))
        states = language.extend(language.empty(len(rows)), Rows.of(rows))
        return states[:, -self.config.queries :]

    def queries(self) -> Tensor:
        """The queries (Q, H), from the file while the network is empty."""
        trained = self.network.queries
        return (self.stored_queries() if trained.is_meta else trained).flatten(0, -2)

    @torch.no_grad()
    def prepare(self, examples: Iterable[Sequence[Segment]]) -> None:
        """Keep the conditions of all that will be trained on, and let the language model go; trained queries, which
        would change them, keep both."""
        self.known.clear()
        if self.network.queries.requires_grad:
            return
        contexts = chain(self.always, (context for example in examples for context in _variants(example)))
        while some := list(islice(contexts, AT_ONCE)):
            missing = {key: context for context in some if (key := _key(context)) not in self.known}
            if missing:
                self.known |= zip(missing, self.conditioned(list(missing.values())).cpu(), strict=True)
        vars(self).pop("language", None)

    # ---------------------------------------------------------------- training

    def corrupt(
        self, latent: Tensor, generator: torch.Generator, timestep_shift: float, t: float | None = None
    ) -> FlowNoise:
        """A timestep, unless it is given, and then noise. Timesteps are even thousandths, as in the authors' training,
        moved by ``timestep_shift`` where that is not 1."""
        if t is None:
            drawn = timestep(torch.rand((), generator=generator))
            t = flow.shift_timestep(torch.tensor(drawn, dtype=torch.float64), timestep_shift).item()
        return FlowNoise(torch.randn(self.tokens(latent).shape, generator=generator), t)

    def targets(self, segments: Sequence[Segment], corruptions: Sequence[Corruption]) -> tuple[int, int]:
        """Cells of latents with a loss, and texts: none. Raises ModelError for a text with one."""
        if any(segment.loss and segment.kind == "text" for segment in segments):
            raise ModelError(f"{self.name} does not learn texts: its language model stays as it is")
        return sum(math.prod(_grid(s)) for s in segments if s.loss and s.kind == "noisy"), 0

    def length(self, segments: Sequence[Segment]) -> int:
        """Cells, and where the queries are trained what the language model reads before and with them."""
        drawn = list(_drawn(segments))
        cells = sum(math.prod(_grid(noisy)) for _, noisy in drawn)
        if not self.network.queries.requires_grad:
            return cells
        return cells + sum(map(self._read_length, {_key(context): context for context, _ in drawn}.values()))

    def _read_length(self, context: Sequence[Segment]) -> int:
        """Tokens that the language model reads of a context, and the queries."""
        parts = self.requested(context)
        read = sum(len(self.ids(part)) if isinstance(part, str) else self.seen_tokens for part in parts)
        return read + int(self.config.queries)

    def pack(
        self, samples: Sequence[Sequence[Segment]], corruptions: Sequence[FlowNoise], *, sees: bool = False
    ) -> Batch:
        """A batch, one row per noisy latent, each behind what it is drawn after.

        A corruption for each without a state, in order. Raises ModelError for samples without, and with clean images.
        """
        for one in samples:
            self._check(one)
        drawn = iter(corruptions)
        contexts, noisy = zip(*chain.from_iterable(map(_drawn, samples)), strict=True)
        grid, *others = dict.fromkeys(map(_grid, noisy))
        if others:
            raise ModelError(f"{self.name} trains on latents of one size in a batch, not of {grid} and {others[0]}")
        x, t, target = (list(values) for values in zip(*(self._noisy(one, drawn) for one in noisy), strict=True))
        if (left := len(list(drawn))) > 0:
            raise ValueError(f"{left} of {len(corruptions)} corruptions have no noisy segment")
        trained = self.network.queries.requires_grad
        with torch.no_grad():
            known = None if trained else self.conditions(contexts)
        return Batch(
            x=torch.stack(x).transpose(1, 2).unflatten(2, grid).to(self.device),
            t=torch.tensor(t, device=self.device),
            target=torch.stack(target).to(self.device),
            learned=torch.tensor([segment.loss for segment in noisy], device=self.device),
            conditions=known,
            contexts=contexts,
        )

    def _check(self, example: Sequence[Segment]) -> None:
        """Raises ModelError for an example that cannot be learned from."""
        kinds = {segment.kind for segment in example}
        if "noisy" not in kinds:
            raise ModelError(f"{self.name} learns to draw images; an example has no noisy segment")
        if "clean" in kinds:
            raise ModelError(f"{self.name} draws after texts and images that it sees, not after a clean image")

    def _noisy(self, segment: Segment, drawn: Iterator[FlowNoise]) -> tuple[Tensor, float, Tensor]:
        """x_t (N, C), t and the velocity (N, C) that is wanted, of a noisy segment."""
        clean = None if segment.latent is None else self.tokens(segment.latent)
        if segment.state is not None:
            x_t, t = segment.state
            return x_t, t, torch.full_like(x_t, math.nan) if clean is None else flow.velocity_through(clean, x_t, t)
        corruption = next(drawn, None)
        if clean is None or corruption is None:
            raise ValueError("a noisy segment needs a latent and a corruption, or a state")
        x_t = flow.interpolate(clean, corruption.noise, corruption.t)
        return x_t, corruption.t, flow.velocity_target(clean, corruption.noise)

    def forward(self, batch: Batch) -> FlowForward:
        """Velocities of every cell with a loss, in float32."""
        conditions = self.conditions(batch.contexts) if batch.conditions is None else batch.conditions
        velocity = self.network(batch.x, batch.t, conditions).float().flatten(2).transpose(1, 2)[batch.learned]
        count, cells = velocity.shape[:2]
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        return FlowForward(
            velocity=velocity.flatten(0, 1),
            target=batch.target[batch.learned].flatten(0, 1),
            timestep=batch.t[batch.learned].repeat_interleave(cells),
            image_segment=torch.arange(count, device=self.device).repeat_interleave(cells),
            cell=torch.arange(cells, device=self.device).repeat(count),
            logits=torch.zeros(0, self.config.vocabulary, device=self.device),
            labels=none,
            text_segment=none,
        )


def _drawn(example: Sequence[Segment]) -> Iterator[tuple[list[Segment], Segment]]:
    """Each noisy segment of an example behind what it is drawn after: what is before it that it may see."""
    for place, noisy in enumerate(example):
        if noisy.kind == "noisy":
            seen = [s for s in example[:place] if s.kind != "noisy" and s.branch in (0, noisy.branch)]
            yield [segment for segment in seen if not segment.dropped], noisy


def _variants(example: Sequence[Segment]) -> Iterator[Sequence[Segment] | None]:
    """The contexts that dropout leaves of an example's own: all of each, its texts, its images."""
    for whole, _ in _drawn(example):
        texts = [segment for segment in whole if segment.kind == "text"]
        images = [segment for segment in whole if segment.kind != "text"]
        yield from (context for context in (whole, texts, images) if context)


def _key(context: Sequence[Segment] | None) -> bytes:
    """What conditions of a context are kept by; empty for an empty context."""
    if context is None:
        return b"blank"
    contents = [image_of(s).tobytes() if s.kind == "seen" else repr(s.text or s.ids).encode() for s in context]
    return b"".join(hashlib.sha256(content).digest() for content in contents)


def _grid(noisy: Segment) -> Size:
    """(h, w) of a noisy latent. Raises ValueError where nothing tells."""
    if noisy.latent is not None:
        height, width = noisy.latent.shape[1:]
        return height, width
    if noisy.grid is None:
        raise ValueError("a noisy segment needs a latent, or a state with its grid")
    return noisy.grid


def drawn_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal (C, h, w), from the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _of_one_shape(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of tensors that have the same shape."""
    shapes = [tensor.shape for tensor in tensors]
    for shape in dict.fromkeys(shapes):
        yield [place for place, own in enumerate(shapes) if own == shape]


def _only(explore: Exploration | None, rows: Sequence[int]) -> Exploration | None:
    """What is explored of these images."""
    if explore is None:
        return None
    return replace(explore, steps=[explore.steps[row] for row in rows], seeds=[explore.seeds[row] for row in rows])


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
