"""A client of OpenAI's protocol: chat completions for judges and evaluators, images for rollout. Servers that speak it
are vLLM and vLLM-Omni, SGLang, llama.cpp, OpenAI's own, and ``srum serve``.

What concerns one question (its image is refused, the server breaks on it, it takes too long) is a ``NoReply``; what
concerns all of them (wrong address, key or model, every question refused) is a ``ServerError``.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage, IncompleteRead
from pathlib import Path
from threading import get_ident
from typing import Any, TypeVar
from urllib.error import URLError
from urllib.request import HTTPErrorProcessor, Request, build_opener

from PIL.Image import Image

from srum.disk import writing
from srum.errors import SrumError
from srum.images import ImageError, data_uri, read_image
from srum.json_files import as_unicode

OURS = (401, 403, 404)  # statuses that no other question could change
PASSING = (408, 429)  # statuses, beside those from 500, that another try may change
HUNG_UP = (BrokenPipeError, ConnectionResetError)  # what sending ends in where a proxy refuses a body half read
LONGEST = 64_000_000  # bytes of a response that are read
LONGEST_WAIT = 600.0  # seconds that a server may ask to be left alone

T = TypeVar("T")
R = TypeVar("R")
Part = str | Image
Message = dict[str, Any]


class ServerError(SrumError, OSError):
    """A server that cannot be used as configured; the message is one line."""


@dataclass(frozen=True)
class NoReply:
    """In place of a reply that never came, and why. ``busy``: another day may bring one."""

    why: str
    busy: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Reply:
    """The text of a completion, the thought that came apart from it, and whether the limit of tokens ``cut`` it off."""

    text: str
    thought: str = ""
    cut: bool = False


@dataclass(frozen=True)
class Ask:
    """One question: messages in order (:func:`system`, :func:`user`, :func:`assistant`) and how to decode."""

    messages: Sequence[Message]
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Wish:
    """One image that is wanted: of a prompt, of (H, W) pixels, from a seed; ``fields`` go beside OpenAI's."""

    prompt: str
    size: tuple[int, int]
    seed: int
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """An image in RGB, and the text that the server wrote before it drew, where it says so (``revised_prompt``)."""

    image: Image
    text: str | None = None


def system(text: str) -> Message:
    """The message that goes before all others."""
    return {"role": "system", "content": text}


def assistant(text: str) -> Message:
    """An earlier reply, as a turn of the conversation."""
    return {"role": "assistant", "content": text}


def user(*parts: Part) -> Message:
    """Texts and images in this order; images go as PNG."""
    return {"role": "user", "content": [_part(part) for part in parts]}


class Server:
    """Replies by POST to ``url``/chat/completions, images by ``url``/images/generations, ``concurrency`` at a time.

    ``model`` is its name there. The key is in the environment variable ``key_variable``, where the server wants one; it
    is sent to that address alone, redirections are not followed. ``timeout``: seconds without a byte. A request that
    fails in passing is sent up to ``retries`` more times, after ``backoff`` seconds, then twice as many, and so on, or
    after as many as the server's Retry-After says. ``token_limit`` is what the server calls the limit of tokens;
    ``extra`` are further fields of every request; one that is None leaves a field of ours out. Replies at temperature 0
    are kept in ``cache`` by what was asked.
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
        token_limit: str = "max_tokens",
        extra: Mapping[str, Any] | None = None,
        cache: Path | None = None,
    ) -> None:
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
        self.timeout, self.retries, self.concurrency, self.backoff = timeout, retries, concurrency, backoff
        self.token_limit, self.extra, self.cache = token_limit, dict(extra or {}), cache
        self.answered = False  # any question so far
        self._opener = build_opener(_AnyStatus)

    def ask(self, question: Ask) -> Reply | NoReply:
        """The reply to one question. Raises ServerError."""
        body = self._body(
            {
                "messages": list(question.messages),
                self.token_limit: question.max_tokens,
                "temperature": question.temperature,
                "seed": question.seed % 2**31,  # some servers hold it in 32 bits
            }
        )
        kept = self._kept_at(body) if question.temperature == 0 else None
        if kept and (known := _read_kept(kept)):
            return known
        reply = self._sent("chat/completions", body, _content)
        if isinstance(reply, Reply) and kept:
            _keep(kept, reply)
        return reply

    def ask_all(self, questions: Sequence[Ask]) -> list[Reply | NoReply]:
        """The replies in the order of the questions. Raises ServerError, also where the server has answered nothing
        yet and refuses each of several questions."""
        return self._all(self.ask, questions)

    def draw(self, wish: Wish) -> Picture | NoReply:
        """The image that is wished for, of whatever size the server makes it. Raises ServerError."""
        height, width = wish.size
        asked = {"prompt": wish.prompt, "n": 1, "size": f"{width}x{height}", "response_format": "b64_json"}
        body = self._body(asked | {"seed": wish.seed} | dict(wish.fields))
        return self._sent("images/generations", body, _picture)

    def draw_all(self, wishes: Sequence[Wish]) -> list[Picture | NoReply]:
        """The images in the order of the wishes. Raises ServerError as ``ask_all`` does."""
        return self._all(self.draw, wishes)

    def _all(self, one: Callable[[T], R | NoReply], wanted: Sequence[T]) -> list[R | NoReply]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            replies = list(pool.map(one, wanted))
        refused = [reply.why for reply in replies if isinstance(reply, NoReply) and reply.why.startswith("HTTP")]
        if len(wanted) > 1 and len(refused) == len(wanted) and not self.answered:
            raise ServerError(f"{self.url} refused all of {len(refused)} questions: {' '.join(refused[0].split())}")
        return replies

    def _body(self, fields: Mapping[str, Any]) -> bytes:
        wanted = {"model": self.model, **fields} | self.extra
        return json.dumps({name: value for name, value in wanted.items() if value is not None}).encode()

    def _sent(self, path: str, body: bytes, read: Callable[[bytes], R | NoReply]) -> R | NoReply:
        wait = 0.0
        for attempt in range(self.retries + 1):
            time.sleep(wait)
            wait = self.backoff * 2**attempt
            try:
                status, headers, response = self._post(path, body)
            except (HTTPException, OSError) as error:  # broken off, or silent for too long
                reason = error.reason if isinstance(error, URLError) else error
                unreachable = isinstance(error, URLError) and not isinstance(reason, HUNG_UP)
                if unreachable and attempt == self.retries:
                    raise ServerError(f"{self.url} cannot be reached: {reason}") from None
                failed = NoReply(f"{type(reason).__name__}: {reason}", busy=True)
            else:
                if status < 300:
                    reply = read(response)
                    self.answered |= not isinstance(reply, NoReply)
                    return reply
                if status in OURS or status < 400:
                    raise ServerError(f"{self.url}: HTTP {status} for model {self.model!r}")
                passing = status in PASSING or status >= 500
                failed = NoReply(f"HTTP {status}: {response[:200].decode(errors='replace')}", busy=passing)
                if not passing:
                    break
                wait = max(wait, _retry_after(headers))
        return failed

    def _post(self, path: str, body: bytes) -> tuple[int, HTTPMessage, bytes]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(f"{self.url}/{path}", data=body, headers=headers)
        with self._opener.open(request, timeout=self.timeout) as response:
            body = response.read(LONGEST)
            if response.length:  # a reading with a limit does not raise by itself
                raise IncompleteRead(body, response.length)
            return response.status, response.headers, body

    def _kept_at(self, body: bytes) -> Path | None:
        name = hashlib.sha256(self.url.encode() + b"\n" + body).hexdigest()
        return self.cache / name[:2] / f"{name}.json" if self.cache else None


class _AnyStatus(HTTPErrorProcessor):
    """Responses as they are: no status raises, and no redirection takes the key elsewhere."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


def _retry_after(headers: HTTPMessage) -> float:
    """The seconds that the server asks for, as a number or a date; 0 where it says nothing that can be read."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT) if seconds == seconds else 0.0


def _content(response: bytes) -> Reply | NoReply:
    """The text of a chat completion, in one piece or in parts; an empty one where the server has sent null."""
    try:
        choice = json.loads(response)["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        content = message["content"]
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return NoReply(f"not a chat completion: {response[:200].decode(errors='replace')}")
    text, thought = (as_unicode(part) if isinstance(part, str) else "" for part in (content, thought))
    return Reply(text, thought, reason == "length")


def _picture(response: bytes) -> Picture | NoReply:
    """The image of a response, which is in it as base64: addresses elsewhere are not followed."""
    try:
        data = json.loads(response)["data"][0]
        content, text = base64.b64decode(data["b64_json"], validate=True), data.get("revised_prompt")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return NoReply(f"no image in base64: {response[:200].decode(errors='replace')}")
    try:
        image = read_image(io.BytesIO(content), "the reply")
    except ImageError as error:
        return NoReply(str(error))
    return Picture(image, as_unicode(text) if isinstance(text, str) else None)


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": data_uri(part.convert("RGB"))}}


def _read_kept(path: Path) -> Reply | None:
    try:
        return Reply(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none yet, or one that a full disk has cut
        return None


def _keep(path: Path, reply: Reply) -> None:
    partial = path.with_name(f".{os.getpid()}-{get_ident()}-{path.name}")  # of this thread alone
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(vars(reply)), encoding="utf-8")
        partial.replace(path)
