"""BLIP3-o behind the protocol of ``srum.models.base`` (docs/specs/blip3o.md).

Its parts, language model, generator, EVA tower and decoder, are read from the folder when each is first needed: a
stage has in memory what it uses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from srum import flow
from srum.errors import ModelError
from srum.flow import FlowNoise
from srum.geometry import Box, Size
from srum.models.base import (
    REFINE_SYSTEM,
    REFINE_USER,
    REFLECT_QUESTION,
    REFLECT_STOP,
    Ability,
    Corruption,
    Decoding,
    Exploration,
    FlowForward,
    Generated,
    SampledPath,
    Sampling,
    Segment,
    Written,
)
from srum.models.blip3o import chat
from srum.models.blip3o.checkpoint import (
    check,
    empty_generator,
    load_qwen,
    load_tower,
    read_headers,
    read_into,
    save_checkpoint,
)
from srum.models.blip3o.config import Blip3oConfig
from srum.models.blip3o.decoder import Decoder, require_decoder
from srum.models.blip3o.generator import Generator, Steps, sample, schedule, timestep
from srum.models.blip3o.images import seen_size
from srum.models.blip3o.language import Context, Language, Rows, Run, flattened, joined
from srum.models.blip3o.tower import EvaTower, pool
from srum.models.checkpoints import load_tokenizer
from srum.models.exploring import Explorer
from srum.models.pixels import crop_box, cropped, normalised
from srum.models.precision import Precision, computing
from srum.models.texts import Row, go_on, pick, token_id
from srum.seeding import seed_for
from srum.tensors import open_tensors

T = TypeVar("T")
DEFAULTS = Sampling(timesteps=31, timestep_shift=1.0, guidance=3.0)  # of the reference; the blank features' always
RECONSTRUCTED = (448, 448)  # at which an image is seen that another is drawn after; its proportions are not kept
AT_ONCE = 64  # prompts per pass of the language model, images per pass of the tower
DECODED_PIXELS = 2**22  # of all images of a decoder's call
BLANK_SEED = 0  # of the features of the blank prompt, and of the noise of ``decode``


@dataclass(frozen=True)
class Batch:
    """Noisy features (B, C, h, w) at ``t`` (B,), the velocity (B, N, C) wanted, and what each is drawn after: its
    ``contexts``, for conditions (B, Q, H) that are known; those of trained queries are computed in the forward pass."""

    x: Tensor
    t: Tensor
    target: Tensor
    learned: Tensor  # (B,), whether with a loss
    conditions: Tensor | None
    contexts: Sequence[Sequence[Segment]]


class Blip3o:
    """A BLIP3-o checkpoint of any size. Meets ``TrainableModel``.

    Weights that are never trained have the type that is computed in; those of the generator ``dtype``.
    """

    abilities: frozenset[Ability] = frozenset({"seen", "path", "explore", "train", "velocity", "prepare", "frames"})
    plan_instruction = ""
    refine_texts = (REFINE_SYSTEM, REFINE_USER)
    reflect_question, reflect_stop = REFLECT_QUESTION, REFLECT_STOP

    def __init__(
        self, folder: Path, device: torch.device, precision: Precision, dtype: torch.dtype, empty: bool = False
    ) -> None:
        self.folder, self.device, self.precision, self.dtype, self.empty = folder, device, precision, dtype, empty
        self.headers = read_headers(folder)
        self.config = Blip3oConfig.from_folder(folder, self.headers)
        check(folder, self.config, self.headers)
        require_decoder(folder)
        self.tokenizer = load_tokenizer(folder)
        self.ids = lru_cache(maxsize=65536)(lambda text: tuple(self.tokenizer.encode(text, add_special_tokens=False)))
        self.stop, _ = (token_id(self.tokenizer, name, folder) for name in ("<|im_end|>", chat.IMAGE))
        self.known: dict[bytes, Tensor] = {}  # conditions (Q, H) by their context, of queries that are not trained

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        dtype: torch.dtype = torch.float32,
        empty: bool = False,
    ) -> Blip3o:
        """A folder in the official layout, its headers alone. With ``empty`` the generator gets no storage by itself:
        it may be sharded, is then given its storage (``to_empty``), and filled by ``read_weights``.

        Raises ModelError for a folder of another model, without a decoder, and for tensors that do not fit.
        """
        return cls(Path(folder), torch.device(device), precision, dtype, empty)

    # ---------------------------------------------------------------- parts

    @property
    def computed_in(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @cached_property
    def network(self) -> Generator:
        """What may be trained."""
        generator = empty_generator(self.config).to(self.dtype)
        if not self.empty:
            read_into(generator.to_empty(device=self.device), self.headers)
        return generator.eval()

    @cached_property
    def language(self) -> Language:
        """Qwen2.5-VL, which reads, writes, and sees images."""
        return Language(load_qwen(self.config, self.headers, self.device, self.computed_in), self.ids)

    @cached_property
    def tower(self) -> EvaTower:
        """What makes features of images."""
        return load_tower(self.folder, self.config, self.headers, self.device, self.computed_in)

    @cached_property
    def decoder(self) -> Decoder:
        """What makes images of features."""
        return Decoder(self.folder, self.device, self.computed_in)

    def read_weights(self) -> None:
        """Fill the generator from the model's folder: each tensor, or the part of it that this process holds."""
        read_into(self.network, self.headers)

    def compile(self) -> None:
        """Not an ability of this model."""
        raise ModelError("compile: BLIP3-o does not run through torch.compile; leave it false")

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

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The diffusion transformer and the queries; judge and grounder stay what they are."""
        return list(self.network.named_parameters())

    def generation_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The diffusion transformer: with frozen queries a prompt's condition is computed once."""
        return [(name, p) for name, p in self.network.named_parameters() if name != "latent_queries"]

    # ---------------------------------------------------------------- images and features

    def latent_grid(self, size: Size) -> Size:
        """(h, w) of the features, the same whatever the size (H, W). Raises ModelError for what is no image's."""
        if size[0] % 8 or size[1] % 8 or min(size) < 8:
            raise ModelError(f"image size {size} is not a multiple of 8 pixels")
        return self.config.grid, self.config.grid

    def tokens(self, latent: Tensor) -> Tensor:
        """(C, h, w) to (h w, C)."""
        return latent.flatten(1).T

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
        for some in _batches(pixels, AT_ONCE):
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

    def blank_features(self) -> Tensor:
        """Features (h w, C) of the blank prompt, which the decoder's guidance compares with: from a seed of their own,
        so that no image depends on what was drawn before it."""
        noise = self._noise(BLANK_SEED)[None].to(self.device)
        (made,) = self.sampled(noise, self.conditions([None]), DEFAULTS)
        return self.tokens(made)

    # ---------------------------------------------------------------- drawing

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
        """An image after each context of texts and seen images; guidance compares with a condition of zeros. The
        decoder's noise has a seed that follows from the image's. Raises ValueError unless all are as many."""
        sizes = [sampling.size] * len(contexts) if sizes is None else sizes
        if not len(contexts) == len(sizes) == len(seeds):
            raise ValueError(f"{len(contexts)} contexts, {len(sizes)} sizes and {len(seeds)} seeds")
        if not contexts:
            return []
        for size in sizes:
            self.latent_grid(size)
        steps: Steps | None = [] if path else None
        explorer = None if explore is None else Explorer(explore, [1] * len(contexts))
        noise = torch.stack([self._noise(seed) for seed in seeds]).to(self.device)
        latents = list(self.sampled(noise, self.conditions(contexts), sampling, steps, explorer).cpu())
        started = [self.decoder.noise(size, seed_for(seed, "decoder")) for seed, size in zip(seeds, sizes, strict=True)]
        images = self._rendered(latents, started, sizes, sampling)
        paths = [None] * len(latents) if steps is None else _paths(steps, sampling)
        taken = [()] * len(latents) if explorer is None else explorer.told(lambda rows: [x[0].cpu() for x in rows])
        return [Generated(*made) for made in zip(images, latents, paths, taken, strict=True)]

    def _noise(self, seed: int) -> Tensor:
        """Standard normal (C, h, w), from the seed alone."""
        shape = (self.config.transformer.channels, self.config.grid, self.config.grid)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def sampled(
        self,
        noise: Tensor,
        conditions: Tensor,
        sampling: Sampling,
        steps_out: Steps | None = None,
        explorer: Explorer | None = None,
    ) -> Tensor:
        """Features (B, C, h, w) of noise behind conditions (B, Q, H)."""
        with computing(self.device, self.precision):
            return sample(self.network.dit, noise, conditions, sampling, steps_out, explorer)

    # ---------------------------------------------------------------- conditions

    def conditions(self, contexts: Sequence[Sequence[Segment] | None]) -> Tensor:
        """What images are drawn after, (B, Q, H): of each context, zeros of an empty one, the blank prompt's of None.

        Those that are known are not computed again.
        """
        keys = [_key(context) for context in contexts]
        missing = {key: context for key, context in zip(keys, contexts, strict=True) if key and key not in self.known}
        made: dict[bytes, Tensor] = {}
        for some in _batches(list(missing.items()), AT_ONCE):
            made |= zip((key for key, _ in some), self.queried([context for _, context in some]), strict=True)
        shape = (self.config.queries, self.config.transformer.condition)
        zeros = torch.zeros(shape, dtype=self.computed_in, device=self.device)
        return torch.stack([(made | self.known)[key].to(self.device) if key else zeros for key in keys])

    def queried(self, contexts: Sequence[Sequence[Segment] | None], closed: bool = False) -> Tensor:
        """The hidden states (B, Q, H) of the queries behind each context; ``closed``: with the empty turn that the
        authors' training has before them. Differentiable in the queries."""
        language = self.language
        queries = language.inputs(self.queries().to(language.device, language.text.dtype))
        requests = [
            [chat.BLANK + chat.IMAGE] if context is None else chat.requested(context, self._text, closed)
            for context in contexts
        ]
        images = [part for parts in requests for part in parts if isinstance(part, Segment)]
        runs = self._image_runs(images, [RECONSTRUCTED] * len(images))
        rows = Rows.of([flattened(joined([*self._runs(parts, runs), queries])) for parts in requests])
        return language.extend(language.empty(len(rows.inputs)), rows)[:, -self.config.queries :]

    def queries(self) -> Tensor:
        """The queries (Q, H), from the file while the network is empty."""
        trained = self.network.latent_queries
        if not trained.is_meta:
            return trained[0]
        name = "model.latent_queries"
        with open_tensors(self.headers.files[name]) as tensors:
            stored: Tensor = tensors.get_tensor(name)
        return stored[0]

    @torch.no_grad()
    def prepare(self, examples: Iterable[Sequence[Segment]]) -> None:
        """Keep the conditions of all that will be trained on, and let the language model go; trained queries, which
        would change them, keep both."""
        self.known.clear()
        if self.network.latent_queries.requires_grad:
            return
        contexts = chain([None], (context for example in examples for context in _variants(example)))
        while some := list(islice(contexts, AT_ONCE)):
            missing = {key: context for context in some if (key := _key(context)) not in self.known}
            if missing:
                self.known |= zip(missing, self.queried(list(missing.values())).cpu(), strict=True)
        del self.language

    # ---------------------------------------------------------------- reading and writing

    @torch.no_grad()
    def write(self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]) -> list[Written]:
        """A reply to each context. Raises ValueError unless there are as many seeds."""
        if len(contexts) != len(seeds):
            raise ValueError(f"{len(contexts)} contexts and {len(seeds)} seeds")
        if not contexts:
            return []
        rows = self.decode_tokens(*self.read(contexts), decoding, seeds)
        return [Written(self.tokenizer.decode(row.ids), row.ids, torch.tensor(row.logprobs), row.ended) for row in rows]

    def decode_tokens(self, context: Context, states: Tensor, decoding: Decoding, seeds: Sequence[int]) -> list[Row]:
        """Tokens after each row, of which ``states`` (B, H) are the last; at most ``max_tokens`` - 1 of them."""
        texts = [Row([]) for _ in seeds]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows, alive, limit = list(range(len(texts))), set(range(len(texts))), decoding.max_tokens - 1
        for number in range(limit):
            logits = self.language.logits(states)
            token, logprob = pick(logits, decoding.temperature, [generators[i] for i in rows])
            for i, *chosen in zip(rows, token.tolist(), logprob.tolist(), strict=True):
                if i in alive:
                    go_on(texts[i], [chosen[0]], [chosen[1]], self.stop, limit)
                if texts[i].ended:
                    alive.discard(i)
            if not alive or number + 1 == limit:
                break
            if 2 * len(alive) <= len(rows):
                kept = [place for place, i in enumerate(rows) if i in alive]
                context, token, rows = context.select(kept), token[kept], [rows[place] for place in kept]
            states = self.language.step(context, token)[:, -1]
        return texts

    @torch.no_grad()
    def score(self, contexts: Sequence[Sequence[Segment]], continuations: Sequence[str]) -> list[Tensor]:
        """Per context (continuations,): the log-probability of each as the beginning of a reply, or as more of one that
        is begun: branches over their context, in one pass."""
        if not contexts:
            return []
        branches = [self.ids(text) for text in continuations]
        context, states = self.read(contexts)
        first = self.language.logits(states).log_softmax(-1)
        total = first[:, [ids[0] for ids in branches]]
        more = [(number, ids) for number, ids in enumerate(branches) if len(ids) > 1]
        if more:
            hidden = self.language.beside(context, [self.language.tokens(ids[:-1]) for _, ids in more])
            targets = torch.tensor([token for _, ids in more for token in ids[1:]], device=self.device)
            owner = torch.tensor([number for number, ids in more for _ in ids[1:]], device=self.device)
            for row, state in zip(total, hidden, strict=True):  # row by row: a vocabulary is large
                each = self.language.logits(state).log_softmax(-1).gather(1, targets[:, None])[:, 0]
                row.index_add_(0, owner, each)
        return list(total.cpu())

    def read(self, contexts: Sequence[Sequence[Segment]]) -> tuple[Context, Tensor]:
        """Contexts up to their replies, or in them where these are begun, and the last hidden states (B, H).

        What contexts have in common up to their last image is read once.
        """
        language = self.language
        closed = [context[:-1] if context and context[-1].open else context for context in contexts]
        begun = [self._text(context[-1]) if context and context[-1].open else "" for context in contexts]
        asked = [chat.asked(context, self._text) for context in closed]
        heads: dict[tuple[object, ...], list[chat.Part]] = {}
        for parts in asked:
            heads.setdefault(_head(parts), parts[:-1])
        images = self._image_runs([part for parts in heads.values() for part in parts if isinstance(part, Segment)])
        context = language.empty(len(heads))
        before = Rows.of([joined(self._runs(parts, images)) for parts in heads.values()])
        if before.present.shape[1]:
            language.extend(context, before)
        place = {head: row for row, head in enumerate(heads)}
        context = context.select([place[_head(parts)] for parts in asked])
        tails = [
            language.tokens([*self.ids(parts[-1]), *self.ids(start)])  # type: ignore[arg-type]  # the last is a text
            for parts, start in zip(asked, begun, strict=True)
        ]
        return context, language.extend(context, Rows.of(tails))[:, -1]

    def _image_runs(self, segments: Sequence[Segment], sizes: Sequence[Size] | None = None) -> dict[int, Run]:
        """Each image as the language model sees it, by the identity of its segment; each is looked at once."""
        distinct = list({id(segment): segment for segment in segments}.values())
        images = self.language.images(
            [_image(segment) for segment in distinct], None if sizes is None else sizes[: len(distinct)]
        )
        return {id(segment): run for segment, run in zip(distinct, images, strict=True)}

    def _runs(self, parts: Sequence[chat.Part], images: Mapping[int, Run]) -> list[Run]:
        none = self.language.tokens([])
        return [none, *(self.language.tokens(self.ids(p)) if isinstance(p, str) else images[id(p)] for p in parts)]

    def _text(self, segment: Segment) -> str:
        if segment.text is None and segment.ids is None:
            raise ValueError("a text segment needs a text or ids")
        return self.tokenizer.decode(segment.ids) if segment.text is None else segment.text

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
        """Features with a loss, and texts: none. Raises ModelError for a text with one."""
        if any(segment.loss and segment.kind == "text" for segment in segments):
            raise ModelError("BLIP3-o does not learn texts: its language model stays as it is")
        return self.config.grid**2 * sum(segment.loss and segment.kind == "noisy" for segment in segments), 0

    def length(self, segments: Sequence[Segment]) -> int:
        """Features, and where the queries are trained what the language model reads before and with them."""
        drawn = list(_drawn(segments))
        features = self.config.grid**2 * len(drawn)
        if not self.network.latent_queries.requires_grad:
            return features
        return features + sum(map(self._read_length, {_key(context): context for context, _ in drawn}.values()))

    def _read_length(self, context: Sequence[Segment]) -> int:
        """Tokens that the language model reads of a context, and the queries."""
        texts = [segment for segment in context if segment.kind == "text"]
        images = len(context) - len(texts)
        (request,) = chat.requested(texts, self._text)
        seen = math.prod(side // (self.language.factor) for side in RECONSTRUCTED) if images else 0
        return len(self.ids(str(request))) + images * seen + self.config.queries

    def pack(
        self, samples: Sequence[Sequence[Segment]], corruptions: Sequence[FlowNoise], *, sees: bool = False
    ) -> Batch:
        """A batch, one row per noisy latent, each behind what it is drawn after.

        A corruption for each without a state, in order. Raises ModelError for samples without, and with clean images.
        """
        for one in samples:
            _check(one)
        drawn = iter(corruptions)
        contexts, noisy = zip(*chain.from_iterable(map(_drawn, samples)), strict=True)
        x, t, target = (list(values) for values in zip(*(self._noisy(one, drawn) for one in noisy), strict=True))
        if (left := len(list(drawn))) > 0:
            raise ValueError(f"{left} of {len(corruptions)} corruptions have no noisy segment")
        trained = self.network.latent_queries.requires_grad
        with torch.no_grad():
            known = None if trained else self.conditions(contexts)
        return Batch(
            x=torch.stack(x).transpose(1, 2).unflatten(2, (self.config.grid, -1)).to(self.device),
            t=torch.tensor(t, device=self.device),
            target=torch.stack(target).to(self.device),
            learned=torch.tensor([segment.loss for segment in noisy], device=self.device),
            conditions=known,
            contexts=contexts,
        )

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
        """Velocities of every feature with a loss, in float32."""
        conditions = self.conditions(batch.contexts) if batch.conditions is None else batch.conditions
        velocity = self.network.dit(batch.x, batch.t, conditions).float().flatten(2).transpose(1, 2)[batch.learned]
        count, cells = velocity.shape[:2]
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        return FlowForward(
            velocity=velocity.flatten(0, 1),
            target=batch.target[batch.learned].flatten(0, 1),
            timestep=batch.t[batch.learned].repeat_interleave(cells),
            image_segment=torch.arange(count, device=self.device).repeat_interleave(cells),
            cell=torch.arange(cells, device=self.device).repeat(count),
            logits=torch.zeros(0, self.config.qwen.text_config.vocab_size, device=self.device),
            labels=none,
            text_segment=none,
        )


def _drawn(example: Sequence[Segment]) -> Iterator[tuple[list[Segment], Segment]]:
    """Each noisy segment of an example behind what it is drawn after: what is before it that it may see."""
    for place, noisy in enumerate(example):
        if noisy.kind == "noisy":
            seen = [s for s in example[:place] if s.kind != "noisy" and s.branch in (0, noisy.branch)]
            yield [segment for segment in seen if not segment.dropped], noisy


def _check(example: Sequence[Segment]) -> None:
    """Raises ModelError for an example that cannot be learned from."""
    kinds = {segment.kind for segment in example}
    if "noisy" not in kinds:
        raise ModelError("BLIP3-o learns to draw images; an example has no noisy segment")
    if "clean" in kinds:
        raise ModelError("BLIP3-o draws after texts and images that it sees, not after a clean image")


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
    contents = [_image(s).tobytes() if s.kind == "seen" else repr(s.text or s.ids).encode() for s in context]
    return b"".join(hashlib.sha256(content).digest() for content in contents)


def _head(parts: Sequence[chat.Part]) -> tuple[object, ...]:
    """What stands before the last text of a conversation; images by their identity."""
    return tuple(part if isinstance(part, str) else id(part) for part in parts[:-1])


def _image(segment: Segment) -> Image:
    if segment.image is None or isinstance(segment.image, Path | Tensor):
        raise ValueError(f"a seen segment needs an image, got {segment.image}")
    return segment.image


def _paths(steps: Steps, sampling: Sampling) -> list[SampledPath]:
    """Per image what all steps have passed through."""
    timesteps = schedule(sampling)[:-1].float()
    states, velocities = (torch.stack(values, dim=1).cpu() for values in zip(*steps, strict=True))
    return [SampledPath(x, timesteps, v) for x, v in zip(states, velocities, strict=True)]


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


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
