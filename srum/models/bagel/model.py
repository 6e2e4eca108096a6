"""BAGEL behind the protocol of ``srum.models.base``: images and texts after contexts, and the training forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from diffusers import AutoencoderKL
from PIL.Image import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from srum import flow
from srum.errors import ModelError
from srum.flow import FlowNoise
from srum.models.bagel import images as pictures
from srum.models.bagel.autoencoder import decode_latents, encode_mean
from srum.models.bagel.cache import Cache, Kept
from srum.models.bagel.checkpoint import (
    Place,
    empty_network,
    load_autoencoder,
    load_network,
    official_weights,
    read_weights,
    save_checkpoint,
)
from srum.models.bagel.config import BagelConfig, ResizeLimits
from srum.models.bagel.contexts import Remembered, levels, parted
from srum.models.bagel.decoding import Row, Step, decode_rows
from srum.models.bagel.network import BagelNetwork
from srum.models.bagel.sampler import sample
from srum.models.bagel.sequence import Batch, Beginning, Begun, ImageMarkers, Split, before_latents, lay_out, rejoined
from srum.models.base import (
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
    branch_counts,
    without_images,
    without_text,
)
from srum.models.checkpoints import load_tokenizer
from srum.models.exploring import Explorer, initial_noise
from srum.models.precision import Precision, computing
from srum.models.texts import beginnings_of, token_id

T = TypeVar("T")
DECODE_BATCH, DECODE_PIXELS = 32, 2**22  # the most images, and pixels of all, per autoencoder call
VARIANTS = 32  # of a compiled layer: one row or more, with gradients or without, decoding or denoising, ...


class Bagel:
    """A loaded BAGEL checkpoint of any size. Meets ``TrainableModel``."""

    abilities: frozenset[Ability] = frozenset(get_args(Ability)) - {"prepare", "infill", "frames"}

    def __init__(
        self,
        folder: Path,
        config: BagelConfig,
        network: BagelNetwork,
        autoencoder: AutoencoderKL,
        tokenizer: PreTrainedTokenizerFast,
        precision: Precision = "fp32",
    ) -> None:
        self.folder, self.config, self.network = folder, config, network
        self.autoencoder, self.tokenizer, self.precision = autoencoder, tokenizer, precision
        self.bos, self.eos, *markers = (
            token_id(tokenizer, name, folder)
            for name in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
        )
        self.markers = ImageMarkers(*markers)
        self.records = False  # steps of decoding, as CUDA graphs
        self.remembered: Remembered | None = None  # within ``remembering``
        self._ids = lru_cache(maxsize=65536)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        dtype: torch.dtype = torch.float32,
        layers: Sequence[Place] | Literal["auto"] | None = None,
        empty: bool = False,
    ) -> Bagel:
        """Read a folder in the official layout, the network's weights as ``dtype``.

        ``layers`` says where each decoder layer goes, a device or "disk", or "auto": spread by accelerate over all
        GPUs, then the host, then disk; all else goes to ``device``. With ``empty`` the network has no storage yet: it
        may be sharded, is then given its storage (``to_empty``), and filled by ``read_weights``. Errors name the
        missing file or the tensors that do not fit.
        """
        folder = Path(folder)
        config = BagelConfig.from_folder(folder)
        if empty:
            network = empty_network(folder, config, dtype).eval()
        else:
            network = load_network(folder, config, device, dtype, layers).eval()
        autoencoder = load_autoencoder(folder, config).to(device)
        return cls(folder, config, network, autoencoder, load_tokenizer(folder), precision)

    def read_weights(self) -> None:
        """Fill the network from the model's folder: each tensor, or the part of it that this process holds."""
        read_weights(self.folder, self.network)

    def compile(self) -> None:
        """From now on run the layers of decoder and understanding encoder through ``torch.compile``, in place.

        Layers share their compiled code; it is made when first needed, for any number and length of rows. On CUDA the
        steps of text decoding are recorded as CUDA graphs, too. Raises ModelError where there is no C++ compiler,
        without which torch could only fail later.
        """
        from torch._dynamo import config  # imports of weight, which few need
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ModelError("compile: torch.compile needs a C++ compiler; install g++, or leave it false") from None
        config.recompile_limit = max(config.recompile_limit, VARIANTS)
        for layer in (*self.network.decoder.layers, *self.network.vit_model.vision_model.encoder.layers):
            layer.compile(dynamic=True)
        self.records = self.device.type == "cuda" and self.network.decoder.devices is None

    def save(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        max_shard_size: int | str = "1TB",
        merge: bool = False,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the official layout; weights above ``max_shard_size`` (bytes, or such as "5GB") in shards.

        ``merge``: with the adapters that peft has put into the network merged into its weights; the network itself
        stays as it is. Raises ModelError for adapters without it, for adapters of layers on disk, and for the folder
        from which layers on disk are read. ``weights`` stand in for the network's own, where these are not whole in
        this process.
        """
        if Path(folder).resolve() == self.folder.resolve() and any(p.is_meta for p in self.network.parameters()):
            raise ModelError(f"{folder} is where the layers on disk are read from: save to another folder")
        weights = official_weights(self.network, merge) if weights is None else weights
        save_checkpoint(Path(folder), self.config, weights, self.autoencoder, self.folder, dtype, max_shard_size)

    @property
    def device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device  # the network may have none yet

    @property
    def plan_instruction(self) -> str:
        return self.config.plan_instruction

    @property
    def refine_texts(self) -> tuple[str, str]:
        return self.config.refine_system, self.config.refine_user

    @property
    def reflect_question(self) -> str:
        return self.config.reflect_question

    @property
    def reflect_stop(self) -> str:
        return self.config.reflect_stop

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Everything that may be trained; the fixed position tables are not."""
        return [(n, p) for n, p in self.network.named_parameters() if not n.endswith("pos_embed")]

    def generation_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The generation expert with its input and output layers."""
        return self.network.generation_parameters()

    def layers(self) -> list[nn.Module]:
        """The layers that repeat: what training shards, and may recompute, one by one."""
        return [*self.network.decoder.layers, *self.network.vit_model.vision_model.encoder.layers]

    # ---------------------------------------------------------------- images and latents

    def latent_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) in latent tokens of an (H, W) image. Raises ModelError for a size without, or beyond the largest."""
        cell = self.config.pixels_per_token
        if size[0] % cell or size[1] % cell:
            raise ModelError(f"image size {size} is not a multiple of {cell} pixels")
        if max(size) > (largest := cell * self.config.max_latent_size):
            raise ModelError(f"image size {size} is beyond the largest that the model can draw, {largest}x{largest}")
        return size[0] // cell, size[1] // cell

    def tokens(self, latent: Tensor) -> Tensor:
        """(C, h p, w p) to (h w, p p C)."""
        return pictures.latent_to_tokens(latent, self.config.latent_patch_size)

    def resized(self, image: Image) -> Image:
        """The autoencoder's resize, which the reference applies to every input image first."""
        return pictures.resize(image, self.config.vae_transform, self.config.transform_max_pixels)

    def encode(self, images: Sequence[Image]) -> list[Tensor]:
        """Clean scaled latents (C, h, w), the posterior mean, of images resized by the autoencoder's rule."""
        pixels = [pictures.to_tensor(self.resized(image)) for image in images]
        return [encode_mean(self.autoencoder, x[None].to(self.device))[0].cpu() for x in pixels]

    def decode(self, latents: Sequence[Tensor]) -> list[Image]:
        """Images of clean scaled latents (C, h, w); neighbours of one size go through the autoencoder together."""
        decoded: list[Image] = []
        for group in _runs(list(latents), self._decoded_together):
            with computing(self.device, self.precision):
                pixels = decode_latents(self.autoencoder, torch.stack(group).to(self.device))
            decoded += [pictures.to_image(x) for x in pixels]
        return decoded

    def _decoded_together(self, latent: Tensor) -> int:
        """How many of latents (C, h, w) of one size the autoencoder decodes in a call."""
        pixels = latent[0].numel() * self.config.autoencoder.downsample**2
        return min(DECODE_BATCH, max(1, DECODE_PIXELS // pixels))

    # ---------------------------------------------------------------- drawing

    @torch.no_grad()
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
        """An image after each context. Usual settings for changing an image: guidance 4, image_guidance 2,
        guidance_interval (0, 1], renorm ``text_channel``. Raises ValueError unless all are as many."""
        sizes = [sampling.size] * len(contexts) if sizes is None else sizes
        if not len(contexts) == len(sizes) == len(seeds):
            raise ValueError(f"{len(contexts)} contexts, {len(sizes)} sizes and {len(seeds)} seeds")
        if not contexts:
            return []
        steps: list[tuple[Tensor, Tensor]] | None = [] if path else None
        explorer = None if explore is None else Explorer(explore, [math.prod(self.latent_grid(s)) for s in sizes])
        branches = [contexts, [without_text(c) for c in contexts], [without_images(c) for c in contexts]]
        with computing(self.device, self.precision):
            cache = self.contexts([c for branch in branches[: max(branch_counts(sampling))] for c in branch])
            tokens = self.denoise(cache, self.noise(seeds, sizes), sizes, sampling, steps, explorer)
        latents = self._latents(tokens, sizes)
        paths = [None] * len(latents) if steps is None else self._paths(steps, sizes, sampling)
        taken = [()] * len(latents) if explorer is None else explorer.told(partial(self._latents, sizes=sizes))
        return [Generated(*made) for made in zip(self.decode(latents), latents, paths, taken, strict=True)]

    def _paths(
        self, steps: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[tuple[int, int]], sampling: Sampling
    ) -> list[SampledPath]:
        """Per image what all steps have passed through; x_t and velocities (sum of h w, D) of every step."""
        counts = [math.prod(self.latent_grid(size)) for size in sizes]
        timesteps = flow.schedule(sampling.timesteps, sampling.timestep_shift)[:-1]
        states, velocities = (
            zip(*(self._latents(values.split(counts), sizes) for values in of_steps), strict=True)
            for of_steps in zip(*steps, strict=True)
        )
        return [SampledPath(torch.stack(x), timesteps, torch.stack(v)) for x, v in zip(states, velocities, strict=True)]

    def _latents(self, tokens: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Latents (C, h p, w p) of tokens (h w, D) per image of (H, W) pixels, on the CPU."""
        return [
            pictures.tokens_to_latent(x, self.latent_grid(size), self.config.latent_patch_size).cpu()
            for x, size in zip(tokens, sizes, strict=True)
        ]

    def noise(self, seeds: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Initial noise in token space (h w, D) per image of (H, W) pixels, from each seed alone."""
        grids = [self.latent_grid(size) for size in sizes]
        return initial_noise(seeds, [h * w for h, w in grids], (self.config.latent_dim,))

    def denoise(
        self,
        contexts: Cache,
        noise: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        sampling: Sampling,
        steps_out: list[tuple[Tensor, Tensor]] | None = None,
        explorer: Explorer | None = None,
    ) -> list[Tensor]:
        """Clean latent tokens (h w, D) per image. ``contexts``: the rows of all images, then without text, then without
        images, as many of these as guidance compares.

        ``steps_out`` receives x_t and the guided velocity of every step, each (sum of h w, D).
        """
        grids = [self.latent_grid(size) for size in sizes]
        flat = torch.cat(list(noise)).to(self.device)
        owner = torch.cat([torch.full((len(x),), i) for i, x in enumerate(noise)]).to(self.device)
        splits = [[Split(kind="noisy", tokens=n, grid=g)] for n, g in zip(noise, grids, strict=True)]
        branches: dict[int, tuple[Cache, Batch]] = {}
        for count in set(branch_counts(sampling)) - {0}:  # before the steps, of which none waits for the device
            cache = contexts.rearranged(range(count * len(noise)))
            branches[count] = cache, self._lay_out(splits * count, cache)

        def velocity(x: Tensor, t: float, count: int) -> Tensor:
            cache, batch = branches[count]
            batch = replace(batch, latents=x.repeat(count, 1), timesteps=torch.full((1,), t, device=x.device))
            _, gen = self._forward(batch, cache)
            return self.network.llm2vae(gen)

        made = sample(velocity, flat, owner, sampling, steps_out, explorer)
        return list(made.split([len(x) for x in noise]))

    # ---------------------------------------------------------------- writing

    @torch.no_grad()
    def write(self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]) -> list[Written]:
        """A text after each context. Raises ValueError unless there are as many seeds."""
        if len(contexts) != len(seeds):
            raise ValueError(f"{len(contexts)} contexts and {len(seeds)} seeds")
        if not contexts:
            return []
        closed, starts = zip(*(self._begun(context) for context in contexts), strict=True)
        with computing(self.device, self.precision):
            rows = self.decode_tokens(self.contexts(closed), decoding, seeds, [[self.bos, *ids] for ids in starts])
        return [
            Written(
                text=self._reply(row.ids)[len(self.tokenizer.decode(start)) :],
                ids=row.ids[1 + len(start) :],
                logprobs=torch.tensor(row.logprobs),
                ended=row.ended,
            )
            for row, start in zip(rows, starts, strict=True)
        ]

    @torch.no_grad()
    def score(self, contexts: Sequence[Sequence[Segment]], continuations: Sequence[str]) -> list[Tensor]:
        """Per context (continuations,): the log-probability of each as the beginning of a text, or as more of an open
        one. They are a tree over their context, in which what begins alike is there once: one forward pass, nothing
        copied.
        """
        if not contexts:
            return []
        texts = [self._ids(text) for text in continuations]
        closed, starts = zip(*(self._begun(context) for context in contexts), strict=True)
        with computing(self.device, self.precision):
            cache = self.contexts(closed)
            begun = [[self.bos, *ids] for ids in starts]
            states = self._extend(cache, [[Split(kind="text", ids=ids)] for ids in begun])
            ends = torch.tensor([len(ids) for ids in begun]).cumsum(0) - 1
            first = self._log_softmax(states[ends.to(self.device)])  # (rows, V)
            later = self._later_logprobs(cache, texts)  # (rows, continuations)
        return list((first[:, [ids[0] for ids in texts]] + later).cpu())

    def _begun(self, context: Sequence[Segment]) -> tuple[Sequence[Segment], Sequence[int]]:
        """The closed part of a context, and the tokens of the text that it leaves open."""
        if context and context[-1].open:
            return context[:-1], self._text_ids(context[-1])
        return context, ()

    def _later_logprobs(self, context: Cache, texts: Sequence[Sequence[int]]) -> Tensor:
        """(rows, texts): log-probability of each text after its first token."""
        nodes = beginnings_of(texts)
        total = torch.zeros(context.rows, len(texts), device=self.device)
        if not nodes:
            return total
        tree = [
            Split(kind="text", ids=node[-1:], branch=number, parent=nodes.get(node[:-1], 0))
            for node, number in nodes.items()
        ]
        states, _ = self._forward(self._lay_out([tree] * context.rows, context), context)
        log_p = self._log_softmax(states).view(context.rows, len(nodes), -1)
        steps = [
            (text, nodes[ids[:length]] - 1, ids[length])
            for text, ids in enumerate(map(tuple, texts))
            for length in range(1, len(ids))
        ]
        owner, node, token = torch.tensor(steps, device=self.device).unbind(1)
        return total.index_add_(1, owner, log_p[:, node, token])

    def decode_tokens(
        self,
        context: Cache,
        decoding: Decoding,
        seeds: Sequence[int],
        starts: Sequence[Sequence[int]] | None = None,
        stop: int | None = None,
        logits_out: list[Tensor] | None = None,
    ) -> list[Row]:
        """A row of tokens after each context, its start included (bos alone, where none is given), the stop token not.

        At most ``max_tokens`` with bos; each row stops by itself. The context is left as it was. ``logits_out``
        receives the logits (rows, V) of every step, rows that have stopped and left apart.
        """
        starts = [[self.bos]] * context.rows if starts is None else starts
        cache = context.select(range(context.rows))
        if any(len(start) > 1 for start in starts):
            self._extend(cache, [[Split(kind="text", ids=start[:-1])] if len(start) > 1 else [] for start in starts])
        stop = self.eos if stop is None else stop
        said = partial(self._says, decoding.until) if decoding.until else None
        return decode_rows(self._next_logits, cache, starts, decoding, stop, seeds, self.records, logits_out, said)

    def _says(self, until: str, ids: Sequence[int]) -> bool:
        """Whether the last of these tokens end with ``until``, or have it within them."""
        return until in self.tokenizer.decode(ids[-len(until) - 1 :])

    def _next_logits(self, step: Step) -> Tensor:
        """Logits (rows, V) behind the tokens of a step of decoding."""
        tokens = self.network.embed_text(step.token)
        states = self.network.decoder.step(tokens, step.position, step.bias, step.memories)
        return self.network.language_model.lm_head(states)

    def _reply(self, ids: Sequence[int]) -> str:
        """Text between the first bos and the next marker, as the reference cuts it."""
        return self.tokenizer.decode(ids).split("<|im_end|>")[0].split("<|im_start|>")[1]

    # ---------------------------------------------------------------- contexts

    def contexts(self, contexts: Sequence[Sequence[Segment]]) -> Cache:
        """Keys and values of contexts, a row each; what some begin with alike is computed once."""
        if self.remembered is None:
            return self._gone_on(self.empty_context(1), [0] * len(contexts), contexts)
        beginnings, rests = zip(*map(parted, contexts), strict=True)
        if missing := self.remembered.missing(beginnings):
            cache, begun, grown = self.remembered.longest(missing)
            self.remembered.keep(self._gone_on(cache or self.empty_context(1), begun, grown), missing)
        return self._gone_on(*self.remembered.recalled(beginnings), rests)

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Within the block contexts that begin with the same segments share what these cost over several calls, too.

        Of each call beginnings up to the last image are remembered, until one has others; where those go on from what
        is remembered, so do their keys and values.
        """
        self.remembered = Remembered()
        try:
            yield
        finally:
            self.remembered = None

    def _gone_on(self, cache: Cache, begun: Sequence[int], contexts: Sequence[Sequence[Segment]]) -> Cache:
        """A row for each of the contexts, which goes on from the row of a cache where it has ``begun``."""
        passes, rows = levels(contexts, begun)
        for parents, runs in passes:
            cache = cache.rearranged(parents)
            self._extend(cache, [[self._split(segment, iter(())) for segment in run] for run in runs])
        return cache.rearranged(rows)

    def empty_context(self, rows: int) -> Cache:
        """Contexts to which nothing has been written."""
        llm = self.config.llm
        dtype = torch.bfloat16 if self.precision == "bf16" else self.network.llm2vae.weight.dtype
        devices = self.network.decoder.devices or [self.device] * llm.num_hidden_layers
        return Cache(devices, rows, llm.num_key_value_heads, llm.head_dim, self.device, dtype)

    # ---------------------------------------------------------------- training

    def corrupt(
        self, latent: Tensor, generator: torch.Generator, timestep_shift: float, t: float | None = None
    ) -> FlowNoise:
        """A timestep, unless it is given, and then noise for the tokens of a clean latent (C, h, w)."""
        if t is None:
            t = flow.sample_timesteps(1, timestep_shift, generator).item()
        return FlowNoise(torch.randn(self.tokens(latent).shape, generator=generator), t)

    def targets(self, segments: Sequence[Segment], corruptions: Sequence[Corruption]) -> tuple[int, int]:
        """How many latent tokens and how many text tokens of an example are predicted with a loss."""
        counts = {"noisy": 0, "text": 0}
        for segment in segments:
            if segment.loss and not segment.dropped:
                counts[segment.kind] += self._length(segment) - (2 if segment.kind == "noisy" else 1)
        return counts["noisy"], counts["text"]

    def length(self, segments: Sequence[Segment]) -> int:
        """Tokens that an example takes in a pack, markers included."""
        return sum(self._length(segment) for segment in segments if not segment.dropped)

    def pack(
        self, samples: Sequence[Sequence[Segment]], corruptions: Sequence[FlowNoise], *, sees: bool = False
    ) -> Batch:
        """A packed batch, one row per sample; a corruption for each noisy segment without a state, in order.

        Where nothing but what draws is trained, rows begin with what ``forward`` runs once, whatever the weights. In
        several processes that are one more pass for which all gather the weights: only where images are seen.
        """
        drawn = iter(corruptions)
        splits = [[self._split(segment, drawn) for segment in sample] for sample in samples]
        if (left := len(list(drawn))) > 0:
            raise ValueError(f"{left} of {len(corruptions)} corruptions have no noisy segment")
        if self.network.only_draws() and (sees or not _shared(self.network)):
            return self._pack_apart(splits, sees)
        return _seeing(self._lay_out(splits, None), sees)

    def _pack_apart(self, splits: Sequence[Sequence[Split]], sees: bool) -> Batch:
        """A batch with the beginnings of its rows apart."""
        counts = [before_latents(row) for row in splits]
        first = self._lay_out([row[:count] for row, count in zip(splits, counts, strict=True)], None)
        rest = self._lay_out([row[count:] for row, count in zip(splits, counts, strict=True)], Beginning(first))
        return rejoined(_seeing(first, sees), _seeing(rest, sees))

    def forward(self, batch: Batch) -> FlowForward:
        """Predictions for every token with a loss, in float32."""
        if batch.beginning is not None and batch.beginning.states is None:
            self._begin(batch.beginning)
        und, gen = self._forward(batch, None)
        told = und[batch.ce_tokens]
        if batch.beginning is not None:
            told = batch.beginning.joined(told)
        return FlowForward(
            velocity=self.network.llm2vae(gen[batch.loss_tokens]).float(),
            target=batch.targets,
            timestep=batch.timesteps[batch.loss_tokens],
            image_segment=batch.image_segment,
            cell=batch.cell,
            logits=self.network.language_model.lm_head(told).float(),
            labels=batch.labels,
            text_segment=batch.text_segment,
        )

    @torch.no_grad()
    def _begin(self, beginning: Beginning) -> None:
        """Run what rows begin with. Of what draws nothing is: autocast would remember its weights without gradients."""
        batch = beginning.batch
        beginning.kept = [Kept() for _ in self.network.decoder.layers]
        und = self.embed_understood(batch)
        states, _ = self.network.decoder(und, und[:0], batch.layout, kept=beginning.kept)
        beginning.states = states[batch.ce_tokens]

    def _split(self, segment: Segment, drawn: Iterator[FlowNoise]) -> Split:
        if segment.kind == "noisy":
            split = self._noisy(segment, drawn)
        elif segment.dropped:
            split = Split(kind=segment.kind)
        else:
            split = self._context_split(segment)
        return replace(split, loss=segment.loss, branch=segment.branch, dropped=segment.dropped)

    def _context_split(self, segment: Segment) -> Split:
        """A segment that is no noise."""
        if segment.kind == "text":
            return self._text(self._text_ids(segment))
        if segment.kind == "seen":
            return self._seen(_image(segment), segment.side)
        return self._clean(_needed(segment, segment.latent, "a latent"))

    def _noisy(self, segment: Segment, drawn: Iterator[FlowNoise]) -> Split:
        clean = None if segment.latent is None else self.tokens(segment.latent)
        if segment.state is not None:
            x_t, t = segment.state
            target = None if clean is None else flow.velocity_through(clean, x_t, t)
        else:
            clean = _needed(segment, clean, "a latent or a state")
            corruption = _needed(segment, next(drawn, None), "a corruption or a state")
            t, x_t = corruption.t, flow.interpolate(clean, corruption.noise, corruption.t)
            target = flow.velocity_target(clean, corruption.noise)
        return Split(kind="noisy", tokens=x_t, target=target, grid=self._grid(segment), t=t)

    def _grid(self, segment: Segment) -> tuple[int, int]:
        """(h, w) in latent tokens of a clean or noisy segment."""
        if segment.latent is None:
            return _needed(segment, segment.grid, "a latent, or with its state a grid")
        patch = self.config.latent_patch_size
        return segment.latent.shape[1] // patch, segment.latent.shape[2] // patch

    def _length(self, segment: Segment) -> int:
        """Tokens of a segment, markers included."""
        if segment.kind == "text":
            return len(self._text_ids(segment)) + 2
        grid = self._seen_grid(_image(segment), segment.side) if segment.kind == "seen" else self._grid(segment)
        return math.prod(grid) + 2

    # ---------------------------------------------------------------- splits and the forward pass

    def _text_ids(self, segment: Segment) -> Sequence[int]:
        """The tokens of a text, without the markers around it."""
        return segment.ids if segment.ids is not None else self._ids(_needed(segment, segment.text, "a text or ids"))

    def _text(self, ids: Sequence[int]) -> Split:
        return Split(kind="text", ids=(self.bos, *ids, self.eos))

    def _seen(self, image: Image | Tensor, side: int | None = None) -> Split:
        """An image, resized as the reference does: for the autoencoder, then for the encoder; with a ``side`` for the
        encoder alone; or pixels (3, H, W) in [-1, 1], of a size that fits the patches."""
        grid = self._seen_grid(image, side)
        if not isinstance(image, Tensor):
            first = image if side else self.resized(image)
            image = pictures.to_tensor(
                pictures.resize(first, self._seen_limits(side), self.config.transform_max_pixels)
            )
        return Split(kind="seen", patches=pictures.patchify(image, self.config.vit.patch_size), grid=grid)

    def _seen_grid(self, image: Image | Tensor, side: int | None = None) -> tuple[int, int]:
        """(h, w) in patches."""
        patch, config = self.config.vit.patch_size, self.config
        if isinstance(image, Tensor):
            return image.shape[1] // patch, image.shape[2] // patch
        size = image.size
        if not side:
            size = pictures.resized_size(*size, config.vae_transform, config.transform_max_pixels)
        width, height = pictures.resized_size(*size, self._seen_limits(side), config.transform_max_pixels)
        return height // patch, width // patch

    def _seen_limits(self, side: int | None) -> ResizeLimits:
        """Of the resize rule for the understanding encoder."""
        patch = self.config.vit.patch_size
        if side is None:
            return self.config.vit_transform
        if side % patch:
            raise ModelError(f"an image cannot be seen at {side} pixels: that is no multiple of the patch, {patch}")
        return ResizeLimits(max_image_size=side, min_image_size=side, image_stride=patch)

    def _clean(self, latent: Tensor) -> Split:
        patch = self.config.latent_patch_size
        return Split(
            kind="clean", tokens=self.tokens(latent), grid=(latent.shape[1] // patch, latent.shape[2] // patch)
        )

    def _lay_out(self, samples: Sequence[Sequence[Split]], begun: Begun | None) -> Batch:
        return lay_out(
            samples,
            self.markers,
            patch_side=self.config.vit_max_num_patch_per_side,
            latent_side=self.config.max_latent_size,
            dims=(3 * self.config.vit.patch_size**2, self.config.latent_dim),
            begun=begun,
            longest=self.config.llm.max_position_embeddings,
            device=self.device,
        )

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Token inputs of the two streams: (U, H), (G, H)."""
        gen = self.network.embed_latents(batch.latents, batch.timesteps, batch.latent_ids)
        return self.embed_understood(batch), gen

    def embed_understood(self, batch: Batch) -> Tensor:
        """Those of texts and seen images: (U, H)."""
        und = self.network.embed_text(batch.text_ids)
        if not len(batch.patches):
            return und
        return torch.cat([und, self.network.embed_seen(batch.patches, batch.patch_ids, batch.patch_present)])

    def _forward(self, batch: Batch, cache: Cache | None) -> tuple[Tensor, Tensor]:
        und, gen = self.embed(batch)
        if cache is not None:
            cache.reserve(batch.layout.present.shape[1])
        kept = None if batch.beginning is None else batch.beginning.kept
        return self.network.decoder(und, gen, batch.layout, cache, kept)

    def _extend(self, cache: Cache, samples: Sequence[Sequence[Split]]) -> Tensor:
        """Append to the rows of a context; returns the final states (U, H) of the und stream."""
        batch = self._lay_out(samples, cache)
        states, _ = self._forward(batch, cache)
        cache.keep(batch.layout.present, batch.advance)
        return states

    def _log_softmax(self, states: Tensor) -> Tensor:
        return torch.log_softmax(self.network.language_model.lm_head(states).float(), dim=-1)


def _needed(segment: Segment, value: T | None, what: str) -> T:
    """``value``. Raises ValueError where a segment does not have it."""
    if value is None:
        raise ValueError(f"a {segment.kind} segment needs {what}")
    return value


def _image(segment: Segment) -> Image | Tensor:
    if segment.image is None or isinstance(segment.image, Path):
        raise ValueError(f"a seen segment needs an image, got {segment.image}")
    return segment.image


def _shared(network: BagelNetwork) -> bool:
    """Whether several processes have parts of the weights."""
    from torch.distributed.tensor import DTensor  # an import of weight, which training alone needs

    return isinstance(next(network.decoder.layers[0].parameters()), DTensor)


def _seeing(batch: Batch, sees: bool) -> Batch:
    """The batch with a blank patch where it has none and images must be seen all the same."""
    return batch.with_blank_patch() if sees and not len(batch.patches) else batch


def _runs(items: Sequence[Tensor], limit: Callable[[Tensor], int]) -> Iterator[list[Tensor]]:
    """Neighbours of one shape, at most ``limit`` of it together."""
    group: list[Tensor] = []
    for item in items:
        if group and (item.shape != group[0].shape or len(group) == limit(item)):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
