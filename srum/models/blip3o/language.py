"""Stock Qwen2.5-VL over batches of contexts: rows padded on the left, positions and visibility explicit, images shared.

H hidden width; a context has one row of keys and values, of which ``present`` says which columns hold a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

from srum.geometry import Size
from srum.models.blip3o.images import patches, seen_size


@dataclass(frozen=True)
class Run:
    """Tokens in a row: inputs (L, H), M-RoPE positions (3, L) from 0 on, and how far they move the position."""

    inputs: Tensor
    positions: Tensor
    advance: int


@dataclass(frozen=True)
class Rows:
    """Runs side by side, padded on the left: inputs (B, L, H), positions (3, B, L), present (B, L), advance (B,)."""

    inputs: Tensor
    positions: Tensor
    present: Tensor
    advance: Tensor

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Rows:
        lengths = torch.tensor([len(run.inputs) for run in runs])
        places = torch.arange(int(lengths.max()))
        device = runs[0].inputs.device
        return cls(
            pad_sequence([run.inputs for run in runs], batch_first=True, padding_side="left"),
            torch.stack([pad(run.positions, (len(places) - run.positions.shape[1], 0)) for run in runs], dim=1),
            (places >= len(places) - lengths[:, None]).to(device),
            torch.tensor([run.advance for run in runs], device=device),
        )


@dataclass
class Context:
    """Keys and values of B rows, ``present`` (B, S) where they are of a token, and the next ``position`` (B,)."""

    cache: DynamicCache
    present: Tensor
    position: Tensor

    def select(self, rows: Sequence[int]) -> Context:
        """A copy with these rows, in this order, with repetition."""
        index = torch.tensor(rows, device=self.position.device)
        cache = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[index], layer.values[index], number)
        return Context(cache, self.present[index], self.position[index])


class Language:
    """Qwen2.5-VL, frozen, with what it needs of an image and of a text."""

    def __init__(self, qwen: Qwen2_5_VLForConditionalGeneration, encode: Callable[[str], Sequence[int]]) -> None:
        self.qwen, self.encode = qwen, encode
        self.text, self.vision = qwen.model.language_model, qwen.model.visual
        vision = qwen.config.vision_config
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.factor = self.patch * self.merge

    @property
    def device(self) -> torch.device:
        return self.text.embed_tokens.weight.device

    # ---------------------------------------------------------------- what runs are made of

    def tokens(self, ids: Sequence[int]) -> Run:
        """A run of tokens of the vocabulary."""
        return self.inputs(self.text.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device)))

    def inputs(self, inputs: Tensor) -> Run:
        """A run of vectors (L, H), such as queries, at the positions of a text."""
        return Run(inputs, _line(len(inputs), self.device), len(inputs))

    def images(self, images: Sequence[Image], sizes: Sequence[Size] | None = None) -> list[Run]:
        """Images as runs, at ``sizes`` (H, W) or those that they are usually seen at. Raises ModelError as
        ``seen_size`` does."""
        if not images:
            return []
        sizes = [self.seen_size((image.height, image.width)) for image in images] if sizes is None else sizes
        grids = torch.tensor([[1, height // self.patch, width // self.patch] for height, width in sizes])
        pixels = [patches(image, size, self.patch, self.merge) for image, size in zip(images, sizes, strict=True)]
        values = torch.cat(pixels).to(self.device, self.vision.dtype)
        states = self.vision(values, grid_thw=grids.to(self.device)).pooler_output
        merged = (grids[:, 1:] // self.merge).tolist()
        parts = states.split([rows * columns for rows, columns in merged])
        return [
            Run(part, _plane(rows, columns, self.device), max(rows, columns))
            for part, (rows, columns) in zip(parts, merged, strict=True)
        ]

    def seen_size(self, size: Size) -> Size:
        """(H, W) at which an image of ``size`` (H, W) is seen."""
        return seen_size(size, self.factor)

    # ---------------------------------------------------------------- passes

    def empty(self, rows: int) -> Context:
        """Contexts to which nothing has been written."""
        none = torch.zeros(rows, 0, dtype=torch.bool, device=self.device)
        return Context(DynamicCache(), none, torch.zeros(rows, dtype=torch.long, device=self.device))

    def extend(self, context: Context, rows: Rows) -> Tensor:
        """Write a run to each row; returns the final hidden states (B, L, H), rows padded on the left."""
        count = rows.present.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=self.device).tril()
        states = self._pass(context, rows, causal & rows.present[:, None, :])
        context.present = torch.cat([context.present, rows.present], dim=1)
        context.position = context.position + rows.advance
        return states

    def step(self, context: Context, token: Tensor) -> Tensor:
        """Write a token (B,) to each row; returns the final hidden states (B, 1, H)."""
        one = torch.ones_like(token)
        places = torch.zeros(3, len(token), 1, dtype=torch.long, device=self.device)
        return self.extend(context, Rows(self.text.embed_tokens(token)[:, None], places, one[:, None].bool(), one))

    def beside(self, context: Context, branches: Sequence[Run]) -> Tensor:
        """Final hidden states (B, sum of L, H) of runs that each go on from every row, unaware of one another.

        They stay in the context's cache, which is of no use after it.
        """
        owner = torch.cat([torch.full((len(run.inputs),), i) for i, run in enumerate(branches)]).to(self.device)
        count = len(context.position)
        inputs = torch.cat([run.inputs for run in branches]).expand(count, -1, -1)
        positions = torch.cat([run.positions for run in branches], dim=1)[:, None].expand(-1, count, -1)
        present = torch.ones(count, len(owner), dtype=torch.bool, device=self.device)
        among = (owner[:, None] == owner).tril().expand(count, -1, -1)
        return self._pass(context, Rows(inputs, positions, present, torch.zeros_like(context.position)), among)

    def _pass(self, context: Context, rows: Rows, among: Tensor) -> Tensor:
        """``among`` (B, L, L): which of the new tokens see which; all of them see all of the context. Padding sees
        itself, since a softmax over nothing is no number."""
        count = rows.present.shape[1]
        visible = among | torch.eye(count, dtype=torch.bool, device=self.device)
        before = context.present[:, None, :].expand(-1, count, -1)
        return self.text(
            inputs_embeds=rows.inputs,
            attention_mask={"full_attention": torch.cat([before, visible], dim=2)[:, None]},
            position_ids=rows.positions + context.position[None, :, None],
            past_key_values=context.cache,
            use_cache=True,
        ).last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """(..., V), float32."""
        return self.qwen.lm_head(states).float()


def joined(runs: Sequence[Run]) -> Run:
    """Runs one after the other."""
    starts = torch.tensor([0, *(run.advance for run in runs)]).cumsum(0).tolist()
    return Run(
        torch.cat([run.inputs for run in runs]),
        torch.cat([run.positions + start for run, start in zip(runs, starts, strict=False)], dim=1),
        starts[-1],
    )


def flattened(run: Run) -> Run:
    """The same tokens at the positions of a text, images included, as they are drawn after."""
    return Run(run.inputs, _line(len(run.inputs), run.inputs.device), len(run.inputs))


def _line(length: int, device: torch.device) -> Tensor:
    """Positions (3, L) of a text: the same on all axes."""
    return torch.arange(length, device=device).expand(3, -1)


def _plane(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions (3, rows * columns) of an image: time, row, column."""
    place = torch.arange(rows * columns, device=device)
    return torch.stack([torch.zeros_like(place), place // columns, place % columns])
