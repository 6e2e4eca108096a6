"""What texts have in common, whatever the network: special tokens, rows of tokens, how they go on, how the next is
picked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from srum.errors import ModelError


def token_id(tokenizer: PreTrainedTokenizerFast, token: str, folder: Path) -> int:
    """The id of a special token. Raises ModelError where the tokenizer, which is that of ``folder``, has none."""
    value = tokenizer.convert_tokens_to_ids(token)
    if value is None:
        raise ModelError(f"the tokenizer in {folder} has no token {token!r}")
    return int(value)


@dataclass
class Row:
    """The tokens of a text, its start included, their log-probabilities and that of its end, where it ``ended``."""

    ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False


def go_on(text: Row, tokens: Sequence[float], logprobs: Sequence[float], stop: int, most: int) -> None:
    """Add to ``text`` what was written after it: up to ``stop``, and to ``most`` tokens."""
    new = list(takewhile(lambda token: token != stop, map(int, tokens)))[: most - len(text.ids)]
    text.ended = len(text.ids) + len(new) < most and len(new) < len(tokens)
    text.ids += new
    text.logprobs += logprobs[: len(new) + text.ended]


def cut_where(text: Row, before: int, start: int, said: Callable[[Sequence[int]], bool]) -> bool:
    """Cut ``text`` behind the first token from place ``before`` on with which it has ``said`` all; whether it has.

    Its first ``start`` tokens were given.
    """
    for length in range(before + 1, len(text.ids) + 1):
        if said(text.ids[start:length]):
            del text.ids[length:], text.logprobs[length - start :]
            text.ended = False
            return True
    return False


def pick(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """The next token of every row (B,), the likeliest, or where ``temperature`` > 0 a sample; its log-probability (B,).

    A sample is argmax p / q with q ~ Exp(1) drawn by the host, which does not have to see p for it. So does
    torch.multinomial, from the same numbers of a generator.
    """
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(1)
        return token, logits.log_softmax(1).gather(1, token[:, None])[:, 0]
    p = torch.softmax(logits / temperature, dim=1)
    q = torch.stack([torch.empty(p.shape[1]).exponential_(generator=generator) for generator in generators])
    if p.is_cuda:
        q = q.pin_memory()  # else the copy would wait
    token = (p / q.to(p.device, non_blocking=p.is_cuda)).argmax(1)
    return token, p.gather(1, token[:, None])[:, 0].log()


def branch_scores(
    logits: Callable[[Tensor], Tensor],
    states: Tensor,
    branches: Sequence[Sequence[int]],
    beside: Callable[[Sequence[Sequence[int]]], Tensor],
) -> Tensor:
    """Log-probabilities (B, branches) of texts, given by their ids, after rows of which ``states`` (B, H) are the last.

    ``beside`` gives the hidden states (B, sum of L, H) of ids that each go on from every row, unaware of one another.
    """
    total = logits(states).log_softmax(-1)[:, [ids[0] for ids in branches]]
    if more := [(number, ids) for number, ids in enumerate(branches) if len(ids) > 1]:
        hidden = beside([ids[:-1] for _, ids in more])
        targets = torch.tensor([token for _, ids in more for token in ids[1:]], device=total.device)
        owner = torch.tensor([number for number, ids in more for _ in ids[1:]], device=total.device)
        for row, own in zip(total, hidden, strict=True):  # row by row: a vocabulary is large
            row.index_add_(0, owner, logits(own).log_softmax(-1).gather(1, targets[:, None])[:, 0])
    return total


def beginnings_of(texts: Iterable[Sequence[int]]) -> dict[tuple[int, ...], int]:
    """The nodes of the tree of the texts but for its leaves: what some text begins with and goes on from, without the
    empty beginning, numbered from 1 so that all that go on from one follow it."""
    nodes = sorted({tuple(ids[:length]) for ids in texts for length in range(1, len(ids))})
    return {node: number for number, node in enumerate(nodes, 1)}
