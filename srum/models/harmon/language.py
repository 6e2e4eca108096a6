"""Qwen2.5 as it stands between MAR's encoder and decoder: prompts are kept while images change, its head is its
embedding (docs/specs/harmon.md, 7)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Model

from srum.models.queries.language import Context, Rows
from srum.models.queries.language import Language as Stock


class Language(Stock):
    """The language model, trained or not."""

    def __init__(self, text: Qwen2Model) -> None:
        self.text = text

    def logits(self, states: Tensor) -> Tensor:
        """(..., V), float32."""
        return F.linear(states, self.text.embed_tokens.weight).float()

    def whole(self, rows: Sequence[Tensor]) -> Tensor:
        """Final hidden states (B, L, H) of rows (L, H) by themselves, padded on the right. Differentiable."""
        inputs = pad_sequence(list(rows), batch_first=True)  # what pads stands behind all that is read
        states: Tensor = self.text(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return states

    def beyond(self, context: Context, rows: Sequence[Tensor]) -> Tensor:
        """Final hidden states (B, L, H) of rows (L, H), of one length, behind each context, which stays what it was."""
        states = self.extend(context, Rows.of([self.inputs(row) for row in rows]))
        count = states.shape[1]
        context.cache.crop(-count)
        context.present, context.position = context.present[:, :-count], context.position - count
        return states
