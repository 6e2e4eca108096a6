"""Segments to a packed batch: token streams, rope positions, visibility and loss positions (docs/specs/bagel.md, 4).

The same function lays out training samples (rows that start empty) and additions to cached contexts (rows that start
where their context ends), so that there is one set of rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from srum.errors import ModelError
from srum.models.bagel.cache import Kept
from srum.models.bagel.network import Layout, Sight
from srum.models.bagel.positions import grid_ids


@dataclass(frozen=True, kw_only=True)
class Split:
    """One segment, tokenised.

    ``text``: ``ids`` with bos and eos as they stand in the sequence. ``seen``: ``patches`` (P, 3 p p) on ``grid``.
    ``clean`` / ``noisy``: latent ``tokens`` (h * w, D) on ``grid``; a noisy split holds x_t, its timestep ``t``, and
    the velocity (h * w, D) that is its ``target``, where known. ``dropped``: the tokens are left out; the position of
    an image still advances. ``frame_delta`` and ``continues`` join the frames of a video into one split. ``end_label``:
    a target on the closing token. ``branch``: as in ``Segment``; ``parent``: the branch from whose end it goes on, 0
    the trunk. What goes on from a branch follows it, before others do.
    """

    kind: Literal["text", "seen", "clean", "noisy"]
    ids: Sequence[int] = ()
    patches: Tensor | None = None
    tokens: Tensor | None = None
    target: Tensor | None = None
    grid: tuple[int, int] = (0, 0)
    t: float = 0.0
    loss: bool = False
    dropped: bool = False
    frame_delta: int | None = None
    continues: bool = False
    end_label: int | None = None
    branch: int = 0
    parent: int = 0

    @property
    def length(self) -> int:
        """Tokens in the sequence, markers included."""
        return len(self.ids) if self.kind == "text" else self.grid[0] * self.grid[1] + 2


class Span(NamedTuple):
    """What a split means for attention. Modes: causal, full (sees all of itself), noise (and no other sees it)."""

    length: int
    mode: Literal["causal", "full", "noise"]
    branch: int = 0
    parent: int = 0


@dataclass(frozen=True)
class ImageMarkers:
    """Ids of the tokens around an image."""

    start: int
    end: int


class Begun(Protocol):
    """What rows go on from, as a ``Cache``."""

    @property
    def position(self) -> Tensor:
        """(rows,): next of rope."""
        ...

    @property
    def context(self) -> Tensor:
        """(rows, S): which columns hold a token."""
        ...


@dataclass(frozen=True)
class Batch:
    """Everything the network needs. Streams: und = [text; seen], gen = [latents]; see ``Layout``.

    ``text_ids`` (Nt,); ``patches`` (N, P, 3 p p) padded with ``patch_ids``, ``patch_present`` (N, P);
    ``latents`` (G, D), ``timesteps`` (G,), or (1,) where all are at one, ``latent_ids`` (G,); ``loss_tokens``: indices
    into gen; ``ce_tokens``: indices into the text stream, with ``ce_weights`` (1 / sqrt(targets of the segment)); what
    ``TrainingForward`` says of these tokens. ``row``, ``column`` (T,) say where each token of [und; gen] stands.
    """

    layout: Layout
    text_ids: Tensor
    patches: Tensor
    patch_ids: Tensor
    patch_present: Tensor
    latents: Tensor
    timesteps: Tensor
    latent_ids: Tensor
    loss_tokens: Tensor
    targets: Tensor
    image_segment: Tensor
    cell: Tensor
    ce_tokens: Tensor
    labels: Tensor
    text_segment: Tensor
    ce_weights: Tensor
    row: Tensor
    column: Tensor
    advance: Tensor
    beginning: Beginning | None = None

    def with_blank_patch(self) -> Batch:
        """The same batch with a patch that no token is made of: the understanding encoder runs, for nothing."""
        return replace(
            self,
            patches=self.patches.new_zeros(1, 1, self.patches.shape[-1]),
            patch_ids=self.patch_ids.new_zeros(1, 1),
            patch_present=self.patch_present.new_zeros(1, 1),
        )


@dataclass
class Beginning:
    """What the rows of a batch begin with, in a ``batch`` of its own, run once, whatever the weights that draw.

    The tokens that predict texts are those of this batch and then those of the rest, ``order`` (M,) puts them into that
    of ``labels``, ``text_segment`` and ``ce_weights``, which the rest has of both. Once it has run: what every layer
    ``kept``, and the final ``states`` (M', H) of its tokens that predict texts.
    """

    batch: Batch
    order: Tensor | None = None
    kept: Sequence[Kept] = ()
    states: Tensor | None = None

    @property
    def position(self) -> Tensor:
        return self.batch.advance

    @property
    def context(self) -> Tensor:
        return self.batch.layout.present

    def joined(self, states: Tensor) -> Tensor:
        """Those of all tokens that predict texts, in order, once those of the rest (M - M', H) are known."""
        assert self.states is not None
        return torch.cat([self.states, states])[self.order]


def before_latents(splits: Sequence[Split]) -> int:
    """How many splits of a row nothing but understanding has a part in: those before its first latent, all without.

    A row with latents goes on from its trunk.
    """
    latents = (place for place, s in enumerate(splits) if s.kind in ("clean", "noisy") and not s.dropped)
    if (first := next(latents, None)) is None:
        return len(splits)
    return next((place for place, split in enumerate(splits[:first]) if split.branch), first)


def rejoined(first: Batch, rest: Batch) -> Batch:
    """The rest of a batch with what its rows ``first`` begin with, which knows the text targets of both."""
    row = torch.cat([first.row[first.ce_tokens], rest.row[rest.ce_tokens]])
    order = row.argsort(stable=True)
    owner = torch.cat([first.text_segment, rest.text_segment + len(first.text_segment)])[order]
    return replace(
        rest,
        labels=torch.cat([first.labels, rest.labels])[order],
        ce_weights=torch.cat([first.ce_weights, rest.ce_weights])[order],
        text_segment=owner.unique_consecutive(return_inverse=True)[1],
        beginning=Beginning(first, order),
    )


@dataclass
class _Stream:
    """Rows, columns and rope positions of the tokens of one stream, in order."""

    row: list[np.ndarray] = field(default_factory=list)
    column: list[np.ndarray] = field(default_factory=list)
    position: list[np.ndarray] = field(default_factory=list)

    def add(self, row: int, columns: np.ndarray, positions: np.ndarray) -> None:
        self.row.append(np.full(len(columns), row))
        self.column.append(columns)
        self.position.append(positions)


def lay_out(
    samples: Sequence[Sequence[Split]],
    markers: ImageMarkers,
    *,
    patch_side: int,
    latent_side: int,
    dims: tuple[int, int],
    begun: Begun | None = None,
    longest: int | None = None,
    device: torch.device | None = None,
    multiple: int = 1,
) -> Batch:
    """Pack ``samples``, one per row; row r goes on from what is ``begun`` of it, and sees all of that.

    ``patch_side``, ``latent_side``: sides of the position tables; ``dims``: numbers per patch and per latent token.
    Raises ModelError for a row of more positions than ``longest``.
    Rows are padded to a ``multiple`` of columns: on a GPU every new shape costs its kernels' choice and memory.
    """
    starts = np.zeros(len(samples), dtype=np.int64) if begun is None else begun.position.cpu().numpy()
    text, seen, gen = _Stream(), _Stream(), _Stream()
    text_ids: list[int] = []
    seen_splits: list[Split] = []
    latent_splits: list[Split] = []
    ce: list[tuple[int, int, float, int]] = []
    loss_splits: list[Split] = []
    loss_tokens: list[np.ndarray] = []
    spans: list[list[Span]] = []  # per row, of each visible split
    advance = []
    generated, told = 0, 0  # latent tokens; texts with a target
    for row, splits in enumerate(samples):
        column, position, branch = 0, int(starts[row]), 0
        ends = {0: position}  # of every branch
        row_spans: list[Span] = []
        for split in splits:
            if split.branch != branch:
                if split.branch == 0:
                    raise ValueError(f"row {row}: a segment of the trunk after branch {branch}")
                position, branch = ends[split.parent], split.branch
            if split.dropped:
                position += split.kind in ("seen", "clean")
                ends[branch] = position
                continue
            n = split.length
            columns = np.arange(column, column + n)
            if split.kind == "text":
                first = len(text_ids)
                text_ids.extend(split.ids)
                text.add(row, columns, np.arange(position, position + n))
                if split.loss:
                    ce += [(first + i, label, (n - 1) ** -0.5, told) for i, label in enumerate(split.ids[1:])]
                mode: Literal["causal", "full", "noise"] = "causal"
                step = n
            else:
                positions = np.full(n, position)
                text_ids += [markers.start, markers.end]
                text.add(row, columns[[0, -1]], positions[[0, -1]])
                if split.kind == "seen":
                    seen.add(row, columns[1:-1], positions[1:-1])
                    seen_splits.append(split)
                else:
                    gen.add(row, columns[1:-1], positions[1:-1])
                    latent_splits.append(split)
                    if split.loss:
                        loss_splits.append(split)
                        loss_tokens.append(np.arange(generated, generated + n - 2))
                    generated += n - 2
                mode = "noise" if split.kind == "noisy" and split.frame_delta is None else "full"
                step = split.frame_delta if split.frame_delta is not None else int(split.kind != "noisy")
            if split.end_label is not None:
                ce.append((len(text_ids) - 1, split.end_label, 1.0, told))
            told += split.kind == "text" and (split.loss or split.end_label is not None)
            if split.continues:
                row_spans[-1] = row_spans[-1]._replace(length=row_spans[-1].length + n)
            else:
                row_spans.append(Span(n, mode, branch, split.parent))
            column, position = column + n, position + step
            ends[branch] = position
        spans.append(row_spans)
        if longest is not None and max(ends.values()) > longest:
            raise ModelError(f"a context of {max(ends.values())} positions: the language model was made for {longest}")
        advance.append(ends[0] - int(starts[row]))

    streams = (text, seen, gen)
    token_rows, token_columns, token_positions = (
        torch.from_numpy(np.concatenate([a for s in streams for a in getattr(s, name)] or [np.zeros(0, np.int64)]))
        for name in ("row", "column", "position")
    )
    layout = _layout(token_rows, token_columns, token_positions, spans, begun, multiple)
    patches, patch_ids, patch_present = _pad_patches(seen_splits, patch_side, dims[0])
    batch = Batch(
        layout=layout,
        text_ids=torch.tensor(text_ids, dtype=torch.long),
        patches=patches,
        patch_ids=patch_ids,
        patch_present=patch_present,
        latents=torch.cat([s.tokens for s in latent_splits if s.tokens is not None] or [torch.zeros(0, dims[1])]),
        timesteps=torch.cat([torch.full((s.length - 2,), s.t) for s in latent_splits] or [torch.zeros(0)]),
        latent_ids=torch.cat(
            [grid_ids(s.grid, latent_side) for s in latent_splits] or [torch.zeros(0, dtype=torch.long)]
        ),
        loss_tokens=torch.from_numpy(np.concatenate(loss_tokens or [np.zeros(0, np.int64)])),
        targets=torch.cat([_target(s) for s in loss_splits] or [torch.zeros(0, dims[1])]),
        image_segment=torch.from_numpy(np.repeat(np.arange(len(loss_tokens)), [len(own) for own in loss_tokens])),
        cell=torch.from_numpy(np.concatenate([np.arange(len(own)) for own in loss_tokens] or [np.zeros(0, np.int64)])),
        ce_tokens=torch.tensor([i for i, _, _, _ in ce], dtype=torch.long),
        labels=torch.tensor([label for _, label, _, _ in ce], dtype=torch.long),
        text_segment=torch.tensor([owner for _, _, _, owner in ce], dtype=torch.long),
        ce_weights=torch.tensor([w for _, _, w, _ in ce]),
        row=token_rows,
        column=token_columns,
        advance=torch.tensor(advance, dtype=torch.long),
    )
    return _to(batch, device) if device is not None else batch


def sight_of(spans: Sequence[Sequence[Span]], length: int) -> Sight:
    """What decides who sees whom in rows of ``length`` columns that hold these spans from the left."""
    split = np.full((len(spans), length), -1)
    branch, last = np.zeros((2, len(spans), length), dtype=np.int64)
    full, noise = np.zeros((2, len(spans), length), dtype=bool)
    for row, row_spans in enumerate(spans):
        column, lasts = 0, _last_branches(row_spans)
        for number, (n, mode, own, _) in enumerate(row_spans):
            split[row, column : column + n] = number
            branch[row, column : column + n] = own
            last[row, column : column + n] = lasts[own]
            full[row, column : column + n] = mode != "causal"
            noise[row, column : column + n] = mode == "noise"
            column += n
    return Sight(*(torch.from_numpy(a) for a in (split, branch, last, full, noise)))


def _last_branches(spans: Sequence[Span]) -> dict[int, int]:
    """Of every branch the last that goes on from it, or from one that does; it may be itself."""
    last = {span.branch: span.branch for span in spans} | {0: max((span.branch for span in spans), default=0)}
    for span in reversed(spans):
        last[span.parent] = max(last[span.parent], last[span.branch])
    return last


def _layout(
    rows: Tensor, columns: Tensor, positions: Tensor, spans: list[list[Span]], begun: Begun | None, multiple: int
) -> Layout:
    count, longest = len(spans), max(1, *(sum(span.length for span in row) for row in spans))
    length = -(-longest // multiple) * multiple
    place = rows * length + columns
    present = torch.zeros(count * length, dtype=torch.bool)
    present[place] = True
    context = None if begun is None else begun.context.cpu()
    return Layout(place, present.view(count, length), positions, sight_of(spans, length), context)


def _target(split: Split) -> Tensor:
    """The velocity that is wanted of a noisy split, NaN where none is known. (h * w, D)"""
    assert split.tokens is not None
    return torch.full_like(split.tokens, torch.nan) if split.target is None else split.target


def _pad_patches(splits: list[Split], side: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    longest = max((s.length - 2 for s in splits), default=0)
    patches = torch.zeros(len(splits), longest, dim)
    ids = torch.zeros(len(splits), longest, dtype=torch.long)
    present = torch.zeros(len(splits), longest, dtype=torch.bool)
    for i, split in enumerate(splits):
        assert split.patches is not None
        n = split.length - 2
        patches[i, :n], ids[i, :n], present[i, :n] = split.patches, grid_ids(split.grid, side), True
    return patches, ids, present


def _to(batch: Batch, device: torch.device) -> Batch:
    tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(batch).items() if isinstance(x, Tensor)}
    return replace(batch, layout=batch.layout.to(device), **tensors)
