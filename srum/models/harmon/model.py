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
    fill,
    load_autoencoder,
    read_headers,
    save_checkpoint,
)
from srum.models.harmon.config import HarmonConfig
from srum.models.harmon.head import diffusion, variational_bound
from srum.models.harmon.images import padded, stretched, to_image, to_pixels
from srum.models.harmon.language import Language
from srum.models.harmon.mar import Masked
from srum.models.harmon.sampler import Chance, GuidanceSchedule, Seeded, sample
from srum.models.harmon.training import Drawn, HarmonForward, Masking, TrainingRow, masking
from srum.models.precision import Precision, computing
from srum.models.queries.chat import Part, asked
from srum.models.queries.language import Context, Rows, Run, joined
from srum.models.queries.reading import Reader, image_of
from srum.models.texts import token_id

Preparation = Callable[[Image, int], Image]  # to a square of so many pixels
SEEN_GRADIENT = 0.1  # of the gradient that reaches the encoder through an image that is seen
AT_ONCE = 16  # images per pass of the autoencoder


class Harmon(Reader):
    """A Harmon checkpoint of any size. Meets ``TrainableModel``."""

    name = "Harmon"
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
        self.stop, _ = (token_id(self.tokenizer, name, folder) for name in ("<|im_end|>", "<|im_start|>"))
        self.network: HarmonNetwork = empty_network(self.config).to(dtype).eval()
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
        fill(self.network, self.config, self.headers)

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
        blocks = (self.language.text.layers, mar.encoder_blocks, mar.decoder_blocks, mar.diffloss.net.res_blocks)
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
        for run in _alike([one.shape for one in pixels], AT_ONCE):
            latents = encode_mean(self.autoencoder, torch.stack([pixels[i] for i in run]).to(self.device))
            made |= zip(run, latents.cpu(), strict=True)
        return [made[place] for place in range(len(images))]

    def decode(self, latents: Sequence[Tensor]) -> list[Image]:
        """Images of clean latents (C, h, w)."""
        made: dict[int, Image] = {}
        for run in _alike([latent.shape for latent in latents], AT_ONCE):
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
            raise ValueError(
                f"{len(contexts)} contexts, {len(latents)} latents, {len(holes)} holes, {len(seeds)} seeds"
            )
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
            prompts = self._prompted(wholes)

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

    def _prompted(self, contexts: Sequence[Sequence[Segment]]) -> Context:
        """The language model after the requests of contexts."""
        requests = [chat.requested(context, self.text_of) for context in contexts]
        images = self._image_runs([part for parts in requests for part in parts], drawn=True)
        runs = [joined(self._runs(parts, images)) for parts in requests]
        for parts, run in zip(requests, runs, strict=True):
            self._require_fit(parts, len(run.inputs))
        prompts = self.language.empty(len(contexts))
        self.language.extend(prompts, Rows.of(runs))
        return prompts

    def through(self, prompts: Context, images: Sequence[Masked]) -> list[Tensor]:
        """What the encoder sees of images, taken through the language model after the prompts, of which there are once
        or twice as many: (buffers + L, D) each. The prompts stay what they were."""
        encoded = self.network.mar.encode(images) * (len(prompts.present) // len(images))
        states = self.language.beyond(prompts, [self.into(one) for one in encoded])
        return [self._out_of(one, state) for one, state in zip(encoded, states, strict=True)]

    def into(self, encoded: Tensor) -> Tensor:
        """What the language model reads of an encoded image (buffers + L, H): its tokens, then the buffers."""
        return self.network.proj_in(encoded).roll(-self.config.mar.buffers, 0)

    def _out_of(self, encoded: Tensor, states: Tensor) -> Tensor:
        """What the decoder gets: the encoded image (buffers + L, D) and what the language model adds to it."""
        return encoded + self.network.proj_out(states.roll(self.config.mar.buffers, 0))

    # ---------------------------------------------------------------- reading and writing

    def write(self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]) -> list[Written]:
        """As ``Reader`` does, in what the model computes in."""
        with computing(self.device, self.precision):
            return super().write(contexts, decoding, seeds)

    def score(self, contexts: Sequence[Sequence[Segment]], continuations: Sequence[str]) -> list[Tensor]:
        """As ``Reader`` does, in what the model computes in."""
        with computing(self.device, self.precision):
            return super().score(contexts, continuations)

    def asked(self, context: Sequence[Segment]) -> list[Part]:
        """The conversation up to where a reply follows."""
        return asked(context, self.text_of, chat.WORDS)

    def looked_at(self, segments: Sequence[Segment], drawn: bool) -> list[Run]:
        """Images with their buffers, squares: padded where the model is asked, stretched where it draws after them."""
        if not segments:
            return []
        latents = self._seen(segments, stretched if drawn else padded)
        encoded = self.network.mar.encode([Masked.seen(latent) for latent in latents])
        return [self.language.inputs(self.into(one)) for one in encoded]

    def _seen(self, segments: Sequence[Segment], prepare: Preparation) -> list[Tensor]:
        """Latents (C, h, w) of images as they are seen."""
        images = [prepare(image_of(segment), self._side(segment)) for segment in segments]
        return [latent.to(self.device) for latent in self._encoded(images)]

    def _side(self, segment: Segment) -> int:
        """Of the square in pixels that an image is seen as."""
        stride = self.config.autoencoder.stride
        return self.config.side if segment.side is None else max(stride, segment.side // stride * stride)

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
        return hidden, sum(len(self.ids_of(segment)) + 1 for segment in texts)

    def length(self, segments: Sequence[Segment]) -> int:
        """Tokens of texts and images, those of an image that is drawn all counted, with their buffers."""
        context, last = _divided(segments)
        parts, stride = self._parts(context, last), self.config.autoencoder.stride
        texts = sum(len(self.ids(part)) for part in parts if isinstance(part, str))
        grids = [(self._side(part) // stride) ** 2 for part in parts if isinstance(part, Segment)]
        if last.kind == "noisy":
            grids.append(math.prod(_latent(last).shape[1:]))
        return texts + sum(self.targets([last], [])) + sum(grids) + self.config.mar.buffers * len(grids)

    def _parts(self, context: Sequence[Segment], last: Segment) -> list[Part]:
        """What stands before an image that is learned, or before a reply."""
        if last.kind == "text":
            return self.asked(context)
        return chat.requested(context, self.text_of, trained=True)

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
            return TrainingRow(self._pieces(parts, padded), self._tensor([*self.ids_of(last), self.stop]))
        if last.state is not None or (how := next(corruptions, None)) is None:
            raise ValueError("a noisy segment needs a latent and a corruption, and no state")
        return TrainingRow(self._pieces(parts, stretched), Drawn.of(_latent(last).to(self.device), how, last.loss))

    def _pieces(self, parts: Sequence[Part], prepare: Preparation) -> list[Tensor | Masked]:
        """Ids of texts, and latents of images that are seen."""
        latents = iter(self._seen([part for part in parts if isinstance(part, Segment)], prepare))
        return [self._tensor(self.ids(part)) if isinstance(part, str) else Masked.seen(next(latents)) for part in parts]

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
        behind, embed, rows = iter(encoded), self.language.text.embed_tokens, []
        for row in batch:
            pieces = [self._looked_at(next(seen)) if isinstance(part, Masked) else embed(part) for part in row.parts]
            end = self.into(next(behind)) if isinstance(row.end, Drawn) else embed(row.end[:-1])
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


def _alike(kinds: Sequence[object], most: int | None = None) -> Iterator[list[int]]:
    """Places of what is of one kind, at most so many together."""
    places: dict[object, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    for alike in places.values():
        step = most or len(alike)
        yield from (alike[start : start + step] for start in range(0, len(alike), step))
