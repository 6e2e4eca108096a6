"""Text decoding: one token per row and step over cached contexts (docs/specs/bagel.md, section 10).

A step reads and writes tensors whose shapes and addresses stay, and nothing looks at their values: steps queue on the
device. The host looks at what they have written once in a while; what a row wrote after its stop token is then cut off,
and rows that have stopped leave when they are half of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from srum.models.bagel.cache import Cache
from srum.models.bagel.network import additive
from srum.models.base import Decoding
from srum.models.texts import Row, cut_where, go_on, pick


class Pace(NamedTuple):
    """Tokens between two looks at what was written, and columns that the cache grows by, all seen, full or not."""

    look: int
    room: int


# On a CPU looking is free, and every column takes time; elsewhere looking waits for all steps that are queued.
PACES = {"cpu": Pace(look=1, room=16)}
PACE = Pace(look=16, room=512)

NextLogits = Callable[["Step"], Tensor]  # (B, V) behind the token of every row


class Step:
    """One token of each of B rows over S columns of a cache, ``room`` of which are free: so often it can be taken.

    ``token`` (B,) is run at rope ``position`` (B,) and kept in ``column`` (1,); ``bias`` (B, 1, 1, S) of the scores
    shows the columns that hold a token of the row. With ``record`` the first step is run, then recorded as a CUDA graph
    and replayed, which launches all its kernels at once.
    """

    def __init__(self, next_logits: NextLogits, cache: Cache, token: Tensor, room: int, record: bool) -> None:
        width = cache.used + room
        self.next_logits, self.cache, self.room, self.record = next_logits, cache, room, record
        self.token, self.position = token, cache.position.clone()
        self.column = torch.full((1,), cache.used, device=token.device)
        self.memories = cache.memories(self.column, width)
        self.bias = additive(cache.valid[:, None, None, :width], cache.keys[0].dtype)
        self.taken = 0

    def take(self) -> Tensor:
        """Logits (B, V) behind the token, valid until the next step; all then stands one column further."""
        if self.record and self.taken == 1:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.recorded = self._run()
        self.taken += 1
        if not self.record or self.taken == 1:
            return self._run()
        self.graph.replay()
        return self.recorded

    def _run(self) -> Tensor:
        self.bias.index_fill_(3, self.column, 0)
        logits = self.next_logits(self)
        self.position += 1
        self.column += 1
        return logits

    def close(self) -> None:
        """Leave to the cache what the steps have written."""
        present = torch.ones(self.cache.rows, self.taken, dtype=torch.bool, device=self.token.device)
        self.cache.keep(present, torch.full_like(self.position, self.taken))


def decode_rows(
    next_logits: NextLogits,
    cache: Cache,
    starts: Sequence[Sequence[int]],
    decoding: Decoding,
    stop: int,
    seeds: Sequence[int],
    record: bool = False,
    logits_out: list[Tensor] | None = None,
    said: Callable[[Sequence[int]], bool] | None = None,
) -> list[Row]:
    """``starts``, of which ``cache`` has all but the last tokens, with up to ``decoding.max_tokens`` - 1 more each.

    A row ends before ``stop``, whose log-probability it has, or with the token after which it has ``said`` all. Tokens
    are sampled as torch.multinomial does with a generator of the row's own seed. ``logits_out`` receives the logits
    (B, V) of every step, and of a last one whose token is one too many.
    """
    texts = [Row(list(start)) for start in starts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    device = cache.position.device
    pace, limit = PACES.get(device.type, PACE), decoding.max_tokens - 1
    left = limit + (logits_out is not None)
    rows = list(range(len(texts)))  # of the cache: which of the texts each belongs to
    alive = set(rows)
    while alive and left > 0:
        if 2 * len(alive) <= len(rows):
            staying = [row for row, i in enumerate(rows) if i in alive]
            cache, rows = cache.select(staying), [rows[row] for row in staying]
        room = min(pace.room, left)
        cache.reserve(room)  # no more: batched products on a CPU copy keys and values that are a part of a tensor
        token = torch.tensor([texts[i].ids[-1] for i in rows], device=device)
        step = Step(next_logits, cache, token, room, record)
        while step.taken < step.room and 2 * len(alive) > len(rows):
            written = []
            for _ in range(min(pace.look, step.room - step.taken)):
                logits = step.take()
                token, logprob = pick(logits, decoding.temperature, [generators[i] for i in rows])
                written.append(torch.stack([token.float(), logprob]))  # exact below 2^24 tokens: one tensor to wait for
                step.token.copy_(token)
                if logits_out is not None:
                    logits_out.append(logits.float().cpu())
            left -= len(written)
            for i, (tokens, logprobs) in zip(rows, torch.stack(written, 2).transpose(0, 1).tolist(), strict=True):
                if i in alive:
                    before = len(texts[i].ids)
                    go_on(texts[i], tokens, logprobs, stop, len(starts[i]) + limit)
                    if texts[i].ended or (said is not None and cut_where(texts[i], before, len(starts[i]), said)):
                        alive.discard(i)
        step.close()
    return texts
