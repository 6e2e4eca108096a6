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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, IncompleteRead
from typing import Any
from urllib.error import URLError
from urllib.request import HTTPErrorProcessor, Request, build_opener

from PIL.Image import Image

from judging.base import NoReply
from srum.errors import SrumError
from srum.models.base import Decoding, Question

OURS = (401, 403, 404)  # statuses that no other question could change
PASSING = (408, 429)  # statuses, beside those from 500, that another try may change
LONGEST = 10_000_000  # bytes of a response that are read


class ServerError(SrumError, OSError):
    """A server that cannot be used as configured; the message is one line."""


class Server:
    """Answers questions by POST to ``url``/chat/completions, ``concurrency`` at a time. Meets ``Answerer``.

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

    def answer(
        self, images: Sequence[Image], questions: Sequence[Sequence[Question]], decoding: Decoding
    ) -> list[list[str | NoReply]]:
        """Replies, ``[i][j]`` to question j about image i. Raises ServerError; ValueError for a reply prefix."""
        if any(question.reply_prefix for own in questions for question in own):
            raise ValueError("a server begins its replies itself: reply prefixes are not supported")
        shown = [_data_uri(image) for image in images]
        asked = [(uri, question.text) for uri, own in zip(shown, questions, strict=True) for question in own]
        with ThreadPoolExecutor(self.concurrency) as pool:
            replies = iter(list(pool.map(lambda pair: self._ask(pair[0], pair[1], decoding), asked)))
        return [[next(replies) for _ in own] for own in questions]

    def _ask(self, uri: str, text: str, decoding: Decoding) -> str | NoReply:
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": text}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": decoding.max_tokens,
            "temperature": decoding.temperature,
            "seed": decoding.seed % 2**31,  # some servers hold it in 32 bits
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


def _content(response: bytes) -> str | NoReply:
    """The text of a chat completion; an empty one where the server has sent null."""
    try:
        content = json.loads(response)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return NoReply(f"not a chat completion: {response[:200].decode(errors='replace')}")
    return content if isinstance(content, str) else ""


def _data_uri(image: Image) -> str:
    data = io.BytesIO()
    image.convert("RGB").save(data, format="png")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
