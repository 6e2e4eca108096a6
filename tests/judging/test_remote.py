"""The judge on a server, against real HTTP servers of a few lines."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from srum import models
from srum.config import load_config
from srum.judging.base import NoReply
from srum.judging.instructions import layout_reply, region_reply
from srum.judging.remote import Server, ServerError
from srum.judging.self_judge import SelfJudge
from srum.loop import perform
from srum.models.base import Decoding, Segment
from srum.records import Failure, Judgement, Region
from srum.run import Run
from srum.run_dir import read_records
from tests.fakes import FakeModel

Handler = BaseHTTPRequestHandler
Behaviour = Callable[[Handler, dict[str, Any]], None]
Serve = Callable[[Behaviour], str]

GREY = Image.new("RGB", (8, 8), (128, 128, 128))
SEEN = Segment("seen", image=GREY)


def ask(
    judge: Server,
    *texts: str,
    decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> list[str | NoReply]:
    """The replies to questions about one image."""
    contexts = [[SEEN, Segment("text", text=text)] for text in texts]
    replies = judge.write(contexts, decoding, [seed] * len(texts))
    return [reply if isinstance(reply, NoReply) else reply.text for reply in replies]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a server that answers POST by a function, and gives its address."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers: list[ThreadingHTTPServer] = []

    def start(behave: Behaviour) -> str:
        class Own(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                behave(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Own))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(handler: Handler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in ({"Content_Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def say(handler: Handler, text: str | None) -> None:
    send(handler, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


def text_of(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"][1]["text"]


def server(url: str, **options: Any) -> Server:
    return Server(url, "judge-7b", **({"backoff": 0.01, "timeout": 5.0} | options))


def test_what_is_sent(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, dict[str, Any], str | None]] = []

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        seen.append((handler.path, body, handler.headers["Authorization"]))
        say(handler, "fine")

    url = serve(behave)
    decoding, seed = Decoding(max_tokens=77, temperature=0.7), 2**62 + 5
    assert ask(server(url + "/"), "hello", decoding=decoding, seed=seed) == ["fine"]
    monkeypatch.setenv("JUDGE_KEY", "secret")
    ask(server(url, key_variable="JUDGE_KEY"), "hello", decoding=decoding, seed=seed)
    (path, body, no_key), (_, _, key) = seen
    assert (path, no_key, key) == ("/v1/chat/completions", None, "Bearer secret")
    settings = {name: body[name] for name in ("model", "max_tokens", "temperature", "seed")}
    assert settings == {"model": "judge-7b", "max_tokens": 77, "temperature": 0.7, "seed": 5}
    ((message,),) = [body["messages"]]
    shown, asked = message["content"]
    kind, data = shown["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64" and asked == {"type": "text", "text": "hello"}
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == GREY.tobytes()


def test_replies_keep_their_order_and_so_many_go_at_a_time(serve: Serve) -> None:
    running, most, three, lock = 0, 0, threading.Barrier(3, timeout=30), threading.Lock()

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if text_of(body) != "g":
            three.wait()  # goes on once three are being answered
        time.sleep(0.05 if text_of(body) in "ad" else 0)
        with lock:
            running -= 1
        say(handler, text_of(body).upper())

    assert ask(server(serve(behave), concurrency=3), *"abcdefg") == list("ABCDEFG")
    assert most == 3


def fail_with(status: int) -> Behaviour:
    return lambda handler, _: send(handler, b'{"error": "try again"}', status)


def hang_up(handler: Handler, _: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def break_off(handler: Handler, _: dict[str, Any]) -> None:
    send(handler, b'{"choices": [', Content_Length="1000")
    handler.close_connection = True


def fall_silent(handler: Handler, _: dict[str, Any]) -> None:
    time.sleep(0.4)


PASSING = {"500": fail_with(500), "503": fail_with(503), "429": fail_with(429), "408": fail_with(408)} | {
    "hangs up": hang_up,
    "breaks off": break_off,
    "falls silent": fall_silent,
}


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again(serve: Serve, trouble: Behaviour) -> None:
    times: list[float] = []

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        times.append(time.monotonic())
        trouble(handler, body) if len(times) <= 2 else say(handler, "at last")

    asked = server(serve(behave), retries=2, timeout=0.2, backoff=0.05)
    assert ask(asked, "hello") == ["at last"]
    assert times[1] - times[0] >= 0.05 and times[2] - times[1] >= 0.1  # the wait doubles


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_what_does_not_pass_is_no_reply(serve: Serve, trouble: Behaviour) -> None:
    (reply,) = ask(server(serve(trouble), retries=1, timeout=0.2), "hello")
    assert isinstance(reply, NoReply) and reply.why


def test_a_refused_question_is_not_asked_again_and_the_others_are_answered(serve: Serve) -> None:
    counts = {"good": 0, "bad": 0}

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        counts[text_of(body)] += 1
        if text_of(body) == "bad":
            send(handler, b'{"error": "image too large"}', 400)
        else:
            say(handler, "fine")

    replies = ask(server(serve(behave)), "bad", "good")
    assert replies == [NoReply('HTTP 400: {"error": "image too large"}'), "fine"]
    assert counts == {"good": 1, "bad": 1}


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"null", b"[]", b"{}", b'{"choices": []}', b'{"choices": [null]}', b"[" * 100_000],
    ids=["empty", "html", "null", "list", "object", "no choice", "null choice", "deep"],
)
def test_a_body_that_is_no_completion_is_no_reply(serve: Serve, body: bytes) -> None:
    (reply,) = ask(server(serve(lambda handler, _: send(handler, body))), "hello")
    assert isinstance(reply, NoReply) and reply.why.startswith("not a chat completion")


def test_no_content_is_an_empty_reply(serve: Serve) -> None:
    assert ask(server(serve(lambda handler, _: say(handler, None))), "hello") == [""]


@pytest.mark.parametrize(("reason", "ended"), [("stop", True), ("length", False), (None, True)])
def test_a_reply_that_was_cut_off_is_marked(serve: Serve, reason: str | None, ended: bool) -> None:
    choice = {"message": {"content": "and so"}, "finish_reason": reason}
    url = serve(lambda handler, _: send(handler, json.dumps({"choices": [choice]}).encode()))
    (reply,) = server(url).write([[SEEN, Segment("text", text="hello")]], Decoding(), [0])
    assert not isinstance(reply, NoReply) and (reply.text, reply.ended) == ("and so", ended)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_concerns_all_questions_ends_the_stage(serve: Serve, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    url = serve(lambda handler, _: send(handler, b"key secret unknown", status))
    with pytest.raises(ServerError, match=f"HTTP {status} for model 'judge-7b'") as error:
        ask(server(url), "hello")
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_the_key_is_not_taken_elsewhere(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    visits: list[str] = []
    other = serve(lambda handler, _: visits.append(handler.path))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for status in (301, 302, 307, 308):
        with pytest.raises(ServerError, match=f"HTTP {status}"):
            ask(server(serve(lambda handler, _, s=status: send(handler, b"", s, Location=other))), "hello")  # type: ignore[misc]
    assert visits == []


def test_a_server_that_is_not_there(serve: Serve) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ServerError, match="cannot be reached"):
            ask(server(url, retries=1), *"a" * 40)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment("text", text="so", open=True), "an open text"),
        (Segment("clean", latent=torch.zeros(1, 2, 2)), "no clean segment"),
        (Segment("text", ids=(1, 2)), "no text segment"),
        (Segment("seen", image=torch.zeros(3, 2, 2)), "no pixels"),
    ],
)
def test_what_a_server_does_not_take(segment: Segment, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        server("http://127.0.0.1:1/v1").write([[segment]], Decoding(), [0])


# --- as the judge


def judging(handler: Handler, body: dict[str, Any]) -> None:
    """Breaks on region 2, answers in another language about region 3, else as asked."""
    text = text_of(body)
    if "Region ID: 2\nBounding" in text:
        send(handler, b"out of memory", 500)
    elif "Region ID: 3\nBounding" in text:
        say(handler, "Regi\N{LATIN SMALL LETTER O WITH ACUTE}n 3: un gato. Nota: 1")
    elif "Bounding" in text:
        say(handler, region_reply(1 if "Region ID: 1" in text else 0, "a cat", 0.5, "as asked"))
    else:
        say(handler, layout_reply(0.4, "plausible"))


def test_a_server_judges(serve: Serve) -> None:
    judge = SelfJudge(server(serve(judging), retries=1), soft=False)
    regions = [Region(id=i, box=(0, 0, 1 + i, 4), area=1, source="test") for i in (1, 2, 3, 0)]
    ((said, layout),) = judge.judge([GREY], ["a cat"], [regions])
    failures = [None, Failure.NO_REPLY, Failure.NO_SCORE, None]
    assert [(r.score, r.failure) for r in said] == list(zip([0.5, None, None, 0.5], failures, strict=True))
    assert said[1].raw == "HTTP 500: out of memory" and said[1].attempts == 2
    assert (layout.score, layout.confidence) == (0.4, None)


def test_a_run_with_a_server_holds_no_key(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    settings = [
        "prompt_count=2",
        "candidates_per_prompt=4",
        "judge.soft=false",
        "judge.server.retries=0",
        "judge.server.model=judge-7b",
    ]
    run = Run(tmp_path, load_config(None, [*settings, f"judge.server.url={serve(judging)}"]))
    for stage in ("rollout", "ground"):
        perform(run, stage, 0)
    monkeypatch.setattr(FakeModel, "write", None)  # no model of this process is asked
    perform(run, "judge", 0)
    judgements = read_records(run.round(0) / "judgements.jsonl", Judgement)
    assert len(judgements) == 8 and all(judgement.layout.score == 0.4 for judgement in judgements)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"sk-secret" in path.read_bytes()]
