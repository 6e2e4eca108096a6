"""Show-o behind the protocol of ``srum.models.base`` (docs/specs/showo.md).

The language model, which draws and answers, is the network; MAGVIT-v2 and CLIP's tower are read when they are first
needed, and stay as they are. A latent is the ids of an image, (1, h, w) int16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image as images
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import CLIPVisionModel

from srum.errors import ModelError
from srum.geometry import Box, Size
from srum.models.base import (
    REFINE_SYSTEM,
    REFINE_USER,
    REFLECT_QUESTION,
    REFLECT_STOP,
    Ability,
    Decoding,
    DiscreteForward,
    Exploration,
    Generated,
    Sampling,
    Segment,
    Written,
    without_text,
)
from srum.models.checkpoints import load_tokenizer
from srum.models.pixels import crop_box, cropped, normalised, to_rgb
from srum.models.precision import Precision, computing
from srum.models.showo.checkpoint import (
    Network,
    check,
    clip_config,
    empty_network,
    load_magvit,
    load_tower,
    read_headers,
    read_into,
    save_checkpoint,
    weight_files,
)
from srum.models.showo.config import FACTOR, ShowoConfig, part
from srum.models.showo.language import Context, Rows, branched, extend, logits, read, states
from srum.models.showo.magvit import Magvit
from srum.models.showo.sampler import Masks, Noise, fill
from srum.models.showo.sequence import BOS, Layout, Row, Span
from srum.models.texts import Row as Text
from srum.models.texts import branch_scores, go_on, pick, token_id

NONE = [torch.zeros(0, dtype=torch.long)] * 5
AT_ONCE = 64  # images per pass of the tower or of MAGVIT-v2
DRAWS = "Show-o tells no way to an image, and takes no random steps on it"


@dataclass(frozen=True)
class Batch:
    """Rows, and what is predicted in them: image ids where they are masked, and the text after a token."""

    rows: Rows
    image_places: Tensor  # (2, N) row and column
    image_labels: Tensor  # (N,) of the vocabulary
    timestep: Tensor  # (N,)
    image_segment: Tensor  # (N,)
    cell: Tensor  # (N,)
    text_places: Tensor  # (2, M)
    text_labels: Tensor  # (M,)
    text_segment: Tensor  # (M,)
    sees: bool = False  # run the projector although no row has features


@dataclass(frozen=True)
class Parts:
    """An example or a context taken apart: the text, the image that is seen, and what is learned or gone on with."""

    text: str | None
    seen: Segment | None
    noisy: Segment | None = None
    reply: Segment | None = None


class Showo:
    """A checkpoint of the first Show-o, of any size, with CLIP's features or without. Meets ``TrainableModel``."""

    abilities: frozenset[Ability] = frozenset({"seen", "train", "infill", "frames"})
    plan_instruction = ""
    refine_texts = (REFINE_SYSTEM, REFINE_USER)
    reflect_question, reflect_stop = REFLECT_QUESTION, REFLECT_STOP

    def __init__(
        self, folder: Path, device: torch.device, precision: Precision, dtype: torch.dtype, empty: bool = False
    ) -> None:
        self.folder, self.device, self.precision, self.dtype, self.empty = folder, device, precision, dtype, empty
        self.config = ShowoConfig.from_folder(folder)
        self.headers = read_headers(folder)
        check(folder, self.config, self.headers)
        weight_files(part(folder, "magvitv2"))
        language = part(folder, "phi")
        self.tokenizer = load_tokenizer(language)
        if len(self.tokenizer) != self.config.texts:
            raise ModelError(
                f"{language}/tokenizer.json has {len(self.tokenizer)} entries, {folder} was made with "
                f"{self.config.texts} (llm_vocab_size)"
            )
        self.bos = token_id(self.tokenizer, BOS, language)
        self.ids = lru_cache(maxsize=65536)(lambda text: tuple(self.tokenizer.encode(text, add_special_tokens=False)))
        self.layout = Layout(self.config, self.ids, self.bos)
        self.clip = clip_config(part(folder, "clip")) if self.config.sees else None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        dtype: torch.dtype = torch.float32,
        empty: bool = False,
    ) -> Showo:
        """A folder in the official layout, its headers alone. With ``empty`` the network gets no storage by itself: it
        may be sharded, is then given its storage (``to_empty``), and filled by ``read_weights``.

        Raises ModelError for a folder of another model, without the parts that it names, and for tensors that do not
        fit.
        """
        return cls(Path(folder), torch.device(device), precision, dtype, empty)

    # ---------------------------------------------------------------- parts

    @cached_property
    def network(self) -> Network:
        """The language model, and the projector of what CLIP sees: what may be trained."""
        network = empty_network(self.config, self.headers).to(self.dtype)
        if not self.empty:
            read_into(network.to_empty(device=self.device), self.headers)
        return network.eval()

    @cached_property
    def magvit(self) -> Magvit:
        """What turns images into ids and back, always in float32."""
        return load_magvit(part(self.folder, "magvitv2"), self.device)

    @cached_property
    def tower(self) -> CLIPVisionModel:
        """What sees images, in a checkpoint with CLIP's features."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return load_tower(part(self.folder, "clip"), self.device, dtype)

    def read_weights(self) -> None:
        """Fill the network from the model's folder: each tensor, or the part of it that this process holds."""
        read_into(self.network, self.headers)

    def compile(self) -> None:
        """Not an ability of this model."""
        raise ModelError("compile: Show-o does not run through torch.compile; leave it false")

    def save(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, *, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the official layout: the network's ``weights`` as ``dtype``, and links to the parts that it names.

        Raises ModelError for the model's own folder.
        """
        weights = self.network.state_dict() if weights is None else weights
        cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in weights.items()}
        save_checkpoint(self.folder, Path(folder), self.headers, cast)

    def layers(self) -> list[nn.Module]:
        """Those of the language model: what training shards, and may recompute, one by one."""
        return list(self.network.showo.model.layers)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All of the network, which reads and draws with the same weights."""
        return list(self.network.named_parameters())

    def generation_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """None: there is no expert for drawing."""
        return []

    # ---------------------------------------------------------------- images and ids

    def latent_grid(self, size: Size) -> Size:
        """(h, w) of the ids of an image of ``size`` (H, W). Raises ModelError for one that it does not draw."""
        if tuple(size) != (self.config.side, self.config.side):
            raise ModelError(f"image size {size}: this Show-o draws {self.config.side}x{self.config.side} pixels alone")
        return self.config.grid

    def tokens(self, latent: Tensor) -> Tensor:
        """Ids (1, h, w) as (h w, 1)."""
        return latent.flatten(1).T

    def resized(self, image: Image) -> Image:
        """The middle square of the image, all that its ids are made of."""
        return cropped(image, self.config.side)

    def crop_box(self, size: Size) -> Box:
        """Which part of an image of ``size`` (H, W) ``resized`` shows, in its pixels."""
        return crop_box(size)

    def box_frame(self, size: Size) -> Size:
        """(H, W) of the frame whose pixels boxes are named in: the image itself."""
        return size

    def encode(self, images: Sequence[Image]) -> list[Tensor]:
        """Ids (1, h, w) int16 of the middle squares of images."""
        return self._encoded(torch.stack([signed(self.resized(image)) for image in images])) if images else []

    @torch.no_grad()
    def _encoded(self, pixels: Tensor) -> list[Tensor]:
        """Ids (1, H / 16, W / 16) int16 of pixels (B, 3, H, W) in [-1, 1]."""
        with torch.autocast(self.device.type, enabled=False):
            made = [self.magvit.encode(some.to(self.device)).cpu() for some in pixels.split(AT_ONCE)]
        return list(torch.cat(made).to(torch.int16)[:, None])

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> list[Image]:
        """Images of ids (1, h, w), 16 h x 16 w pixels."""
        with torch.autocast(self.device.type, enabled=False):
            pixels = [self.magvit.decode(ids.to(self.device)) for ids in latents]
        return [as_image(one[0]) for one in pixels]

    # ---------------------------------------------------------------- seeing

    def look(self, segments: Sequence[Segment], before_drawing: bool) -> dict[int, Span]:
        """Seen images as understanding has them, by the identity of their segments: CLIP's features, or their own ids,
        ``before_drawing`` of half the side, else what is seen would be copied."""
        distinct = list({id(segment): segment for segment in segments}.values())
        if not distinct:
            return {}
        sides = [self._seen_side(one, before_drawing) for one in distinct]
        if self.clip is not None:
            features = self.features(torch.stack([self.clip_pixels(_image(one)) for one in distinct]))
            spans = [Span(features=own) for own in features]
        else:
            pixels = [signed(self.resized(_image(one)))[None] for one in distinct]
            shrunk = [shrink(own, side) for own, side in zip(pixels, sides, strict=True)]
            spans = [self.layout.seen(self._encoded(own)[0]) for own in shrunk]
        return {id(segment): span for segment, span in zip(distinct, spans, strict=True)}

    def _seen_side(self, segment: Segment, before_drawing: bool) -> int:
        """Pixels of a seen image, a side. Raises ModelError for a size that cannot be seen."""
        if self.clip is not None:
            if segment.side is not None:
                raise ModelError(f"seen_size: CLIP sees images of {self.clip.image_size} pixels; leave it null")
            return self.clip.image_size
        side = segment.side or (self.config.side // 2 if before_drawing else self.config.side)
        if side % FACTOR:
            raise ModelError(f"seen_size: {side} is no multiple of {FACTOR} pixels")
        return side

    def clip_pixels(self, image: Image) -> Tensor:
        """An image as CLIP takes it: the shorter side resized, the middle square, CLIP's mean and deviation."""
        assert self.clip is not None
        image, side = to_rgb(image), self.clip.image_size
        width, height = image.size
        size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
        image = image.resize(size, images.Resampling.BICUBIC)
        left, top = ((length - side) // 2 for length in size)
        return normalised(image.crop((left, top, left + side, top + side)))

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """CLIP's features (B, F, C) of pixels (B, 3, H, W): the layer before the last, without its class token."""
        made = [
            self.tower(some.to(self.device, self.tower.dtype), output_hidden_states=True).hidden_states[-2][:, 1:]
            for some in pixels.split(AT_ONCE)
        ]
        return torch.cat(made).float()

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
        """An image after each context of texts, or of texts and one seen image. Raises ModelError for another size, and
        where it is asked for the way."""
        for size in sizes or [sampling.size]:
            self.latent_grid(size)
        if path or explore is not None:
            raise ModelError(DRAWS)
        blank = torch.zeros(1, *self.config.grid, dtype=torch.int16)
        everything = torch.ones(self.config.grid, dtype=torch.bool)
        count = len(contexts)
        return self.infill(contexts, [blank] * count, [everything] * count, sampling, seeds)

    def infill(
        self,
        contexts: Sequence[Sequence[Segment]],
        latents: Sequence[Tensor],
        holes: Sequence[Tensor],
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[Generated]:
        """Images after contexts that have the ids of ``latents`` (1, h, w) but where ``holes`` (h, w) are True, which
        are drawn. Raises ValueError unless all are as many."""
        if not len(contexts) == len(latents) == len(holes) == len(seeds):
            raise ValueError(
                f"{len(contexts)} contexts, {len(latents)} latents, {len(holes)} holes, {len(seeds)} seeds"
            )
        if not contexts:
            return []
        codes = torch.stack([latent.flatten().long() for latent in latents]).to(self.device)
        hidden = torch.stack([hole.flatten() for hole in holes]).to(self.device)
        noise = Noise(seeds, self.config.codes)
        made = fill(self.guided(contexts, sampling), codes, hidden, sampling.timesteps - 1, sampling.temperature, noise)
        drawn = list(made.view(-1, 1, *self.config.grid).to("cpu", torch.int16))
        return [Generated(image, latent) for image, latent in zip(self.decode(drawn), drawn, strict=True)]

    def guided(self, contexts: Sequence[Sequence[Segment]], sampling: Sampling) -> Callable[[Tensor, Tensor], Tensor]:
        """Of ids (B, N), where not ``hidden`` (B, N), the guided logits (B, N, codes) of all of them."""
        if sampling.image_guidance > 1:
            raise ModelError("image_guidance: Show-o is guided by texts alone; leave it at 1")
        branches = [*contexts, *(map(without_text, contexts) if sampling.guidance > 1 else ())]
        taken = [_parts(branch) for branch in branches]
        seen = self.look([one.seen for one in taken if one.seen is not None], before_drawing=True)
        blank = [self.config.mask] * self.config.cells
        rows = [self.layout.drawing(one.text, blank, _of(seen, one.seen)) for one in taken]
        for one, row in zip(taken, rows, strict=True):
            self._warn(one, row)
        laid = Rows.of(rows, self.device)
        starts = torch.tensor([row.image for row in rows], device=self.device)
        columns = starts[:, None] + torch.arange(self.config.cells, device=self.device)
        lines = torch.arange(len(rows), device=self.device)[:, None]

        def logits_of(codes: Tensor, hidden: Tensor) -> Tensor:
            ids = torch.where(hidden, self.config.mask, self.config.first_code + codes)
            laid.ids[lines, columns] = ids.repeat(len(rows) // len(ids), 1)
            with torch.no_grad(), computing(self.device, self.precision):
                there = states(self.network, laid)[lines, columns]
                made = logits(self.network, there, self.config.first_code, self.config.codes)
            told, *untold = made.split(len(ids))
            return sampling.guidance * told - (sampling.guidance - 1) * untold[0] if untold else told

        return logits_of

    def _warn(self, parts: Parts, row: Row) -> None:
        """Say that a prompt was cut."""
        if parts.seen is None and parts.text and len(self.layout.begun(parts.text)) + 2 > row.image - 1:
            warnings.warn(
                f"Show-o reads {self.config.longest} tokens of a prompt; the rest of {parts.text[:60]!r}... is cut off",
                stacklevel=2,
            )

    # ---------------------------------------------------------------- reading and writing

    @torch.no_grad()
    def write(self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]) -> list[Written]:
        """An answer to each context. Raises ValueError unless there are as many seeds."""
        if len(contexts) != len(seeds):
            raise ValueError(f"{len(contexts)} contexts and {len(seeds)} seeds")
        if not contexts:
            return []
        with computing(self.device, self.precision):
            texts = self._decoded(*self.read(contexts), decoding, seeds)
        return [Written(self._text_of(one.ids), one.ids, torch.tensor(one.logprobs), one.ended) for one in texts]

    def _text_of(self, ids: Sequence[int]) -> str:
        """What ids of texts say; markers and image ids, which it may write, too, say nothing."""
        text: str = self.tokenizer.decode([token for token in ids if token < self.config.texts])
        return text

    def _decoded(self, context: Context, hidden: Tensor, decoding: Decoding, seeds: Sequence[int]) -> list[Text]:
        """Tokens after each row, of which ``hidden`` (B, H) are the last; at most ``max_tokens`` - 1 of them."""
        texts = [Text([]) for _ in seeds]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows, limit = list(range(len(texts))), decoding.max_tokens - 1
        for number in range(limit):
            token, logprob = pick(logits(self.network, hidden), decoding.temperature, [generators[i] for i in rows])
            for i, *chosen in zip(rows, token.tolist(), logprob.tolist(), strict=True):
                go_on(texts[i], [chosen[0]], [chosen[1]], self.bos, limit)
            kept = [place for place, i in enumerate(rows) if not texts[i].ended]
            if not kept or number + 1 == limit:
                break
            if len(kept) < len(rows):
                context, token, rows = context.select(kept), token[kept], [rows[place] for place in kept]
            hidden = extend(self.network, context, token[:, None].tolist())
        return texts

    @torch.no_grad()
    def score(self, contexts: Sequence[Sequence[Segment]], continuations: Sequence[str]) -> list[Tensor]:
        """Per context (continuations,): the log-probability of each as the beginning of an answer, or as more of one
        that is begun: branches over their context, in one pass."""
        if not contexts:
            return []
        branches = [self.ids(text) for text in continuations]
        with computing(self.device, self.precision):
            context, hidden = self.read(contexts)
            total = branch_scores(
                partial(logits, self.network), hidden, branches, partial(branched, self.network, context)
            )
        return list(total.cpu())

    def read(self, contexts: Sequence[Sequence[Segment]]) -> tuple[Context, Tensor]:
        """Contexts up to their answers, or in them where these are begun, and the last hidden states (B, H). An image
        is read once, whatever is asked about it."""
        taken = [_parts(context) for context in contexts]
        seen = self.look([one.seen for one in taken if one.seen is not None], before_drawing=False)
        heads = {id(one.seen): self.layout.shown(_of(seen, one.seen)) for one in taken}
        context, _ = read(self.network, list(heads.values()))
        place = {name: number for number, name in enumerate(heads)}
        context = context.select([place[id(one.seen)] for one in taken])
        tails = [
            [*self.layout.question(one.text or "", _of(seen, one.seen)), *self._ids_of(one.reply)] for one in taken
        ]
        return context, extend(self.network, context, tails)

    def _ids_of(self, segment: Segment | None) -> Sequence[int]:
        if segment is None:
            return ()
        return self.ids(segment.text or "") if segment.ids is None else segment.ids

    # ---------------------------------------------------------------- training

    def corrupt(
        self, latent: Tensor, generator: torch.Generator, timestep_shift: float, t: float | None = None
    ) -> Masks:
        """How much is masked, unless it is given, moved by ``timestep_shift`` where that is not 1, and which."""
        if t is None:
            drawn = 1 - torch.rand((), generator=generator).item()
            t = timestep_shift * drawn / (1 + (timestep_shift - 1) * drawn)
        return Masks(torch.rand(latent.numel(), generator=generator), t)

    def targets(self, segments: Sequence[Segment], corruptions: Sequence[Masks]) -> tuple[int, int]:
        """Masked ids with a loss, and tokens of texts with one, their ends included."""
        learned = [segment.loss for segment in segments if segment.kind == "noisy"]
        image = sum(masks.count for masks, loss in zip(corruptions, learned, strict=False) if loss)
        replies = [s for s in segments if s.kind == "text" and s.loss and not s.dropped]
        return image, sum(len(self._ids_of(reply)) + 1 for reply in replies)

    def length(self, segments: Sequence[Segment]) -> int:
        """Tokens of the example's row."""
        parts = _parts(segments)
        if parts.seen is None:
            blank = None
        elif self.clip is not None:
            self._seen_side(parts.seen, parts.noisy is not None)
            blank = Span(features=torch.empty((self.clip.image_size // self.clip.patch_size) ** 2, 0))
        else:
            blank = Span([0] * (self._seen_side(parts.seen, parts.noisy is not None) // FACTOR) ** 2)
        return self._row(parts, blank, [self.config.mask] * self.config.cells).length

    def pack(self, samples: Sequence[Sequence[Segment]], corruptions: Sequence[Masks], *, sees: bool = False) -> Batch:
        """A batch, one row per example: a corruption for each noisy latent, in order. Raises ModelError for an example
        of another make."""
        taken = [_parts(sample) for sample in samples]
        drawn = [one for one in taken if one.noisy is not None]
        if len(drawn) != len(corruptions):
            raise ValueError(f"{len(corruptions)} corruptions for {len(drawn)} noisy segments")
        seen: dict[int, Span] = {}
        for drawing in (True, False):
            some = [one.seen for one in taken if one.seen is not None and (one.noisy is not None) == drawing]
            seen |= self.look(some, drawing)
        left, rows = iter(corruptions), list[Row]()
        image: list[tuple[Tensor, ...]] = []  # of a segment: rows, columns, labels, t, cells
        text: list[tuple[Tensor, ...]] = []  # rows, columns, labels
        for number, one in enumerate(taken):
            ids: Sequence[int] = ()
            if one.noisy is not None:
                assert one.noisy.latent is not None
                masks, codes = next(left), torch.tensor(self.layout.codes(one.noisy.latent))
                ids = torch.where(masks.hidden, self.config.mask, codes).tolist()
            rows.append(row := self._row(one, _of(seen, one.seen), ids))
            if one.noisy is not None and one.noisy.loss:
                cells = masks.hidden.nonzero()[:, 0]
                t = torch.full((len(cells),), masks.t)
                image.append((torch.full_like(cells, number), row.image + cells, codes[cells], t, cells))
            if one.reply is not None and one.reply.loss:
                labels = torch.tensor([*self._ids_of(one.reply), self.bos])
                columns = row.length - 1 - len(labels) + torch.arange(len(labels))
                text.append((torch.full_like(labels, number), columns, labels))
        of_images, of_texts = (
            [torch.cat(column).to(self.device) for column in zip(NONE[:count], *parts, strict=True)]
            for parts, count in ((image, 5), (text, 3))
        )
        return Batch(
            rows=Rows.of(rows, self.device),
            image_places=torch.stack(of_images[:2]),
            image_labels=of_images[2],
            timestep=of_images[3].float(),
            image_segment=_numbered([len(one[0]) for one in image]).to(self.device),
            cell=of_images[4],
            text_places=torch.stack(of_texts[:2]),
            text_labels=of_texts[2],
            text_segment=_numbered([len(one[0]) for one in text]).to(self.device),
            sees=sees and self.clip is not None,
        )

    def _row(self, parts: Parts, seen: Span | None, image: Sequence[int]) -> Row:
        """The row of an example. Raises ModelError for one with nothing to learn from."""
        if parts.noisy is not None:
            return self.layout.drawing(parts.text, image, seen)
        if parts.reply is None:
            raise ModelError("Show-o learns to draw an image or to answer; an example has neither")
        return self.layout.answered(parts.text or "", seen, self._ids_of(parts.reply))

    def forward(self, batch: Batch) -> DiscreteForward:
        """The log-probability of every masked id, among all of the vocabulary, and logits of the texts, in float32."""
        hidden = states(self.network, batch.rows)
        if batch.sees and not len(batch.rows.features):
            assert self.clip is not None
            blank = torch.zeros(1, self.clip.hidden_size, device=self.device)
            hidden = hidden + 0 * self.network.mm_projector(blank.to(hidden.dtype)).sum()
        drawn = logits(self.network, hidden[tuple(batch.image_places)]).log_softmax(-1)
        return DiscreteForward(
            timestep=batch.timestep,
            image_segment=batch.image_segment,
            cell=batch.cell,
            logits=logits(self.network, hidden[tuple(batch.text_places)]),
            labels=batch.text_labels,
            text_segment=batch.text_segment,
            logprob=drawn.gather(1, batch.image_labels[:, None])[:, 0],
        )


# ---------------------------------------------------------------- what contexts are made of


def _parts(segments: Sequence[Segment]) -> Parts:
    """Texts before what is learned or gone on with, on lines of their own. Raises ModelError for what has no place in a
    row of Show-o's."""
    present = [segment for segment in segments if not segment.dropped]
    seen = [segment for segment in present if segment.kind == "seen"]
    noisy = [segment for segment in present if segment.kind == "noisy"]
    if any(segment.kind == "clean" for segment in present):
        raise ModelError("Show-o draws after texts and an image that it sees, not after a clean image")
    if len(seen) > 1 or len(noisy) > 1:
        raise ModelError(f"Show-o sees one image and draws one, not {len(seen)} and {len(noisy)}")
    if noisy and noisy[0].latent is None:
        raise ModelError("Show-o learns ids of images; a noisy segment has none")
    replies = [segment for segment in present if segment.kind == "text" and (segment.loss or segment.open)]
    if len(replies) > 1 or (replies and noisy):
        raise ModelError("Show-o learns an image or the one answer at the end of a row")
    texts = [s.text or "" for s in present if s.kind == "text" and s not in replies]
    return Parts("\n".join(texts) if texts else None, *(x[0] if x else None for x in (seen, noisy, replies)))


def _of(seen: Mapping[int, Span], segment: Segment | None) -> Span | None:
    return None if segment is None else seen[id(segment)]


def _numbered(counts: Sequence[int]) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))


# ---------------------------------------------------------------- pixels


def signed(image: Image) -> Tensor:
    """An RGB image as (3, H, W) in [-1, 1]."""
    return (torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255 - 0.5) / 0.5


def shrink(pixels: Tensor, side: int) -> Tensor:
    """Pixels (B, 3, H, W) at ``side`` x ``side``, as RecA shrinks what is seen: bilinear, without antialiasing."""
    return pixels if pixels.shape[-1] == side else interpolate(pixels, size=(side, side), mode="bilinear")


def as_image(pixels: Tensor) -> Image:
    """Pixels (3, H, W) around [-1, 1] as an image; levels are cut off, not rounded."""
    levels = ((pixels + 1) / 2).clamp(0, 1) * 255
    return images.fromarray(levels.permute(1, 2, 0).to(torch.uint8).cpu().numpy())


def _image(segment: Segment) -> Image:
    if not isinstance(segment.image, Image):
        raise ValueError(f"a seen segment needs an image, got {segment.image}")
    return segment.image
