"""Stock Qwen2.5 over batches of contexts: rows padded on the left, positions and visibility explicit, prompts shared.

H hidden width; a context has one row of keys and values, of which ``present`` says which columns hold a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, Qwen2Model

from srum.errors import ModelError


@dataclass
class Context:
    """Keys and values of B rows, ``present`` (B, S) where they are of a token."""

    cache: DynamicCache
    present: Tensor

    def select(self, rows: Sequence[int]) -> Context:
        """A copy with these rows, in this order, with repetition."""
        index = torch.tensor(rows, device=self.present.device)
        cache = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[index], layer.values[index], number)
        return Context(cache, self.present[index])

    def forget(self, count: int) -> None:
        """Take the last ``count`` columns back."""
        self.cache.crop(-count)
        self.present = self.present[:, :-count]


class Language:
    """The language model; its head is its embedding."""

    def __init__(self, model: Qwen2Model) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def tokens(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Inputs (L, H) of tokens of the vocabulary."""
        return self.model.embed_tokens(torch.as_tensor(ids, dtype=torch.long, device=self.device))

    def logits(self, states: Tensor) -> Tensor:
        """(..., V), float32."""
        return F.linear(states, self.model.embed_tokens.weight).float()

    # ---------------------------------------------------------------- passes

    def whole(self, rows: Sequence[Tensor]) -> Tensor:
        """Final hidden states (B, L, H) of rows (L, H) by themselves, padded on the right. Differentiable."""
        self._require_room(max(map(len, rows)))
        inputs = pad_sequence(list(rows), batch_first=True)  # what pads stands behind all that is read
        return self.model(inputs_embeds=inputs, use_cache=False).last_hidden_state

    def empty(self, rows: int) -> Context:
        """Contexts to which nothing has been written."""
        return Context(DynamicCache(), torch.zeros(rows, 0, dtype=torch.bool, device=self.device))

    def extend(self, context: Context, rows: Sequence[Tensor]) -> Tensor:
        """Write inputs (L, H) to each row; returns the final hidden states (B, L, H), rows padded on the left."""
        self._require_room(context.present.shape[1] + max(map(len, rows)))
        inputs = pad_sequence(list(rows), batch_first=True, padding_side="left")
        lengths = torch.tensor([len(row) for row in rows], device=inputs.device)
        count = inputs.shape[1]
        present = torch.arange(count, device=inputs.device) >= count - lengths[:, None]
        causal = torch.ones(count, count, dtype=torch.bool, device=inputs.device).tril()
        positions = context.present.sum(1, keepdim=True) + (present.cumsum(1) - 1).clamp(min=0)
        states = self._pass(context, inputs, positions, causal & present[:, None, :])
        context.present = torch.cat([context.present, present], dim=1)
        return states

    def beside(self, context: Context, branches: Sequence[Tensor]) -> Tensor:
        """Final hidden states (B, sum of L, H) of inputs (L, H) that each go on from every row, unaware of one another.

        They stay in the context's cache, which is of no use after it.
        """
        owner = torch.cat([torch.full((len(row),), i) for i, row in enumerate(branches)]).to(self.device)
        count = len(context.present)
        place = torch.cat([torch.arange(len(row), device=self.device) for row in branches])
        among = (owner[:, None] == owner).tril().expand(count, -1, -1)
        positions = context.present.sum(1, keepdim=True) + place
        return self._pass(context, torch.cat(list(branches)).expand(count, -1, -1), positions, among)

    def _pass(self, context: Context, inputs: Tensor, positions: Tensor, among: Tensor) -> Tensor:
        """``among`` (B, L, L): which of the new tokens see which; all of them see all of the context. Padding sees
        itself, since a softmax over nothing is no number."""
        count = inputs.shape[1]
        visible = among | torch.eye(count, dtype=torch.bool, device=inputs.device)
        before = context.present[:, None, :].expand(-1, count, -1)
        return self.model(
            inputs_embeds=inputs,
            attention_mask={"full_attention": torch.cat([before, visible], dim=2)[:, None]},
            position_ids=positions,
            past_key_values=context.cache,
            use_cache=True,
        ).last_hidden_state

    def _require_room(self, length: int) -> None:
        if length > (most := self.model.config.max_position_embeddings):
            raise ModelError(f"a context of {length} tokens is longer than the {most} that the model reads: shorten it")
