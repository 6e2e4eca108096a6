"""Harmon behind the protocol of ``srum.models.base`` (docs/specs/harmon.md).

One encoder sees and draws: MAR's encoder, the language model and MAR's decoder run behind one another, and a small
diffusion head draws each token. What judges is therefore what is trained, unless ``trainable`` is ``generation``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL.Image import Image
from torch import Tensor, nn

from srum.errors import ModelError
from srum.geometry import Size
from srum.models.base import (
    REFINE_SYSTEM,
    REFINE_USER,
    REFLECT_QUESTION,
    REFLECT_STOP,
    Ability,
    Corruption,
    Decoding,
    Exploration,
    Generated,
    Sampling,
    Segment,
    Written,
    require,
)
from srum.models.checkpoints import load_tokenizer
from srum.models.harmon import chat
from srum.models.harmon.autoencoder import decode_latents, encode_mean
from srum.models.harmon.checkpoint import (
    GENERATION,
    HarmonNetwork,
    check,
    empty_network,
    load_autoencoder,
    read_headers,
    read_into,
    save_checkpoint,
)
from srum.models.harmon.config import HarmonConfig
from srum.models.harmon.head import diffusion, variational_bound
from srum.models.harmon.images import padded, stretched, to_image, to_pixels
from srum.models.harmon.language import Context, Language
from srum.models.harmon.mar import Masked
from srum.models.harmon.sampler import Chance, GuidanceSchedule, Seeded, sample
from srum.models.harmon.training import Drawn, HarmonForward, Masking, TrainingRow, masking
from srum.models.precision import Precision, computing
from srum.models.texts import Row, go_on, pick, token_id

Preparation = Callable[[Image, int], Image]  # to a square of so many pixels
SEEN_GRADIENT = 0.1  # of the gradient that reaches the encoder through an image that is seen
AT_ONCE = 16  # images per pass of the autoencoder


class Harmon:
    """A Harmon checkpoint of any size. Meets ``TrainableModel``."""

    abilities: frozenset[Ability] = frozenset({"seen", "train", "infill"})
    plan_instruction = ""
    refine_texts = (REFINE_SYSTEM, REFINE_USER)
    reflect_question, reflect_stop = REFLECT_QUESTION, REFLECT_STOP
    seen_gradient = SEEN_GRADIENT

    def __init__(
        self, folder: Path, device: torch.device, precision: Precision, dtype: torch.dtype, empty: bool = False
    ) -> None:
        self.folder, self.device, self.precision = folder, device, precision
        self.headers = read_headers(folder)
        self.config = HarmonConfig.from_folder(folder, self.headers)
        check(folder, self.config, self.headers)
        self.tokenizer = load_tokenizer(folder)
        self.ids = lru_cache(maxsize=65536)(lambda text: tuple(self.tokenizer.encode(text, add_special_tokens=False)))
        self.stop, _ = (token_id(self.tokenizer, name, folder) for name in (chat.END, "<|im_start|>"))
        self.network: HarmonNetwork = empty_network(self.config).to(dtype).eval()
        self.network.mar.requires_grad_(True)
        self.language = Language(self.network.llm["model"])
        if not empty:
            self.network.to_empty(device=device)
            self.read_weights()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        dtype: torch.dtype = torch.float32,
        empty: bool = False,
    ) -> Harmon:
        """A folder in one of the official layouts. With ``empty`` the network gets no storage by itself: it may be
        sharded, is then given its storage (``to_empty``), and filled by ``read_weights``.

        Raises ModelError for a folder of another model, for pickles, and for tensors that do not fit.
        """
        return cls(Path(folder), torch.device(device), precision, dtype, empty)

    # ---------------------------------------------------------------- parts

    @cached_property
    def autoencoder(self) -> AutoencoderKL:
        """What makes latents of images and images of latents."""
        return load_autoencoder(self.config, self.headers, self.device)

    def read_weights(self) -> None:
        """Fill the network from the model's folder: each tensor, or the part of it that this process holds."""
        read_into(self.network, self.config, self.headers)

    def compile(self) -> None:
        """Not an ability of this model."""
        raise ModelError("compile: Harmon does not run through torch.compile; leave it false")

    def save(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, *, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the layout of the model's folder: the network's ``weights`` as ``dtype``, all else as it is there.

        Raises ModelError for that folder itself.
        """
        weights = self.network.state_dict() if weights is None else weights
        cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in weights.items()}
        save_checkpoint(self.folder, Path(folder), self.headers, cast)

    def layers(self) -> list[nn.Module]:
        """Those that repeat, of the language model, MAR and the head: what training shards, and may recompute."""
        mar = self.network.mar
        blocks = (self.language.model.layers, mar.encoder_blocks, mar.decoder_blocks, mar.diffloss.net.res_blocks)
        return list(chain.from_iterable(blocks))

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All but the autoencoder."""
        return list(self.network.named_parameters())

    def generation_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """MAR's decoder, the head, and what leads from the language model to them: seeing and judging stay as they
        are, bit for bit."""
        return [(name, p) for name, p in self.network.named_parameters() if name.startswith(GENERATION)]

    # ---------------------------------------------------------------- images and latents

    def latent_grid(self, size: Size) -> Size:
        """(h, w) in latent tokens of an image of (H, W) pixels. Raises ModelError for what is no image's."""
        stride = self.config.autoencoder.stride
        if size[0] % stride or size[1] % stride or min(size) < stride:
            raise ModelError(f"image size {size} is not a multiple of {stride} pixels")
        return size[0] // stride, size[1] // stride

    def tokens(self, latent: Tensor) -> Tensor:
        """(C, h, w) to (h w, C)."""
        return latent.flatten(1).T

    def resized(self, image: Image) -> Image:
        """The image as a square of the usual side, its proportions not kept, as RecA has it on this model."""
        return stretched(image, self.config.side)

    def encode(self, images: Sequence[Image]) -> list[Tensor]:
        """Latents (C, h, w) of images, each made a square."""
        return self._encoded([self.resized(image) for image in images])

    def _encoded(self, images: Sequence[Image]) -> list[Tensor]:
        """Latents (C, h, w) of images as they are, neighbours of one size together."""
        pixels = [to_pixels(image) for image in images]
        made: dict[int, Tensor] = {}
        for run in _alike([one.shape for one in pixels]):
            latents = encode_mean(self.autoencoder, torch.stack([pixels[i] for i in run]).to(self.device))
            made |= zip(run, latents.cpu(), strict=True)
        return [made[place] for place in range(len(images))]

    def decode(self, latents: Sequence[Tensor]) -> list[Image]:
        """Images of clean latents (C, h, w)."""
        made: dict[int, Image] = {}
        for run in _alike([latent.shape for latent in latents]):
            pixels = decode_latents(self.autoencoder, torch.stack([latents[i] for i in run]).to(self.device))
            made |= zip(run, map(to_image, pixels), strict=True)
        return [made[place] for place in range(len(latents))]

    # ---------------------------------------------------------------- drawing

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
        """An image after each context of texts and seen images, in ``timesteps`` - 1 iterations of ``decoder_steps``
        steps of the head. Raises ValueError unless all are as many, MissingAbility for a ``path`` or steps on it."""
        require(self, {"path"} if path or explore else (), "telling the way to an image")
        sizes = [sampling.size] * len(contexts) if sizes is None else sizes
        grids = [self.latent_grid(size) for size in sizes]
        blank = [torch.zeros(self.config.mar.channels, *grid) for grid in grids]
        return self.infill(contexts, blank, [torch.ones(grid, dtype=torch.bool) for grid in grids], sampling, seeds)

    @torch.no_grad()
    def infill(
        self,
        contexts: Sequence[Sequence[Segment]],
        latents: Sequence[Tensor],
        holes: Sequence[Tensor],
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[Generated]:
        """Images of which only the cells in ``holes`` (h, w) are drawn, after each context; of ``latents`` (C, h, w)
        the other cells are kept. Raises ValueError unless all are as many."""
        if len({len(contexts), len(latents), len(holes), len(seeds)}) > 1:
            raise ValueError(f"{len(contexts)} contexts, {len(latents)} latents and {len(seeds)} seeds")
        made = list(latents)
        for run in _alike([(*latent.shape, int(hole.sum())) for latent, hole in zip(latents, holes, strict=True)]):
            if holes[run[0]].any():
                kept = torch.stack([latents[i] for i in run])
                hidden = torch.stack([holes[i].flatten() for i in run])
                chances = [Seeded(seeds[i]) for i in run]
                drawn = self.sampled([contexts[i] for i in run], kept, hidden, sampling, chances)
                for i, latent in zip(run, drawn.cpu(), strict=True):
                    made[i] = latent
        return [Generated(image, latent) for image, latent in zip(self.decode(made), made, strict=True)]

    @torch.no_grad()
    def sampled(
        self,
        contexts: Sequence[Sequence[Segment]],
        latents: Tensor,
        hidden: Tensor,
        sampling: Sampling,
        chances: Sequence[Chance],
        schedule: GuidanceSchedule = "constant",
    ) -> Tensor:
        """``latents`` (B, C, h, w) with the ``hidden`` tokens (B, h w), of each as many, drawn."""
        guided = sampling.guidance > 1
        wholes = [*contexts, *([] for _ in contexts if guided)]
        grid = (latents.shape[2], latents.shape[3])
        with computing(self.device, self.precision):
            prompts = self._written(wholes)

            def conditions(tokens: Tensor, still: Tensor, now: Tensor) -> list[Tensor]:
                images = [Masked(x[~mask], mask, grid) for x, mask in zip(tokens, still, strict=True)]
                states = self.through(prompts, images)
                decoded = torch.stack(self.network.mar.decode(states, images * (1 + guided))).float()
                branches = decoded.unflatten(0, (1 + guided, -1))
                return [branch[torch.arange(len(now))[:, None], now].flatten(0, 1) for branch in branches]

            tokens = sample(
                self.network.mar.diffloss.net,
                conditions,
                latents.flatten(2).transpose(1, 2).to(self.device, torch.float32),
                hidden.to(self.device),
                chances,
                sampling.timesteps - 1,
                sampling.decoder_steps,
                sampling.guidance,
                sampling.temperature,
                schedule,
            )
        return tokens.transpose(1, 2).unflatten(2, grid)

    def _written(self, contexts: Sequence[Sequence[Segment]]) -> Context:
        """The language model after the requests of contexts."""
        parts = [chat.requested(context, self._text) for context in contexts]
        seen = self.seen([part for row in parts for part in row if isinstance(part, Segment)], stretched)
        prompts = self.language.empty(len(contexts))
        self.language.extend(prompts, [self._inputs(row, seen) for row in parts])
        return prompts

    def through(self, prompts: Context, images: Sequence[Masked]) -> list[Tensor]:
        """What the encoder sees of images, taken through the language model after the prompts, of which there are once
        or twice as many: (buffers + L, D) each. The prompts are left as they were."""
        encoded = self.network.mar.encode(images) * (len(prompts.present) // len(images))
        states = self.language.extend(prompts, [self.into(one) for one in encoded])
        prompts.forget(states.shape[1])
        return [self._out_of(one, state) for one, state in zip(encoded, states, strict=True)]

    def into(self, encoded: Tensor) -> Tensor:
        """What the language model reads of an encoded image (buffers + L, H): its tokens, then the buffers."""
        return self.network.proj_in(encoded).roll(-self.config.mar.buffers, 0)

    def _out_of(self, encoded: Tensor, states: Tensor) -> Tensor:
        """What the decoder gets: the encoded image (buffers + L, D) and what the language model adds to it."""
        return encoded + self.network.proj_out(states.roll(self.config.mar.buffers, 0))

    # ---------------------------------------------------------------- reading and writing

    @torch.no_grad()
    def write(self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]) -> list[Written]:
        """A reply to each context. Raises ValueError unless there are as many seeds."""
        if len(contexts) != len(seeds):
            raise ValueError(f"{len(contexts)} contexts and {len(seeds)} seeds")
        if not contexts:
            return []
        with computing(self.device, self.precision):
            rows = self.decode_tokens(*self.read(contexts), decoding, seeds)
        return [Written(self.tokenizer.decode(row.ids), row.ids, torch.tensor(row.logprobs), row.ended) for row in rows]

    def decode_tokens(self, context: Context, states: Tensor, decoding: Decoding, seeds: Sequence[int]) -> list[Row]:
        """Tokens after each row, of which ``states`` (B, H) are the last; at most ``max_tokens`` - 1 of them."""
        texts = [Row([]) for _ in seeds]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows, alive, limit = list(range(len(texts))), set(range(len(texts))), decoding.max_tokens - 1
        for number in range(limit):
            token, logprob = pick(self.language.logits(states), decoding.temperature, [generators[i] for i in rows])
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
            states = self.language.extend(context, list(self.language.tokens(token)[:, None]))[:, -1]
        return texts

    @torch.no_grad()
    def score(self, contexts: Sequence[Sequence[Segment]], continuations: Sequence[str]) -> list[Tensor]:
        """Per context (continuations,): the log-probability of each."""
        if not contexts:
            return []
        branches = [self.ids(continuation) for continuation in continuations]
        with computing(self.device, self.precision):
            context, states = self.read(contexts)
            first = self.language.logits(states).log_softmax(-1)
            total = first[:, [ids[0] for ids in branches]]
            if more := [(number, ids) for number, ids in enumerate(branches) if len(ids) > 1]:
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
        closed = [context[:-1] if context and context[-1].open else context for context in contexts]
        begun = [self._text_ids(context[-1]) if context and context[-1].open else () for context in contexts]
        asked = [chat.asked(context, self._text) for context in closed]
        heads: dict[tuple[object, ...], list[chat.Part]] = {}
        for parts in asked:
            heads.setdefault(_head(parts), parts[:-1])
        seen = self.seen([part for parts in heads.values() for part in parts if isinstance(part, Segment)], padded)
        context = self.language.empty(len(heads))
        before = [self._inputs(parts, seen) for parts in heads.values()]
        if any(map(len, before)):
            self.language.extend(context, before)
        place = {head: row for row, head in enumerate(heads)}
        context = context.select([place[_head(parts)] for parts in asked])
        tails = [
            self.language.tokens([*self.ids(str(parts[-1])), *start]) for parts, start in zip(asked, begun, strict=True)
        ]
        return context, self.language.extend(context, tails)[:, -1]

    def seen(self, segments: Sequence[Segment], prepare: Preparation) -> dict[int, Tensor]:
        """What the language model reads of each image (n + buffers, H), by the identity of its segment; each is looked
        at once."""
        distinct = list({id(segment): segment for segment in segments}.values())
        if not distinct:
            return {}
        latents = self._encoded([prepare(_image(segment), self._side(segment)) for segment in distinct])
        encoded = self.network.mar.encode([Masked.seen(latent.to(self.device)) for latent in latents])
        return {id(segment): self.into(one) for segment, one in zip(distinct, encoded, strict=True)}

    def _side(self, segment: Segment) -> int:
        """Of the square in pixels that an image is seen as."""
        stride = self.config.autoencoder.stride
        return self.config.side if segment.side is None else max(stride, segment.side // stride * stride)

    def _inputs(self, parts: Sequence[chat.Part], seen: Mapping[int, Tensor]) -> Tensor:
        """(L, H) of texts and images in a row."""
        none = self.language.tokens([])
        pieces = [self.language.tokens(self.ids(p)) if isinstance(p, str) else seen[id(p)] for p in parts]
        return torch.cat([none, *pieces])

    def _text(self, segment: Segment) -> str:
        if segment.text is None and segment.ids is None:
            raise ValueError("a text segment needs a text or ids")
        return self.tokenizer.decode(segment.ids) if segment.text is None else segment.text

    def _text_ids(self, segment: Segment) -> Sequence[int]:
        return self.ids(self._text(segment)) if segment.ids is None else segment.ids

    # ---------------------------------------------------------------- training

    def corrupt(
        self, latent: Tensor, generator: torch.Generator, timestep_shift: float, t: float | None = None
    ) -> Masking:
        """Which tokens are hidden, and when and with what noise the head is asked for them; ``t`` is the share."""
        count, config = latent[0].numel(), self.config
        return masking(count, config.mar.channels, config.repeats, config.mask_least, generator, t)

    def targets(self, segments: Sequence[Segment], corruptions: Sequence[Corruption]) -> tuple[int, int]:
        """Hidden tokens with a loss, and those of texts with one, their ends included."""
        noisy = [segment for segment in segments if segment.kind == "noisy"]
        masks: Any = corruptions
        hidden = sum(int(mask.hidden.sum()) for one, mask in zip(noisy, masks, strict=False) if one.loss)
        texts = [segment for segment in segments if segment.kind == "text" and segment.loss and not segment.dropped]
        return hidden, sum(len(self._text_ids(segment)) + 1 for segment in texts)

    def length(self, segments: Sequence[Segment]) -> int:
        """Tokens of texts and images, those of an image that is drawn all counted, with their buffers."""
        context, last = _divided(segments)
        parts, stride = self._parts(context, last), self.config.autoencoder.stride
        texts = sum(len(self.ids(part)) for part in parts if isinstance(part, str))
        grids = [(self._side(part) // stride) ** 2 for part in parts if isinstance(part, Segment)]
        if last.kind == "noisy":
            grids.append(math.prod(_latent(last).shape[1:]))
        return texts + sum(self.targets([last], [])) + sum(grids) + self.config.mar.buffers * len(grids)

    def _parts(self, context: Sequence[Segment], last: Segment) -> list[chat.Part]:
        """What stands before an image that is learned, or before a reply."""
        if last.kind == "text":
            return chat.asked(context, self._text)
        return chat.requested(context, self._text, trained=True)

    @torch.no_grad()
    def pack(
        self, samples: Sequence[Sequence[Segment]], corruptions: Sequence[Masking], *, sees: bool = False
    ) -> list[TrainingRow]:
        """A row per sample: an image behind what it is drawn after, or a reply behind what it is written after.

        A corruption for each noisy segment, in order. ``sees``: with a row, of no weight, of an image that is seen and
        one that is drawn, where the others have not both. Raises ModelError for what is neither.
        """
        drawn = iter(corruptions)
        rows = [self._row(sample, drawn) for sample in samples]
        if (left := len(list(drawn))) > 0:
            raise ValueError(f"{left} of {len(corruptions)} corruptions have no noisy segment")
        seen = any(isinstance(part, Masked) for row in rows for part in row.parts)
        both = seen and any(isinstance(row.end, Drawn) for row in rows)
        return [*rows, self._blank_row()] if sees and not both else rows

    def _row(self, sample: Sequence[Segment], corruptions: Iterator[Masking]) -> TrainingRow:
        context, last = _divided(sample)
        parts = self._parts(context, last)
        if last.kind == "text":
            return TrainingRow(self._pieces(parts, padded), self._tensor([*self._text_ids(last), self.stop]))
        if last.state is not None or (how := next(corruptions, None)) is None:
            raise ValueError("a noisy segment needs a latent and a corruption, and no state")
        return TrainingRow(self._pieces(parts, stretched), Drawn.of(_latent(last).to(self.device), how, last.loss))

    def _pieces(self, parts: Sequence[chat.Part], prepare: Preparation) -> list[Tensor | Masked]:
        """Ids of texts, and latents of images that are seen."""
        images = [part for part in parts if isinstance(part, Segment)]
        latents = self._encoded([prepare(_image(one), self._side(one)) for one in images])
        seen = (Masked.seen(latent.to(self.device)) for latent in latents)
        return [self._tensor(self.ids(part)) if isinstance(part, str) else next(seen) for part in parts]

    def _blank_row(self) -> TrainingRow:
        """An image of one token that is seen, and one that is drawn."""
        latent = torch.zeros(self.config.mar.channels, 1, 1, device=self.device)
        how = self.corrupt(latent, torch.Generator().manual_seed(0), 1.0)
        return TrainingRow([self._tensor([self.stop]), Masked.seen(latent)], Drawn.of(latent, how, learned=False))

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def forward(self, batch: Sequence[TrainingRow]) -> HarmonForward:
        """The noise of every hidden token with a loss, and the logits of every reply, in float32."""
        images = [row.end for row in batch if isinstance(row.end, Drawn)]
        encoded = self.network.mar.encode([one.image for one in images]) if images else []
        inputs = self._inputs_of(batch, encoded)
        states = [x[: len(row)] for x, row in zip(self.language.whole(inputs), inputs, strict=True)]
        ends = [(state, row.end) for state, row in zip(states, batch, strict=True)]
        after = [state for state, end in ends if isinstance(end, Drawn)]
        replies = [(state[-len(end) :], end) for state, end in ends if not isinstance(end, Drawn)]
        predicted, noise, bound = self._asked(images, self._conditions(images, encoded, after))
        sizes = torch.tensor([len(one.clean) for one in images], dtype=torch.long, device=self.device)
        kept = torch.tensor([one.learned for one in images], dtype=torch.bool, device=self.device)
        learned, counts = kept.repeat_interleave(sizes), sizes[kept]
        idle = 0 * (predicted[~learned].sum() + bound[~learned].sum())  # so that its backward pass is run, too
        hidden = [one.image.hidden for one in images if one.learned]
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        logits = [self.language.logits(state) for state, _ in replies]
        empty = torch.zeros(0, self.config.qwen.vocab_size, device=self.device)
        return HarmonForward(
            predicted=predicted[learned] + idle,
            noise=noise[learned],
            bound=bound[learned] + idle,
            timestep=torch.cat([none.float(), *(mask.float().mean().expand(int(mask.sum())) for mask in hidden)]),
            image_segment=torch.arange(len(counts), device=self.device).repeat_interleave(counts),
            cell=torch.cat([none, *(mask.nonzero()[:, 0] for mask in hidden)]),
            logits=torch.cat([empty, *logits]) + idle,
            labels=torch.cat([none, *(ids for _, ids in replies)]),
            text_segment=torch.cat([none, *(torch.full_like(ids, i) for i, (_, ids) in enumerate(replies))]),
        )

    def _inputs_of(self, batch: Sequence[TrainingRow], encoded: Sequence[Tensor]) -> list[Tensor]:
        """What the language model reads of each row (L, H); ``encoded`` are the images that are drawn, in order."""
        images = [part for row in batch for part in row.parts if isinstance(part, Masked)]
        seen = iter(self.network.mar.encode(images) if images else [])
        behind, rows = iter(encoded), []
        for row in batch:
            pieces = [
                self._looked_at(next(seen)) if isinstance(part, Masked) else self.language.tokens(part)
                for part in row.parts
            ]
            drawn = isinstance(row.end, Drawn)
            end = self.into(next(behind)) if drawn else self.language.tokens(row.end[:-1])  # type: ignore[index]
            rows.append(torch.cat([*pieces, end]))
        return rows

    def _looked_at(self, encoded: Tensor) -> Tensor:
        """What the language model reads of an image that is seen, with its share of the gradient."""
        seen = self.into(encoded)
        return seen.detach() + self.seen_gradient * (seen - seen.detach())

    def _conditions(self, images: Sequence[Drawn], encoded: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor]:
        """What the hidden tokens of each image are drawn after (k, E); the images stand at the ends of the states."""
        if not images:
            return []
        through = [self._out_of(one, state[-len(one) :]) for one, state in zip(encoded, states, strict=True)]
        decoded = self.network.mar.decode(through, [one.image for one in images])
        return [z[one.image.hidden] for z, one in zip(decoded, images, strict=True)]

    def _asked(self, images: Sequence[Drawn], conditions: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of all hidden tokens the noise predicted and added (N, M, C), and the bound (N,)."""
        repeats, channels = self.config.repeats, self.config.mar.channels
        if not images:
            nothing = torch.zeros(0, repeats, channels, device=self.device)
            return nothing, nothing, nothing.sum((1, 2))
        clean = torch.cat([one.clean for one in images]).repeat(repeats, 1)
        t = torch.cat([one.steps for one in images], dim=1).flatten()
        noise = torch.cat([one.noise for one in images], dim=1).flatten(0, 1)
        x = diffusion().noised(clean, noise, t)
        z = torch.cat(list(conditions)).repeat(repeats, 1)
        predicted, v = self.network.mar.diffloss.net(x, t, z).float().chunk(2, dim=1)
        values = predicted, noise, variational_bound(clean, x, predicted, v, t)
        predicted, noise, bound = (one.unflatten(0, (repeats, -1)).transpose(0, 1) for one in values)
        return predicted, noise, bound.mean(1)


def _divided(example: Sequence[Segment]) -> tuple[list[Segment], Segment]:
    """The image or the reply that is learned of an example, and what stands before it. Raises ModelError where there is
    none, or another."""
    *context, last = [segment for segment in example if not segment.dropped]
    if last.kind != "noisy" and not (last.kind == "text" and last.loss):
        raise ModelError("Harmon learns to draw images and to reply; an example has neither at its end")
    if any(s.kind == "noisy" or s.loss for s in context) or any(s.branch for s in example):
        raise ModelError("Harmon learns one image or one reply of an example, the last of it, in one branch")
    return context, last


def _latent(segment: Segment) -> Tensor:
    if segment.latent is None:
        raise ValueError("a noisy segment needs a latent")
    return segment.latent


def _image(segment: Segment) -> Image:
    if segment.image is None or isinstance(segment.image, Path | Tensor):
        raise ValueError(f"a seen segment needs an image, got {segment.image}")
    return segment.image


def _head(parts: Sequence[chat.Part]) -> tuple[object, ...]:
    """What stands before the last text of a conversation; images by their identity."""
    return tuple(part if isinstance(part, str) else id(part) for part in parts[:-1])


def _alike(kinds: Sequence[object]) -> Iterator[list[int]]:
    """Places of what is of one kind, at most ``AT_ONCE`` together."""
    places: dict[object, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    for alike in places.values():
        yield from (alike[start : start + AT_ONCE] for start in range(0, len(alike), AT_ONCE))
