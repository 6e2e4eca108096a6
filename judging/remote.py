"""A judge on a server that speaks OpenAI's chat completions (``srum.exchange.chat``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image

from srum.exchange import chat
from srum.exchange.chat import Ask, NoReply, Reply, ServerError
from srum.models.base import Decoding, Segment, Written

__all__ = ["Server", "ServerError"]


class Server:
    """Replies of a server, whose settings are those of ``srum.exchange.chat.Server``. Meets ``Writer``."""

    def __init__(self, url: str, model: str, **options: Any) -> None:
        self.server = chat.Server(url, model, **options)

    def write(
        self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]
    ) -> list[Written | NoReply]:
        """A reply to each context of images and texts, without ids and log-probabilities. Raises ServerError;
        ValueError for a segment that a server does not take."""
        seen = {id(s): s for context in contexts for s in context if s.kind == "seen"}
        shown = {name: chat.user(_image(segment))["content"] for name, segment in seen.items()}
        asked = [
            Ask([_message(context, shown)], decoding.max_tokens, decoding.temperature, seed)
            for context, seed in zip(contexts, seeds, strict=True)
        ]
        return [_written(reply) for reply in self.server.ask_all(asked)]


def _written(reply: Reply | NoReply) -> Written | NoReply:
    """The reply with the thought that came apart from it before it, as models write thoughts."""
    if isinstance(reply, NoReply):
        return reply
    text = reply.text
    if reply.thought:
        text = f"<think>{reply.thought}" + (f"</think>\n{text}" if text or not reply.cut else "")
    return Written(text, (), torch.zeros(0), not reply.cut)


def _message(context: Sequence[Segment], shown: Mapping[int, list[chat.Message]]) -> chat.Message:
    parts = [shown[id(s)] if s.kind == "seen" else chat.user(_text(s))["content"] for s in context]
    return {"role": "user", "content": [part for several in parts for part in several]}


def _text(segment: Segment) -> str:
    if segment.open:
        raise ValueError("a server begins its replies itself: an open text is not supported")
    if segment.kind != "text" or segment.text is None:
        raise ValueError(f"a server takes texts in words and seen images, no {segment.kind} segment such as this")
    return segment.text


def _image(segment: Segment) -> Image:
    if not isinstance(segment.image, Image):
        raise ValueError("a server takes images as they are, no pixels")
    return segment.image
