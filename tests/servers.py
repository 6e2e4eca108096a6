"""Real HTTP servers of a few lines for tests, on 127.0.0.1."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from srum.exchange.serve import Http, Limits, Service

Reply = str | tuple[int, dict[str, str], Any]


@contextmanager
def chat_server(behave: Callable[[dict[str, Any]], Reply]) -> Iterator[str]:
    """The address of a server of chat completions; ``behave`` gives the text of a reply to a request, or the status,
    the headers and the body."""

    class Handler(_Quiet):
        def do_POST(self) -> None:
            said = behave(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if isinstance(said, str):
                said = 200, {}, {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
            status, headers, body = said
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    with _listening(Handler) as address:
        yield address


@contextmanager
def refusing_server() -> Iterator[str]:
    """The address of a server that answers 413 and hangs up before it has read what is sent."""

    class Handler(_Quiet):
        def do_POST(self) -> None:
            self.send_response(413)
            self.end_headers()

    with _listening(Handler) as address:
        yield address


class _Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            server.server_close()


@contextmanager
def serving(model: Any, limits: Limits | None = None, key: str = "") -> Iterator[str]:
    """The address of ``srum serve`` around this model, which is called m there."""
    with pytest.MonkeyPatch.context() as patch, Http(Service(model, "m", limits), port=0, key=key) as server:
        patch.setenv("no_proxy", "*")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.address
        finally:
            server.shutdown()
            thread.join()
