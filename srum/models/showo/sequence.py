"""Texts and images as rows of tokens, and which token sees which (docs/specs/showo.md, 7 and 8).

    drawing           [t2i] bos text eos  [soi] image [eoi]
    after an image    [mmu] [soi] ids [eoi] bos text eos  [soi] image [eoi]                                    (ids)
                      [mmu] [soi] features [eoi] bos text eos [PAD]...  [soi] image [eoi]                 (features)
    answering         [mmu] [soi] ids [eoi]  bos "USER: \\n" question " ASSISTANT:"                             (ids)
                      [mmu] system [soi] features [eoi]  "USER: " question " ASSISTANT:"                  (features)

Positions count from 0, padding included. All rows but those that are said to see more see what is before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from srum.errors import ModelError
from srum.models.showo.config import ShowoConfig

BOS = "<|endoftext|>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATE = "USER: \n {} ASSISTANT:"  # of what is said of an image that another is drawn after
QUESTIONS = {False: "USER: \n{} ASSISTANT:", True: "USER: {} ASSISTANT:"}  # by whether an image is seen as features


@dataclass(frozen=True)
class Span:
    """Tokens that are seen alike: ``ids`` of the vocabulary, or ``features`` (L, C) of an image in their place.

    ``everyone``: every row sees them, also those before; ``whole``: they see one another; ``unseen``: nobody does.
    """

    ids: Sequence[int] = ()
    features: Tensor | None = None
    everyone: bool = False
    whole: bool = False
    unseen: bool = False

    def __len__(self) -> int:
        return len(self.ids) if self.features is None else len(self.features)


@dataclass(frozen=True)
class Row:
    """Spans one after the other; ``image``: where the ids of what is drawn begin."""

    spans: Sequence[Span]
    image: int = 0
    length: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", sum(map(len, self.spans)))

    def ids(self) -> Tensor:
        """(L,) with 0 where features stand."""
        return torch.tensor([i for span in self.spans for i in (span.ids or [0] * len(span))], dtype=torch.long)

    def visible(self) -> Tensor:
        """(L, L) bool: what the token of each line sees."""
        lengths = torch.tensor([len(span) for span in self.spans], dtype=torch.long)
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        everyone, whole, unseen = (
            torch.tensor([getattr(span, name) for span in self.spans], dtype=torch.bool)[owner]
            for name in ("everyone", "whole", "unseen")
        )
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        among = (owner[:, None] == owner) & whole
        return (causal | everyone | among) & ~unseen


class Layout:
    """Rows of a checkpoint's kind, by its tokenizer's ``encode``, whose id ``bos`` begins and ends a text."""

    def __init__(self, config: ShowoConfig, encode: Callable[[str], Sequence[int]], bos: int) -> None:
        self.config, self.encode, self.bos = config, encode, bos
        self.soi, self.eoi, self.t2i, self.mmu, self.pad = (
            config.special(name) for name in ("<|soi|>", "<|eoi|>", "<|t2i|>", "<|mmu|>", "[PAD]")
        )

    def begun(self, text: str) -> list[int]:
        """Its ids behind bos, which is not put twice."""
        ids = list(self.encode(text))
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]

    def codes(self, ids: Tensor) -> list[int]:
        """Image ids as ids of the vocabulary."""
        return [self.config.first_code + code for code in ids.flatten().tolist()]

    def seen(self, ids: Tensor) -> Span:
        """An image as understanding has it, by its own ids."""
        return Span(self.codes(ids))

    def drawing(self, text: str | None, image: Sequence[int], seen: Span | None = None) -> Row:
        """What an image is drawn in after a text, or none, and after another image where one is seen. A prompt that is
        too long is cut, as in the reference. Raises ModelError for what is too long beside an image."""
        before = [Span(self._prompt(text or ""))] if seen is None else self._seen_and_said(seen, text)
        if seen is None or seen.features is None:
            after = [Span([self.soi, *image, self.eoi], whole=True)]
        else:
            after = [Span([self.soi]), Span(image, whole=True), Span([self.eoi])]
        return _within(self.config, Row([*before, *after], sum(map(len, before)) + 1))

    def _prompt(self, text: str) -> list[int]:
        ids = [self.t2i, *self.begun(text), self.bos]
        return ids if len(ids) <= self.config.longest + 1 else [*ids[: self.config.longest], self.bos]

    def _seen_and_said(self, seen: Span, text: str | None) -> list[Span]:
        said = [*self.begun("" if text is None else TEMPLATE.format(text)), self.bos]
        if seen.features is None:
            return [Span([self.mmu]), Span([self.soi, *seen.ids, self.eoi], whole=True), Span(said)]
        if (room := self.config.condition - 3 - len(said)) < 0:
            raise ModelError(
                f"a text of {len(said)} tokens beside an image, {len(said) + room} have room: {(text or '')[:60]!r}"
            )
        before = [Span([self.mmu, self.soi]), Span(features=seen.features, everyone=True)]
        return [*before, Span([self.eoi, *said]), Span([self.pad] * room, unseen=True)]

    def shown(self, seen: Span | None) -> Row:
        """What stands before a question: the image, as all that follows sees it."""
        if seen is None:
            return Row([])
        if seen.features is None:
            return Row([Span([self.mmu, self.soi, *seen.ids, self.eoi], everyone=True)])
        before = Span([self.mmu, *self.encode(SYSTEM), self.soi])
        return Row([before, Span(features=seen.features, everyone=True), Span([self.eoi])])

    def question(self, text: str, seen: Span | None) -> list[int]:
        """The ids of a question, up to where the answer begins."""
        by_features = seen is not None and seen.features is not None
        asked = QUESTIONS[by_features].format(text)
        return list(self.encode(asked)) if by_features else self.begun(asked)

    def answered(self, text: str, seen: Span | None, reply: Sequence[int]) -> Row:
        """A question and its reply, with its end."""
        row = Row([*self.shown(seen).spans, Span([*self.question(text, seen), *reply, self.bos])])
        return _within(self.config, row)


def _within(config: ShowoConfig, row: Row) -> Row:
    """Raises ModelError for a row beyond the context."""
    if row.length > (most := config.phi.max_position_embeddings):
        raise ModelError(f"{row.length} tokens in a row: Show-o's context has {most}")
    return row
