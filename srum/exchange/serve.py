"""A server around a loaded model that speaks OpenAI's protocol: chat completions with images, images/generations and
images/edits, so that evaluators, a second machine's judge, or any client can use it.

Requests wait in a line; one thread works at the model and takes those that are alike together. Replies and images are
those of ``write`` and ``draw`` for the same contexts and seeds, but for the rounding of a batch of another size.
"""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from email import policy
from email.parser import BytesParser
from hashlib import sha256
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from PIL import Image

from srum.config import ConfigError
from srum.drawing import checked_sampling, draw_planned
from srum.errors import SrumError
from srum.images import ImageError, as_bytes, to_rgb
from srum.json_files import as_unicode
from srum.models.base import Decoding, MissingAbility, Sampling, Segment, UnifiedModel, to_edit

STEPS = 1000  # timesteps of an image
SEEDS = 2**63
DIGITS = re.compile(r"[0-9]{1,19}")


class ServeError(SrumError, ValueError):
    """A server that cannot be started so; the message is one line."""


class Refused(Exception):
    """A request that is answered by a ``status`` and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how many may wait."""

    body: int = 64_000_000  # bytes
    images: int = 16  # that a request shows or asks for
    pixels: int = 2**24  # of an image
    tokens: int = 4096  # of a reply
    kept: int = 2**28  # bytes of the images that were shown last
    waiting: int = 256
    batch: int = 16  # requests that are worked at together
    seconds: float = 60.0  # without a byte from a client


# --- the line


@dataclass(eq=False)
class Job:
    """One reply or image that is wanted: ``alike`` says with which others it is made in one call."""

    alike: Any
    seed: int
    context: Sequence[Segment] = ()  # of a reply or an edit
    size: tuple[int, int] | None = None  # of an edit
    prompt: str = ""  # of an image that is drawn
    plan_seed: int | None = None  # where that is after a plan
    result: Future[Any] = field(default_factory=Future)


class Line:
    """The jobs that wait for the model, and the thread that works at them."""

    def __init__(self, model: UnifiedModel, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def add(self, jobs: Sequence[Job]) -> list[Any]:
        """The results of these jobs, once they are there. Raises Refused where too many wait, and what they raise."""
        with self._changed:
            if not self._open:
                raise Refused(503, "the server is stopping")
            if len(self._jobs) + len(jobs) > self.limits.waiting:
                raise Refused(429, f"{len(self._jobs)} requests are waiting")
            self._jobs += jobs
            self._changed.notify()
        return [job.result.result() for job in jobs]

    def close(self) -> None:
        """Finish the jobs that wait, and take no more."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._worker.join()

    def _work(self) -> None:
        while jobs := self._next():
            try:
                results = list(zip(jobs, self._done(jobs), strict=True))
            except Exception as error:  # one of them may spoil it for the others
                if len(jobs) == 1:
                    jobs[0].result.set_exception(error)
                    continue
                for job in jobs:
                    self._alone(job)
            else:
                for job, result in results:
                    job.result.set_result(result)

    def _alone(self, job: Job) -> None:
        try:
            (result,) = self._done([job])
            job.result.set_result(result)
        except Exception as error:  # is raised in the thread that asked
            job.result.set_exception(error)

    def _next(self) -> list[Job]:
        """The job that has waited longest, and those that are alike; none once the line is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or not self._open)
            if not self._jobs:
                return []
            alike = [job for job in self._jobs if job.alike == self._jobs[0].alike][: self.limits.batch]
            self._jobs = deque(job for job in self._jobs if job not in alike)
            return alike

    def _done(self, jobs: Sequence[Job]) -> Sequence[Any]:
        kind, settings = jobs[0].alike
        contexts, seeds = [job.context for job in jobs], [job.seed for job in jobs]
        if kind == "write":
            return self.model.write(contexts, settings, seeds)
        if kind == "draw":
            prompts, plan_seeds = [job.prompt for job in jobs], [job.plan_seed for job in jobs]
            made = draw_planned(self.model, prompts, settings, seeds, plan_seeds)
            return [(one.image, plan) for one, plan in made]
        sizes = [job.size or settings.size for job in jobs]
        return [(one.image, None) for one in self.model.draw(contexts, settings, seeds, sizes=sizes)]


# --- requests


class Shown:
    """What ``look`` makes of an image's address, one segment per image, so that what it costs is shared.

    Those used last are kept, as long as their pixels take no more than ``most`` bytes. Threads may call it.
    """

    def __init__(self, look: Callable[[str], Segment], most: int) -> None:
        self._look, self._most = look, most
        self._kept: dict[bytes, Segment] = {}  # by the hash of the address, which holds the whole file; oldest first
        self._lock = threading.Lock()

    def __call__(self, url: str) -> Segment:
        key = sha256(url.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            known = self._kept.pop(key, None)
            if known is not None:
                self._kept[key] = known
                return known
        segment = self._look(url)
        with self._lock:
            segment = self._kept.setdefault(key, segment)
            while sum(map(_bytes, self._kept.values())) > self._most:
                del self._kept[next(iter(self._kept))]
        return segment


def _bytes(segment: Segment) -> int:
    image = segment.image
    return 3 * image.width * image.height if isinstance(image, Image.Image) else 0


class Service:
    """Answers requests with a model, called ``name``."""

    def __init__(self, model: UnifiedModel, name: str, limits: Limits | None = None) -> None:
        self.model, self.name, self.limits = model, name, limits or Limits()
        self.line = Line(model, self.limits)
        self._seen = Shown(lambda url: Segment("seen", image=self._picture(url)), self.limits.kept)

    def answer(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The response to a POST. Raises Refused."""
        work = {
            "/v1/chat/completions": self.chat,
            "/v1/images/generations": self.generate,
            "/v1/images/edits": self.edit,
        }.get(path)
        if work is None:
            raise Refused(404, f"no {path} here")
        try:
            return work(body)
        except (MissingAbility, ImageError) as error:
            raise Refused(400, str(error)) from None

    def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A chat completion."""
        if body.get("stream") or body.get("n") not in (None, 1):
            raise Refused(400, "one reply at a time, in one piece: no stream, no n")
        messages = _typed(body, "messages", list, None)
        if not messages:
            raise Refused(400, "messages: there are none")
        context = [segment for message in messages for segment in self._segments(message)]
        if sum(segment.kind == "seen" for segment in context) > self.limits.images:
            raise Refused(400, f"more than {self.limits.images} images")
        limit = _typed(body, "max_completion_tokens", int, None) or _typed(body, "max_tokens", int, 256)
        if not 1 <= limit <= self.limits.tokens:
            raise Refused(400, f"max_tokens: 1 to {self.limits.tokens}")
        temperature = float(_typed(body, "temperature", (int, float), 1.0))
        if not 0 <= temperature <= 10:
            raise Refused(400, "temperature: 0 to 10")
        decoding = Decoding(max_tokens=limit, temperature=temperature)
        (written,) = self.line.add([Job(("write", decoding), _seed(body), context)])
        text, reason = as_unicode(written.text), "stop" if written.ended else "length"
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 0, "completion_tokens": len(written.ids), "total_tokens": len(written.ids)}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return {"id": "chat", "object": "chat.completion", "created": 0, "model": self.name} | {
            "choices": [choice],
            "usage": usage,
        }

    def generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Images of a prompt; beside OpenAI's fields ``seed``, ``plan``, ``plan_seed`` (default: the image's) and those
        of ``Sampling``. A plan is in the response as ``revised_prompt``."""
        sampling, prompt = self._sampling(body), _text(body, "prompt")
        try:
            self.model.latent_grid(sampling.size)
        except ValueError as error:
            raise Refused(400, f"size: {error}") from None
        seeds = self._seeds(body)
        planned, first = _typed(body, "plan", bool, False), _seed(body, "plan_seed", seeds[0])
        jobs = [
            Job(("draw", sampling), seed, prompt=prompt, plan_seed=first + k if planned else None)
            for k, seed in enumerate(seeds)
        ]
        return self._drawn(body, jobs)

    def edit(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """An image, changed as the prompt says; it keeps the size at which the model sees it."""
        sampling, prompt = self._sampling(body), _text(body, "prompt")
        shown = body.get("image")
        images = shown if isinstance(shown, list) else [shown]
        if len(images) != 1 or not isinstance(images[0], (str, bytes)):
            raise Refused(400, "image: one image is changed at a time")
        begun, size = to_edit(self.model, self._picture(images[0]))
        context = [*begun, Segment("text", text=prompt, droppable=True)]
        return self._drawn(body, [Job(("edit", sampling), seed, context, size) for seed in self._seeds(body)])

    def _drawn(self, body: Mapping[str, Any], jobs: list[Job]) -> dict[str, Any]:
        if body.get("response_format") not in (None, "b64_json"):
            raise Refused(400, "response_format: b64_json alone")
        made = self.line.add(jobs)
        data = [
            {"b64_json": base64.b64encode(as_bytes(image)).decode()} | ({"revised_prompt": plan} if plan else {})
            for image, plan in made
        ]
        return {"created": 0, "data": data}

    def _seeds(self, body: Mapping[str, Any]) -> list[int]:
        count = _number(body, "n", 1)
        if not 1 <= count <= self.limits.images:
            raise Refused(400, f"n: 1 to {self.limits.images}")
        return [_seed(body) + index for index in range(count)]

    def _sampling(self, body: Mapping[str, Any]) -> Sampling:
        known = asdict(Sampling())
        values = known | {name: body[name] for name in known if name in body and name != "size"}
        if (size := body.get("size", "auto")) != "auto":
            values["size"] = _size(size)
        try:
            sampling = checked_sampling(values)
        except ConfigError as error:
            raise Refused(400, str(error)) from None
        if sampling.size[0] * sampling.size[1] > self.limits.pixels or sampling.timesteps > STEPS:
            raise Refused(400, f"at most {self.limits.pixels} pixels and {STEPS} timesteps")
        return sampling

    def _segments(self, message: Any) -> list[Segment]:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            return [Segment("text", text=as_unicode(content))]
        if not isinstance(content, list):
            raise Refused(400, "messages: a message has no content")
        return [self._segment(part) for part in content]

    def _segment(self, part: Any) -> Segment:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return Segment("text", text=as_unicode(part["text"]))
        url = part.get("image_url") if kind == "image_url" else None
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise Refused(400, "messages: parts are texts and image_url")
        return self._seen(url)

    def _picture(self, data: str | bytes) -> Image.Image:
        """The image of a data address, or of a file's bytes; addresses elsewhere are not followed."""
        if isinstance(data, str):
            head, _, encoded = data.partition(",")
            if not head.startswith("data:image/") or not head.endswith(";base64"):
                raise Refused(400, "an image is sent as data:image/png;base64,...")
            try:
                data = base64.b64decode(encoded, validate=True)
            except ValueError as error:  # binascii's among them
                raise Refused(400, f"an image is no base64: {error}") from None
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > self.limits.pixels:
                    raise Refused(400, f"an image has more than {self.limits.pixels} pixels")
                return to_rgb(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise Refused(400, f"an image cannot be read: {error}") from None


def _typed(body: Mapping[str, Any], name: str, kind: Any, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Refused(400, f"{name}: {value!r:.80} is not what is expected")
    return value


def _number(body: Mapping[str, Any], name: str, default: int) -> int:
    """An integer, which a form writes as text."""
    value = body.get(name)
    return int(value) if isinstance(value, str) and DIGITS.fullmatch(value) else int(_typed(body, name, int, default))


def _seed(body: Mapping[str, Any], name: str = "seed", default: int = 0) -> int:
    seed = _number(body, name, default)
    if not 0 <= seed < SEEDS:
        raise Refused(400, f"{name}: 0 to {SEEDS - 1}")
    return seed


def _text(body: Mapping[str, Any], name: str) -> str:
    text = _typed(body, name, str, "")
    if not text.strip():
        raise Refused(400, f"{name}: a text is needed")
    return as_unicode(text)


def _size(size: Any) -> tuple[int, int]:
    """(H, W) of WIDTHxHEIGHT."""
    width, _, height = str(size).partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(width + height) <= 12):
        raise Refused(400, f"size: {size!r:.40} is not like 1024x1024")
    return int(height), int(width)


def _form(kind: str, content: bytes) -> dict[str, Any]:
    """The fields of a form with files, as clients send images/edits; what is there more than once is a list."""
    message = BytesParser(policy=policy.HTTP).parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + content)
    if not message.is_multipart():
        raise Refused(400, "the form has no parts")
    fields: dict[str, list[Any]] = {}
    for part in message.iter_parts():
        name = str(part.get_param("name", "", header="content-disposition")).removesuffix("[]")
        payload = part.get_payload(decode=True) or b""
        assert isinstance(payload, bytes)
        fields.setdefault(name, []).append(payload if part.get_filename() else payload.decode("utf-8", "replace"))
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}


# --- HTTP


class Handler(BaseHTTPRequestHandler):
    """A connection of a client, for one request."""

    service: ClassVar[Service]
    key: ClassVar[str] = ""

    def do_GET(self) -> None:
        try:
            self._send(200, self._told())
        except Refused as error:
            self._refuse(error)

    def _told(self) -> Mapping[str, Any]:
        if self.path == "/health":
            return {"status": "ok"}
        self._require_key()
        if self.path != "/v1/models":
            raise Refused(404, f"no {self.path} here")
        return {"object": "list", "data": [{"id": self.service.name, "object": "model"}]}

    def _require_key(self) -> None:
        given = self.headers.get("Authorization", "")
        if self.key and not compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            raise Refused(401, "a key is needed")

    def do_POST(self) -> None:
        try:
            self._send(200, self.service.answer(self.path, self._body()))
        except Refused as error:
            self._refuse(error)
        except Exception as error:  # the client is told, the server goes on
            self.log_error("%s: %s", type(error).__name__, error)
            self._refuse(Refused(500, f"{type(error).__name__}: {error}"))

    def _body(self) -> Mapping[str, Any]:
        length, most = self.headers.get("Content-Length", ""), self.service.limits.body
        if not length.isdecimal() or len(length) > 18:
            raise Refused(411, "a Content-Length is needed")
        if int(length) > most:
            self._pass_over(min(int(length), 4 * most))
            raise Refused(413, f"at most {most} bytes")
        self._require_key()
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise Refused(400, "the body ends early")
        kind = self.headers.get("Content-Type", "")
        if kind.startswith("multipart/form-data"):
            return _form(kind, content)
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"not JSON: {error}") from None
        if not isinstance(body, dict):
            raise Refused(400, "not a JSON object")
        return body

    def _pass_over(self, length: int) -> None:
        """Read what is refused unseen: a client that is still sending would not hear why."""
        while length > 0 and (piece := self.rfile.read(min(length, 65536))):
            length -= len(piece)

    def _refuse(self, error: Refused) -> None:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
        self._send(error.status, {"error": {"message": str(error), "type": kind}}, headers)

    def _send(self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        with suppress(OSError):  # the client has gone
            self.send_response(status)
            usual = {"Content-Type": "application/json", "Content-Length": str(len(data))}
            for name, value in (usual | dict(headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class Http(ThreadingHTTPServer):
    """Listens on ``host``:``port`` (0: any that is free). Use as a context: leaving it finishes what is under way."""

    request_queue_size = 512
    daemon_threads = False

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 8000, key: str = "") -> None:
        if host not in ("127.0.0.1", "localhost", "::1") and not key:
            raise ServeError(f"{host} is reached by others: name the environment variable of a key, or serve 127.0.0.1")
        self.service, self.host = service, host
        own = {"service": service, "key": key, "timeout": service.limits.seconds}
        handler = type("OwnHandler", (Handler,), own)
        try:
            super().__init__((host, port), handler)
        except OSError as error:
            raise ServeError(f"{host}:{port} cannot be listened on: {error.strerror}") from None

    @property
    def address(self) -> str:
        """Where it is."""
        return f"http://{self.host}:{self.server_port}/v1"

    def server_close(self) -> None:
        """Finish what waits, then stop."""
        self.service.line.close()
        super().server_close()
