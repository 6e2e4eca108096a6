"""A stock language model over batches of contexts: rows padded on the left, positions and visibility explicit.

H hidden width, A axes of a position (3 of M-RoPE, else 1); a context has one row of keys and values, of which
``present`` says which columns hold a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache


@dataclass(frozen=True)
class Run:
    """Tokens in a row: inputs (L, H), positions (A, L) from 0 on, and how far they move the position."""

    inputs: Tensor
    positions: Tensor
    advance: int


@dataclass(frozen=True)
class Rows:
    """Runs side by side, padded on the left: inputs (B, L, H), positions (A, B, L), present (B, L), advance (B,)."""

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
    """The frozen ``network``, as transformers has it: its text model, and a head that gives logits."""

    axes: ClassVar[int] = 1  # of a position

    def __init__(self, network: Any) -> None:
        self.network, self.text = network, network.model.language_model

    @property
    def device(self) -> torch.device:
        device: torch.device = self.text.embed_tokens.weight.device
        return device

    # ---------------------------------------------------------------- what runs are made of

    def tokens(self, ids: Sequence[int]) -> Run:
        """A run of tokens of the vocabulary."""
        return self.inputs(self.text.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device)))

    def inputs(self, inputs: Tensor) -> Run:
        """A run of vectors (L, H), such as queries, at the positions of a text."""
        return Run(inputs, line(len(inputs), self.axes, self.device), len(inputs))

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
        places = torch.zeros(self.axes, len(token), 1, dtype=torch.long, device=self.device)
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
        positions = rows.positions + context.position[None, :, None]
        states: Tensor = self.text(
            inputs_embeds=rows.inputs,
            attention_mask={"full_attention": torch.cat([before, visible], dim=2)[:, None]},
            position_ids=positions if self.axes > 1 else positions[0],
            past_key_values=context.cache,
            use_cache=True,
        ).last_hidden_state
        return states

    def logits(self, states: Tensor) -> Tensor:
        """(..., V), float32."""
        logits: Tensor = self.network.lm_head(states).float()
        return logits


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
    return Run(run.inputs, line(len(run.inputs), len(run.positions), run.inputs.device), len(run.inputs))


def line(length: int, axes: int, device: torch.device) -> Tensor:
    """Positions (A, L) of a text: the same on all axes."""
    return torch.arange(length, device=device).expand(axes, -1)
