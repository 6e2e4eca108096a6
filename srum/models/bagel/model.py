"""BAGEL behind the protocol of ``srum.models.base``: contexts, images, answers, and the training forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from PIL.Image import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from srum import flow
from srum.models.bagel import images as pictures
from srum.models.bagel.autoencoder import decode_latents, encode_mean
from srum.models.bagel.cache import Cache
from srum.models.bagel.checkpoint import load_autoencoder, load_network, load_tokenizer, save_checkpoint
from srum.models.bagel.config import BagelConfig
from srum.models.bagel.network import BagelNetwork, Layout
from srum.models.bagel.sampler import initial_noise, sample
from srum.models.bagel.sequence import Batch, ImageMarkers, Split, lay_out
from srum.models.base import Decoding, Generated, Question, Sampling, Segment, TrainingForward

Precision = Literal["fp32", "bf16"]
DECODE_BATCH = 32  # images per autoencoder call


class Bagel:
    """A loaded BAGEL checkpoint of any size. Meets ``UnifiedModel``."""

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
        self.bos, self.eos = self._id("<|im_start|>"), self._id("<|im_end|>")
        self.markers = ImageMarkers(self._id("<|vision_start|>"), self._id("<|vision_end|>"))
        self._ids = lru_cache(maxsize=65536)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        dtype: torch.dtype = torch.float32,
    ) -> Bagel:
        """Read a folder in the official layout, the network's weights as ``dtype``.

        Errors name the missing file or the tensors that do not fit.
        """
        folder = Path(folder)
        config = BagelConfig.from_folder(folder)
        network = load_network(folder, config, device, dtype).eval()
        autoencoder = load_autoencoder(folder, config).to(device)
        return cls(folder, config, network, autoencoder, load_tokenizer(folder), precision)

    def save(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        max_shard_size: int | str = "1TB",
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the official layout; weights above ``max_shard_size`` (bytes, or such as "5GB") in shards.

        ``weights`` stand in for the network's own, where these are not whole in this process.
        """
        weights = self.network.state_dict() if weights is None else weights
        save_checkpoint(Path(folder), self.config, weights, self.autoencoder, self.folder, dtype, max_shard_size)

    @property
    def device(self) -> torch.device:
        return self.network.llm2vae.weight.device

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
        """(h, w) in latent tokens of an (H, W) image."""
        cell = self.config.pixels_per_token
        if size[0] % cell or size[1] % cell:
            raise ValueError(f"image size {size} is not a multiple of {cell} pixels")
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
        for group in _runs(list(latents), lambda latent: latent.shape, DECODE_BATCH):
            with self._compute():
                pixels = decode_latents(self.autoencoder, torch.stack(group).to(self.device))
            decoded += [pictures.to_image(x) for x in pixels]
        return decoded

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], sampling: Sampling, seeds: Sequence[int], plan: bool = False
    ) -> list[Generated]:
        """One image per prompt. With ``plan`` a planning text is decoded first and conditions the image."""
        return self._generate(prompts, None, [sampling.size] * len(prompts), sampling, seeds, plan)

    @torch.no_grad()
    def edit(
        self,
        images: Sequence[Image],
        prompts: Sequence[str],
        sampling: Sampling,
        seeds: Sequence[int],
        plan: bool = False,
    ) -> list[Generated]:
        """Each image changed as its prompt says, at the size that the autoencoder's resize gives it.

        ``sampling.size`` has no part in it. Usual settings: guidance 4, image_guidance 2, guidance_interval (0, 1],
        renorm ``text_channel``. Raises ValueError unless there are as many images as prompts and seeds.
        """
        sources = [self.resized(image) for image in images]
        return self._generate(prompts, sources, [image.size[::-1] for image in sources], sampling, seeds, plan)

    def _generate(
        self,
        prompts: Sequence[str],
        sources: Sequence[Image] | None,
        sizes: Sequence[tuple[int, int]],
        sampling: Sampling,
        seeds: Sequence[int],
        plan: bool,
    ) -> list[Generated]:
        if not len(prompts) == len(sizes) == len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(sizes)} images and {len(seeds)} seeds")
        planning = Decoding(temperature=sampling.plan_temperature) if plan else None
        with self._compute():
            contexts, plans = self.generation_contexts(prompts, planning, seeds, sources)
            tokens = self.denoise(contexts, self.noise(seeds, sizes), sizes, sampling)
        latents = [
            pictures.tokens_to_latent(x, self.latent_grid(size), self.config.latent_patch_size).cpu()
            for x, size in zip(tokens, sizes, strict=True)
        ]
        return [Generated(*made) for made in zip(self.decode(latents), latents, plans, strict=True)]

    def noise(self, seeds: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Initial noise in token space (h w, D) per image of (H, W) pixels, from each seed alone."""
        grids = [self.latent_grid(size) for size in sizes]
        return initial_noise(seeds, [h * w for h, w in grids], self.config.latent_dim)

    def denoise(
        self,
        contexts: Sequence[Cache],
        noise: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        sampling: Sampling,
        steps_out: list[tuple[Tensor, Tensor]] | None = None,
    ) -> list[Tensor]:
        """Clean latent tokens (h w, D) per image. ``contexts``: full, no text, no image (if it is used).

        ``steps_out`` receives x_t and the guided velocity of every step, each (sum of h w, D).
        """
        grids = [self.latent_grid(size) for size in sizes]
        flat = torch.cat(list(noise)).to(self.device)
        owner = torch.cat([torch.full((len(x),), i) for i, x in enumerate(noise)]).to(self.device)
        branches: dict[int, tuple[Cache, Batch]] = {}

        def velocity(x: Tensor, t: float, count: int) -> Tensor:
            if count not in branches:
                cache = Cache.stack(contexts[:count]) if count > 1 else contexts[0]
                splits = [[Split(kind="noisy", tokens=n, grid=g)] for n, g in zip(noise, grids, strict=True)]
                branches[count] = cache, self._lay_out(splits * count, cache)
            cache, batch = branches[count]
            batch = replace(batch, latents=x.repeat(count, 1), timesteps=torch.full((1,), t, device=x.device))
            _, gen = self._forward(batch, cache)
            return self.network.llm2vae(gen)

        return list(sample(velocity, flat, owner, sampling, steps_out).split([len(x) for x in noise]))

    def generation_contexts(
        self,
        prompts: Sequence[str],
        planning: Decoding | None,
        seeds: Sequence[int],
        images: Sequence[Image] | None = None,
    ) -> tuple[list[Cache], list[str | None]]:
        """[full, no text, no image] contexts of the prompts, and the planning texts.

        ``images``, already resized as ``edit`` does, stand before their prompts: the clean latent, then as seen.
        """
        full = self.empty_context(len(prompts))
        every = range(full.rows)
        if planning:
            self.add_text(full, [self.config.plan_instruction] * len(prompts))
        if images is not None:
            no_image = full.select(every)
            self.add_text(no_image, prompts)
            self.add_clean(full, self.encode(images))
            self.add_seen(full, images)
        no_text = full.select(every)
        self.add_text(full, prompts)
        if images is None:
            no_image = full.select(every)
        plans: list[str | None] = [None] * len(prompts)
        if planning:
            texts = self.decode_text(full, planning, seeds=seeds)
            self.add_text(full, texts)
            plans = list(texts)
        return [full, no_text, no_image], plans

    # ---------------------------------------------------------------- understanding

    @torch.no_grad()
    def answer(
        self, images: Sequence[Image], questions: Sequence[Sequence[Question]], decoding: Decoding
    ) -> list[list[str]]:
        """Replies ``[i][j]`` to question j about image i; the image's keys and values are computed once."""
        if not any(questions):
            return [[] for _ in images]
        with self._compute():
            context = self._question_contexts(images, questions)
            prefixes = [q.reply_prefix for asked in questions for q in asked]
            replies = iter(self.decode_text(context, decoding, prefixes))
        return [[next(replies) for _ in asked] for asked in questions]

    @torch.no_grad()
    def continuation_logprobs(
        self, images: Sequence[Image], questions: Sequence[Sequence[Question]], continuations: Sequence[str]
    ) -> list[Tensor]:
        """Per image (questions, continuations): log p(continuation | image, question, reply prefix).

        The continuations of one question are branches of a tree over its context: one forward pass, nothing copied.
        """
        branches = [self._ids(text) for text in continuations]
        if not any(questions):
            return [torch.zeros(0, len(branches)) for _ in images]
        with self._compute():
            context = self._question_contexts(images, questions)
            prefixes = [[self.bos, *self._ids(q.reply_prefix)] for asked in questions for q in asked]
            states = self._extend(context, [[Split(kind="text", ids=ids)] for ids in prefixes])
            ends = torch.tensor([len(ids) for ids in prefixes]).cumsum(0) - 1
            first = self._log_softmax(states[ends.to(self.device)])  # (rows, V)
            later = self._branch_logprobs(context, branches)  # (rows, continuations)
        scores = first[:, [ids[0] for ids in branches]] + later
        return list(scores.cpu().split([len(asked) for asked in questions]))

    def _question_contexts(self, images: Sequence[Image], questions: Sequence[Sequence[Question]]) -> Cache:
        """One row per question: the image, then the question."""
        seen = self.empty_context(len(images))
        self.add_seen(seen, [self.resized(image) for image in images])
        context = seen.select([i for i, asked in enumerate(questions) for _ in asked])
        self.add_text(context, [q.text for asked in questions for q in asked])
        return context

    def _branch_logprobs(self, context: Cache, branches: Sequence[Sequence[int]]) -> Tensor:
        """(rows, branches): log-probability of each branch after its first token."""
        targets = torch.tensor([token for ids in branches for token in ids[1:]], device=self.device)
        owner = torch.tensor([b for b, ids in enumerate(branches) for _ in ids[1:]], device=self.device)
        total = torch.zeros(context.rows, len(branches), device=self.device)
        if not len(targets):
            return total
        tree = [Split(kind="text", ids=ids[:-1], branch=b) for b, ids in enumerate(branches, 1) if len(ids) > 1]
        states, _ = self._forward(self._lay_out([tree] * context.rows, context), context)
        log_p = self._log_softmax(states).view(context.rows, len(targets), -1)
        return total.index_add_(1, owner, log_p.gather(2, targets.expand(context.rows, -1)[..., None])[..., 0])

    # ---------------------------------------------------------------- contexts

    def empty_context(self, rows: int) -> Cache:
        llm = self.config.llm
        dtype = torch.bfloat16 if self.precision == "bf16" else self.network.llm2vae.weight.dtype
        return Cache(llm.num_hidden_layers, rows, llm.num_key_value_heads, llm.head_dim, self.device, dtype)

    def add_text(self, context: Cache, texts: Sequence[str]) -> None:
        """Append one text segment (bos, ids, eos) to every row."""
        self._extend(context, [[self._text(text)] for text in texts])

    def add_seen(self, context: Cache, images: Sequence[Image]) -> None:
        """Append one image through the understanding encoder to every row."""
        self._extend(context, [[self._seen(image)] for image in images])

    def add_clean(self, context: Cache, latents: Sequence[Tensor]) -> None:
        """Append one clean latent (C, h, w) to every row (timestep 0)."""
        self._extend(context, [[self._clean(latent)] for latent in latents])

    def decode_text(
        self,
        context: Cache,
        decoding: Decoding,
        prefixes: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """One reply per row, without its prefix; the context itself is left as it was."""
        prefixes = prefixes or [""] * context.rows
        starts = [[self.bos, *self._ids(prefix)] for prefix in prefixes]
        ids = self.decode_ids(context, decoding, starts=starts, seeds=seeds)
        return [self._reply(row)[len(prefix) :] for row, prefix in zip(ids, prefixes, strict=True)]

    def decode_ids(
        self,
        context: Cache,
        decoding: Decoding,
        stop: int | None = None,
        starts: Sequence[Sequence[int]] | None = None,
        seeds: Sequence[int] | None = None,
        logits_out: list[Tensor] | None = None,
    ) -> list[list[int]]:
        """Token ids per row, the start included and the stop token excluded, at most ``max_tokens`` with bos.

        Each row stops by itself; rows that have stopped leave the batch. Sampled text is drawn from ``seeds``, one per
        row (default: ``decoding.seed`` + row).
        """
        stop = self.eos if stop is None else stop
        ids = [list(s) for s in starts] if starts else [[self.bos] for _ in range(context.rows)]
        limits = [decoding.max_tokens + len(row) - 1 for row in ids]
        seeds = [decoding.seed + i for i in range(len(ids))] if seeds is None else seeds
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        alive = list(range(len(ids)))
        cache = context.select(alive)
        if any(len(row) > 1 for row in ids):
            self._extend(cache, [[Split(kind="text", ids=row[:-1])] if len(row) > 1 else [] for row in ids])
        cache.reserve(decoding.max_tokens)
        here = torch.ones(1, 1, 1, dtype=torch.bool, device=self.device)
        rows = list(alive)  # rows of the cache: which reply each belongs to
        while alive:
            last = torch.tensor([[ids[i][-1]] for i in rows], device=self.device)
            states = self._run_text(cache, last, cache.position[:, None], here.expand(len(rows), -1, -1))
            cache.keep(torch.ones_like(last, dtype=torch.bool), torch.ones_like(cache.position))
            logits = self.network.language_model.lm_head(states[:, 0])
            if logits_out is not None:
                logits_out.append(logits.float().cpu())
            for i, token in zip(rows, self._pick(logits, rows, decoding, generators), strict=True):
                if i not in alive:
                    continue
                if token == stop or len(ids[i]) >= limits[i]:
                    alive.remove(i)
                else:
                    ids[i].append(token)
            if alive and len(alive) <= len(rows) // 2:
                keep = [r for r, i in enumerate(rows) if i in set(alive)]
                cache, rows = cache.select(keep), [rows[r] for r in keep]
                cache.reserve(decoding.max_tokens)
        return ids

    @staticmethod
    def _pick(
        logits: Tensor, rows: Sequence[int], decoding: Decoding, generators: Sequence[torch.Generator]
    ) -> list[int]:
        if decoding.temperature == 0:
            return logits.argmax(1).tolist()
        p = torch.softmax(logits.float() / decoding.temperature, dim=1).cpu()
        return [int(torch.multinomial(p[r], 1, generator=generators[i])) for r, i in enumerate(rows)]

    def _reply(self, ids: Sequence[int]) -> str:
        """Text between the first bos and the next marker, as the reference cuts it."""
        return self.tokenizer.decode(ids).split("<|im_end|>")[0].split("<|im_start|>")[1]

    # ---------------------------------------------------------------- training

    def pack(self, samples: Sequence[Sequence[Segment]], noise: Sequence[Tensor], t: Sequence[float]) -> Batch:
        """Packed batch; noise (h w, D) and t in [0, 1] of each noisy segment in order."""
        draws = iter(zip(noise, t, strict=True))
        splits = [[replace(self._split(s, draws), branch=s.branch) for s in sample] for sample in samples]
        return self._lay_out(splits, None)

    def length(self, sample: Sequence[Segment]) -> int:
        """Tokens that a sample takes in a pack, markers included."""
        return sum((self._clean(s.latent) if s.latent is not None else self._split(s, iter(()))).length for s in sample)

    def velocity(self, batch: Batch) -> TrainingForward:
        """Predicted velocity per loss token (N, D) in float32, text logits (M, V) with their labels."""
        und, gen = self._forward(batch, None)
        velocity = self.network.llm2vae(gen[batch.loss_tokens])
        logits = self.network.language_model.lm_head(und[batch.ce_tokens])
        return TrainingForward(velocity.float(), logits.float(), batch.labels)

    def _split(self, segment: Segment, draws: Iterator[tuple[Tensor, float]]) -> Split:
        if segment.kind == "text":
            return replace(self._text(segment.text or ""), loss=segment.loss)
        if segment.kind == "seen":
            if segment.image is None:
                raise ValueError("a seen segment needs an image")
            return self._seen(segment.image)
        if segment.latent is None:
            raise ValueError(f"a {segment.kind} segment needs a latent")
        if segment.kind == "clean":
            return self._clean(segment.latent)
        noise, t = next(draws)
        clean = self._clean(segment.latent)
        assert clean.tokens is not None
        return replace(
            clean, kind="noisy", tokens=flow.interpolate(clean.tokens, noise, t), t=float(t), loss=segment.loss
        )

    # ---------------------------------------------------------------- splits and the forward pass

    def _text(self, text: str) -> Split:
        return Split(kind="text", ids=(self.bos, *self._ids(text), self.eos))

    def _seen(self, image: Image | Tensor) -> Split:
        """An image, or pixels (3, H, W) in [-1, 1] whose size already fits the patches."""
        if not isinstance(image, Tensor):
            image = pictures.to_tensor(
                pictures.resize(image, self.config.vit_transform, self.config.transform_max_pixels)
            )
        patch = self.config.vit.patch_size
        grid = (image.shape[1] // patch, image.shape[2] // patch)
        return Split(kind="seen", patches=pictures.patchify(image, patch), grid=grid)

    def _clean(self, latent: Tensor) -> Split:
        patch = self.config.latent_patch_size
        return Split(
            kind="clean", tokens=self.tokens(latent), grid=(latent.shape[1] // patch, latent.shape[2] // patch)
        )

    def _lay_out(self, samples: Sequence[Sequence[Split]], cache: Cache | None) -> Batch:
        return lay_out(
            samples,
            self.markers,
            patch_side=self.config.vit_max_num_patch_per_side,
            latent_side=self.config.max_latent_size,
            dims=(3 * self.config.vit.patch_size**2, self.config.latent_dim),
            cache=cache,
            device=self.device,
        )

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Token inputs of the two streams: (U, H), (G, H)."""
        und = self.network.embed_text(batch.text_ids)
        if len(batch.patches):
            und = torch.cat([und, self.network.embed_seen(batch.patches, batch.patch_ids, batch.patch_present)])
        return und, self.network.embed_latents(batch.latents, batch.timesteps, batch.latent_ids)

    def _forward(self, batch: Batch, cache: Cache | None) -> tuple[Tensor, Tensor]:
        und, gen = self.embed(batch)
        if cache is not None:
            cache.reserve(batch.layout.present.shape[1])
        return self.network.decoder(und, gen, batch.layout, cache)

    def _extend(self, cache: Cache, samples: Sequence[Sequence[Split]]) -> Tensor:
        """Append to the rows of a context; returns the final states (U, H) of the und stream."""
        batch = self._lay_out(samples, cache)
        states, _ = self._forward(batch, cache)
        cache.keep(batch.layout.present, batch.advance)
        return states

    def _run_text(self, cache: Cache, ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Run token ids (rows, n) at rope positions (rows, n) over the cache; ``visible`` (rows, n, n) among them.

        Returns final states (rows, n, H). Nothing is kept: the caller decides.
        """
        rows, n = ids.shape
        cache.reserve(n)
        context = cache.valid[:, None, : cache.used].expand(-1, n, -1)
        layout = Layout(
            place=torch.arange(rows * n, device=self.device),
            present=torch.ones(rows, n, dtype=torch.bool, device=self.device),
            visible=torch.cat([context, visible], dim=2)[:, None],
            positions=positions.flatten(),
        )
        und = self.network.embed_text(ids.flatten())
        states, _ = self.network.decoder(und, und[:0], layout, cache)
        return states.view(rows, n, -1)

    def _log_softmax(self, states: Tensor) -> Tensor:
        return torch.log_softmax(self.network.language_model.lm_head(states).float(), dim=-1)

    def _id(self, token: str) -> int:
        value = self.tokenizer.convert_tokens_to_ids(token)
        if value is None:
            raise ValueError(f"the tokenizer in {self.folder} has no token {token!r}")
        return int(value)

    @contextmanager
    def _compute(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            yield


def _runs(items: Sequence[Tensor], key: Callable[[Tensor], object], limit: int) -> Iterator[list[Tensor]]:
    """Neighbours with an equal key, at most ``limit`` together."""
    group: list[Tensor] = []
    for item in items:
        if group and (key(item) != key(group[0]) or len(group) == limit):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
