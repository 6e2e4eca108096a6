"""Passes of Phi over rows of tokens: whole, as in training and drawing, or bit by bit over what it has read.

H hidden width. Rows are padded on the right; positions and visibility are explicit, so that padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from srum.models.queries.language import Context
from srum.models.showo.checkpoint import Network
from srum.models.showo.sequence import Row


@dataclass(frozen=True)
class Rows:
    """Rows side by side: ``ids`` (B, L), ``features`` (F, C) that stand at ``places`` (2, F) of them, ``visible``
    (B, L, L), where padding sees itself alone, and ``lengths`` (B,)."""

    ids: Tensor
    features: Tensor
    places: Tensor
    visible: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Rows:
        lengths = torch.tensor([row.length for row in rows])
        most = int(lengths.max())
        visible = torch.eye(most, dtype=torch.bool).repeat(len(rows), 1, 1)
        features, places = [torch.zeros(0, 0)], [torch.zeros(2, 0, dtype=torch.long)]
        for number, row in enumerate(rows):
            visible[number, : row.length, : row.length] = row.visible()
            column = 0
            for span in row.spans:
                if span.features is not None:
                    here = torch.arange(column, column + len(span))
                    features, places = [*features, span.features], [*places, torch.stack([here * 0 + number, here])]
                column += len(span)
        return cls(
            pad_sequence([row.ids() for row in rows], batch_first=True).to(device),
            torch.cat([x.to(device) for x in (features[1:] or features)]),
            torch.cat(places, dim=1).to(device),
            visible.to(device),
            lengths.to(device),
        )


def states(network: Network, rows: Rows) -> Tensor:
    """Final hidden states (B, L, H) of whole rows; differentiable."""
    positions = torch.arange(rows.ids.shape[1], device=rows.ids.device)[None]
    return _pass(network, embedded(network, rows), rows.visible, positions, None)


def embedded(network: Network, rows: Rows) -> Tensor:
    """What goes into the first layer, (B, L, H)."""
    inputs: Tensor = network.showo.model.embed_tokens(rows.ids)
    if not len(rows.features):
        return inputs
    projected = network.mm_projector(rows.features.to(inputs.dtype))
    return inputs.index_put(tuple(rows.places), projected.to(inputs.dtype))


def logits(network: Network, hidden: Tensor, first: int = 0, count: int | None = None) -> Tensor:
    """(..., count) of the ids from ``first`` on, by default of all, float32."""
    head, last = network.showo.lm_head, None if count is None else first + count
    return linear(hidden, head.weight[first:last], head.bias[first:last]).float()


def read(network: Network, rows: Sequence[Row]) -> tuple[Context, Tensor]:
    """Contexts of whole rows, which may be empty together, and the last hidden states (B, H)."""
    laid = Rows.of(rows, network.showo.device)
    present = torch.arange(laid.ids.shape[1], device=laid.ids.device) < laid.lengths[:, None]
    context = Context(DynamicCache(), present, laid.lengths)
    if not laid.ids.shape[1]:
        return context, torch.zeros(len(rows), 0)
    positions = torch.arange(laid.ids.shape[1], device=laid.ids.device)[None]
    made = _pass(network, embedded(network, laid), laid.visible, positions, context)
    return context, made[torch.arange(len(rows)), laid.lengths - 1]


def extend(network: Network, context: Context, ids: Sequence[Sequence[int]]) -> Tensor:
    """Write ids to each row; returns the last hidden states (B, H)."""
    device = context.position.device
    lengths = torch.tensor([len(own) for own in ids], device=device)
    tokens = pad_sequence([torch.tensor(own, dtype=torch.long) for own in ids], batch_first=True).to(device)
    places = torch.arange(tokens.shape[1], device=device)
    present = places < lengths[:, None]
    causal = (places[:, None] >= places) & present[:, None, :]
    among = causal | torch.eye(len(places), dtype=torch.bool, device=device)
    made = _beside(network, context, tokens, among, context.position[:, None] + places)
    context.present = torch.cat([context.present, present], dim=1)
    context.position = context.position + lengths
    return made[torch.arange(len(ids)), lengths - 1]


def branched(network: Network, context: Context, branches: Sequence[Sequence[int]]) -> Tensor:
    """Final hidden states (B, sum of L, H) of ids that each go on from every row, unaware of one another.

    They stay in the context's cache, which is of no use after it.
    """
    device, count = context.position.device, len(context.position)
    owner = torch.tensor([number for number, own in enumerate(branches) for _ in own], device=device)
    places = torch.tensor([place for own in branches for place in range(len(own))], device=device)
    tokens = torch.tensor([token for own in branches for token in own], device=device).expand(count, -1)
    among = (owner[:, None] == owner).tril().expand(count, -1, -1)
    return _beside(network, context, tokens, among, context.position[:, None] + places)


def _beside(network: Network, context: Context, tokens: Tensor, among: Tensor, positions: Tensor) -> Tensor:
    """New tokens (B, L), which see one another as ``among`` (B, L, L) says, and all of the context."""
    before = context.present[:, None, :].expand(-1, tokens.shape[1], -1)
    inputs = network.showo.model.embed_tokens(tokens)
    return _pass(network, inputs, torch.cat([before, among], dim=2), positions, context)


def _pass(network: Network, inputs: Tensor, visible: Tensor, positions: Tensor, context: Context | None) -> Tensor:
    hidden: Tensor = network.showo.model(
        inputs_embeds=inputs,
        attention_mask=visible[:, None],
        position_ids=positions,
        past_key_values=None if context is None else context.cache,
        use_cache=context is not None,
    ).last_hidden_state
    return hidden
