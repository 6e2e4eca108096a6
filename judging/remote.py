"""A judge on a server that speaks OpenAI's chat completions: vLLM and vLLM-Omni, SGLang, llama.cpp, OpenAI.

What concerns one question (its image is refused, the server breaks on it, it takes too long) is a ``NoReply``; what
concerns all of them (wrong address, key or model) is a ``ServerError``, which ends the stage and leaves what is done.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, IncompleteRead
from typing import Any
from urllib.error import URLError
from urllib.request import HTTPErrorProcessor, Request, build_opener

import torch
from PIL.Image import Image

from judging.base import NoReply
from srum.errors import SrumError
from srum.models.base import Decoding, Segment, Written

OURS = (401, 403, 404)  # statuses that no other question could change
PASSING = (408, 429)  # statuses, beside those from 500, that another try may change
LONGEST = 10_000_000  # bytes of a response that are read


class ServerError(SrumError, OSError):
    """A server that cannot be used as configured; the message is one line."""


class Server:
    """Replies by POST to ``url``/chat/completions, ``concurrency`` at a time. Meets ``Writer``.

    ``model`` is its name there. The key is in the environment variable ``key_variable``, where the server wants one; it
    is sent to that address alone, redirections are not followed. ``timeout``: seconds without a byte. A request that
    fails in passing is sent up to ``retries`` more times, after ``backoff`` seconds, then twice as many, and so on.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        backoff: float = 1.0,
    ) -> None:
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
        self.timeout, self.retries, self.concurrency, self.backoff = timeout, retries, concurrency, backoff
        self._opener = build_opener(_AnyStatus)

    def write(
        self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]
    ) -> list[Written | NoReply]:
        """A reply to each context of images and texts, without ids and log-probabilities. Raises ServerError;
        ValueError for a segment that a server does not take."""
        seen = {id(s): s for context in contexts for s in context if s.kind == "seen"}
        uris = {name: _data_uri(segment) for name, segment in seen.items()}
        asked = [[_part(segment, uris) for segment in context] for context in contexts]
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda content, seed: self._ask(content, decoding, seed), asked, seeds))

    def _ask(self, content: list[dict[str, Any]], decoding: Decoding, seed: int) -> Written | NoReply:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": decoding.max_tokens,
            "temperature": decoding.temperature,
            "seed": seed % 2**31,  # some servers hold it in 32 bits
        }
        for attempt in range(self.retries + 1):
            if attempt > 0:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                status, response = self._post(json.dumps(body).encode())
            except URLError as error:
                if attempt == self.retries:
                    raise ServerError(f"{self.url} cannot be reached: {error.reason}") from None
            except (HTTPException, OSError) as error:  # broken off, or silent for too long
                failed = NoReply(f"{type(error).__name__}: {error}")
            else:
                if status < 300:
                    return _content(response)
                if status in OURS or status < 400:
                    raise ServerError(f"{self.url}: HTTP {status} for model {self.model!r}")
                failed = NoReply(f"HTTP {status}: {response[:200].decode(errors='replace')}")
                if status not in PASSING and status < 500:
                    break
        return failed

    def _post(self, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(f"{self.url}/chat/completions", data=body, headers=headers)
        with self._opener.open(request, timeout=self.timeout) as response:
            body = response.read(LONGEST)
            if response.length:  # a reading with a limit does not raise by itself
                raise IncompleteRead(body, response.length)
            return response.status, body


class _AnyStatus(HTTPErrorProcessor):
    """Responses as they are: no status raises, and no redirection takes the key elsewhere."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


def _content(response: bytes) -> Written | NoReply:
    """The text of a chat completion; an empty one where the server has sent null."""
    try:
        choice = json.loads(response)["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return NoReply(f"not a chat completion: {response[:200].decode(errors='replace')}")
    return Written(content if isinstance(content, str) else "", (), torch.zeros(0), reason != "length")


def _part(segment: Segment, uris: Mapping[int, str]) -> dict[str, Any]:
    """A segment as a part of a message."""
    if segment.open:
        raise ValueError("a server begins its replies itself: an open text is not supported")
    if segment.kind == "seen":
        return {"type": "image_url", "image_url": {"url": uris[id(segment)]}}
    if segment.kind != "text" or segment.text is None:
        raise ValueError(f"a server takes texts in words and seen images, no {segment.kind} segment such as this")
    return {"type": "text", "text": segment.text}


def _data_uri(segment: Segment) -> str:
    if not isinstance(segment.image, Image):
        raise ValueError("a server takes images as they are, no pixels")
    data = io.BytesIO()
    segment.image.convert("RGB").save(data, format="png")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
