"""Reading and writing with a stock language model, whatever stands around it: contexts of texts and images in batches,
an image looked at once, whatever is asked about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from srum.errors import ModelError
from srum.models.base import Decoding, Segment, Written
from srum.models.queries.chat import Part
from srum.models.queries.language import Context, Rows, Run, joined
from srum.models.texts import Row, branch_scores, go_on, pick


class Reader(ABC):
    """What a model with a ``language`` model does with it: the methods ``write`` and ``score`` of the protocol."""

    name: ClassVar[str]  # of the architecture, in messages
    device: torch.device
    tokenizer: Any
    ids: Callable[[str], Sequence[int]]  # of a text
    stop: int  # the token that ends a turn
    language: Any  # a Language

    @abstractmethod
    def asked(self, context: Sequence[Segment]) -> list[Part]:
        """The conversation up to where a reply follows."""

    @abstractmethod
    def looked_at(self, segments: Sequence[Segment], drawn: bool) -> list[Run]:
        """Images as the language model sees them, when it is asked, or where another image is ``drawn`` after them."""

    @torch.no_grad()
    def write(self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]) -> list[Written]:
        """A reply to each context. Raises ValueError unless there are as many seeds."""
        if len(contexts) != len(seeds):
            raise ValueError(f"{len(contexts)} contexts and {len(seeds)} seeds")
        if not contexts:
            return []
        rows = self.decode_tokens(*self.read(contexts), decoding, seeds)
        return [Written(self.tokenizer.decode(row.ids), row.ids, torch.tensor(row.logprobs), row.ended) for row in rows]

    def decode_tokens(self, context: Context, states: Tensor, decoding: Decoding, seeds: Sequence[int]) -> list[Row]:
        """Tokens after each row, of which ``states`` (B, H) are the last; at most ``max_tokens`` - 1 of them."""
        texts = [Row([]) for _ in seeds]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows, alive, limit = list(range(len(texts))), set(range(len(texts))), decoding.max_tokens - 1
        for number in range(limit):
            logits = self.language.logits(states)
            token, logprob = pick(logits, decoding.temperature, [generators[i] for i in rows])
            for i, *chosen in zip(rows, token.tolist(), logprob.tolist(), strict=True):
                if i in alive:
                    go_on(texts[i], [chosen[0]], [chosen[1]], self.stop, limit)
                if texts[i].ended:
                    alive.discard(i)
            if not alive or number + 1 == limit:
                break
            if 2 * len(alive) <= len(rows):
                kept = [place for place, i in enumerate(rows) if i in alive]
                context, token, rows = context.select(kept), token[kept], [rows[place] for place in kept]
            states = self.language.step(context, token)[:, -1]
        return texts

    @torch.no_grad()
    def score(self, contexts: Sequence[Sequence[Segment]], continuations: Sequence[str]) -> list[Tensor]:
        """Per context (continuations,): the log-probability of each as the beginning of a reply, or as more of one that
        is begun: branches over their context, in one pass."""
        if not contexts:
            return []
        branches, language = [self.ids(text) for text in continuations], self.language
        context, states = self.read(contexts)

        def beside(texts: Sequence[Sequence[int]]) -> Tensor:
            hidden: Tensor = language.beside(context, [language.tokens(ids) for ids in texts])
            return hidden

        return list(branch_scores(language.logits, states, branches, beside).cpu())

    def read(self, contexts: Sequence[Sequence[Segment]]) -> tuple[Context, Tensor]:
        """Contexts up to their replies, or in them where these are begun, and the last hidden states (B, H).

        What contexts have in common up to their last image is read once.
        """
        language = self.language
        closed = [context[:-1] if context and context[-1].open else context for context in contexts]
        begun = [self.ids_of(context[-1]) if context and context[-1].open else () for context in contexts]
        asked = [self.asked(context) for context in closed]
        heads: dict[tuple[object, ...], list[Part]] = {}
        for parts in asked:
            heads.setdefault(_head(parts), parts[:-1])
        images = self._image_runs([part for parts in heads.values() for part in parts])
        context = language.empty(len(heads))
        before = Rows.of([joined(self._runs(parts, images)) for parts in heads.values()])
        if before.present.shape[1]:
            language.extend(context, before)
        place = {head: row for row, head in enumerate(heads)}
        context = context.select([place[_head(parts)] for parts in asked])
        tails = [
            language.tokens([*self.ids(parts[-1]), *start])  # type: ignore[arg-type]  # the last is a text
            for parts, start in zip(asked, begun, strict=True)
        ]
        for parts, count, tail in zip(asked, context.present.sum(1).tolist(), tails, strict=True):
            self._require_fit(parts, count + len(tail.inputs))
        return context, language.extend(context, Rows.of(tails))[:, -1]

    def _image_runs(self, parts: Sequence[Part], drawn: bool = False) -> dict[int, Run]:
        """Each image as the language model sees it, by the identity of its segment; each is looked at once."""
        distinct = list({id(part): part for part in parts if isinstance(part, Segment)}.values())
        runs = self.looked_at(distinct, drawn)
        return {id(segment): run for segment, run in zip(distinct, runs, strict=True)}

    def _runs(self, parts: Sequence[Part], images: Mapping[int, Run]) -> list[Run]:
        none = self.language.tokens([])
        return [none, *(self.language.tokens(self.ids(p)) if isinstance(p, str) else images[id(p)] for p in parts)]

    def text_of(self, segment: Segment) -> str:
        """Of a text segment. Raises ValueError for one without text and ids."""
        if segment.text is None and segment.ids is None:
            raise ValueError("a text segment needs a text or ids")
        return self.tokenizer.decode(segment.ids) if segment.text is None else segment.text

    def ids_of(self, segment: Segment) -> Sequence[int]:
        """Of a text segment, as they were sampled where it has them."""
        return self.ids(self.text_of(segment)) if segment.ids is None else segment.ids

    def _require_fit(self, parts: Sequence[Part], tokens: int) -> None:
        """Raises ModelError for a conversation that is longer than what the language model was made for."""
        if tokens > (limit := self.language.text.config.max_position_embeddings):
            text = " ".join(part for part in parts if isinstance(part, str))
            raise ModelError(f"{tokens} tokens are beyond the {limit} that {self.name} reads: {text[:200]!r} ...")


def _head(parts: Sequence[Part]) -> tuple[object, ...]:
    """What stands before the last text of a conversation; images by their identity."""
    return tuple(part if isinstance(part, str) else id(part) for part in parts[:-1])


def image_of(segment: Segment) -> Image:
    """Of a segment that is seen. Raises ValueError where it is a file, or there is none."""
    if segment.image is None or isinstance(segment.image, Path | Tensor):
        raise ValueError(f"a seen segment needs an image, got {segment.image}")
    return segment.image
