"""The client of chat completions, against real HTTP servers of a few lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from PIL import Image

from srum.exchange.chat import Ask, NoReply, Reply, Server, ServerError, assistant, system, user
from tests.servers import chat_server, refusing_server

RED, BLUE = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
QUESTION = Ask([user("hello")])


def answering(message: dict[str, Any], reason: str = "stop") -> Callable[[dict[str, Any]], Any]:
    return lambda _: (200, {}, {"choices": [{"message": message, "finish_reason": reason}]})


def test_turns_images_and_fields_arrive_in_order() -> None:
    bodies: list[dict[str, Any]] = []

    def behave(body: dict[str, Any]) -> str:
        bodies.append(body)
        return "fine"

    turns = [system("be strict"), user(RED, "describe"), assistant("red"), user("which is better?", BLUE, RED)]
    with chat_server(behave) as url:
        server = Server(url, "m", token_limit="max_completion_tokens", extra={"chat_template_kwargs": {"think": False}})
        assert server.ask(Ask(turns, max_tokens=9)) == Reply("fine")
    (body,) = bodies
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in body["messages"][3]["content"]] == ["text", "image_url", "image_url"]
    first, second = body["messages"][1]["content"][0], body["messages"][3]["content"][2]
    assert first == second != body["messages"][3]["content"][1]
    assert body["max_completion_tokens"] == 9 and "max_tokens" not in body
    assert body["chat_template_kwargs"] == {"think": False}


@pytest.mark.parametrize(
    ("message", "reason", "reply"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "stop", Reply("ab")),
        ({"content": "yes", "reasoning_content": "hm"}, "stop", Reply("yes", "hm")),
        ({"content": None, "reasoning": "hm"}, "length", Reply("", "hm", cut=True)),
        ({"content": "nice \ud83d!"}, "stop", Reply("nice \ufffd!")),
        ({"content": "fine \ud83d\ude00"}, "stop", Reply("fine \N{GRINNING FACE}")),
    ],
    ids=["parts", "a thought apart", "cut in the thought", "half a pair", "a whole pair"],
)
def test_what_is_read(message: dict[str, Any], reason: str, reply: Reply) -> None:
    with chat_server(answering(message, reason)) as url:
        assert Server(url, "m").ask(QUESTION) == reply


@pytest.mark.parametrize("dated", [False, True], ids=["seconds", "date"])
def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(dated: bool) -> None:
    times: list[float] = []

    def behave(body: dict[str, Any]) -> Any:
        times.append(time.monotonic())
        if len(times) > 1:
            return "at last"
        soon = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)  # whole seconds, so at least 1
        return 429, {"Retry-After": soon if dated else "0.7"}, {}

    with chat_server(behave) as url:
        assert Server(url, "m", backoff=0.01).ask(QUESTION) == Reply("at last")
    assert times[1] - times[0] >= 0.7


def test_what_stays_busy_is_told_from_what_is_refused() -> None:
    for status, busy in ((503, True), (429, True), (400, False), (413, False)):
        with chat_server(lambda _, status=status: (status, {}, {})) as url:  # type: ignore[misc]
            reply = Server(url, "m", retries=0).ask(QUESTION)
            assert isinstance(reply, NoReply) and reply.busy == busy


def test_a_body_that_is_refused_half_read_is_a_question_without_a_reply() -> None:
    """As a proxy refuses a large image."""
    with refusing_server() as url:
        reply = Server(url, "m", retries=0).ask(Ask([user("x" * 2**24)]))
    assert isinstance(reply, NoReply) and reply.busy
    with pytest.raises(ServerError, match="cannot be reached"):
        Server(url, "m", retries=0).ask(QUESTION)


@pytest.mark.parametrize("status", [400, 422, 500, 503])
def test_a_server_that_refuses_every_question_is_an_error(status: int) -> None:
    with chat_server(lambda _: (status, {}, {"error": "no images here"})) as url:
        server = Server(url, "m", retries=0)
        with pytest.raises(ServerError, match=f"refused all of 3 questions: HTTP {status}.*no images here"):
            server.ask_all([QUESTION] * 3)


def test_a_server_that_has_answered_may_refuse_a_whole_batch() -> None:
    with chat_server(lambda body: "hi" if body["seed"] == 0 else (400, {}, {})) as url:
        server = Server(url, "m", retries=0)
        server.ask_all([QUESTION, Ask([user("hello")], seed=1)])
        assert all(isinstance(reply, NoReply) for reply in server.ask_all([Ask([user("hello")], seed=1)] * 2))


def test_replies_at_temperature_0_are_kept_by_what_was_asked(tmp_path: Path) -> None:
    asked: list[str] = []

    def behave(body: dict[str, Any]) -> str:
        asked.append(body["messages"][0]["content"][0]["text"])
        return f"reply {len(asked)}"

    with chat_server(behave) as url:
        server = Server(url, "m", cache=tmp_path)
        texts = [server.ask(Ask([user(text, image)])).text for text in "ab" for image in (RED, BLUE, RED)]  # type: ignore[union-attr]
        assert texts == ["reply 1", "reply 2", "reply 1", "reply 3", "reply 4", "reply 3"]
        again = Server(url, "m", cache=tmp_path)
        assert again.ask(Ask([user("a", RED)])) == Reply("reply 1")
        assert again.ask(Ask([user("a", RED)], temperature=1.0)) == Reply("reply 5")
        for path in tmp_path.rglob("*.json"):
            path.write_text("{")  # cut by a full disk
        assert again.ask(Ask([user("a", RED)])) == Reply("reply 6")


def test_two_threads_keep_the_reply_to_one_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, write = Barrier(2), Path.write_text

    def together(path: Path, *arguments: Any, **options: Any) -> int:
        written = write(path, *arguments, **options)
        both.wait(timeout=20)
        return written

    monkeypatch.setattr(Path, "write_text", together)
    with chat_server(lambda _: "the same") as url:
        server = Server(url, "m", cache=tmp_path, concurrency=2)
        assert server.ask_all([QUESTION] * 2) == [Reply("the same")] * 2
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]


def test_failures_are_not_kept(tmp_path: Path) -> None:
    said: list[Any] = [(400, {}, {}), "better"]
    with chat_server(lambda _: said.pop(0)) as url:
        server = Server(url, "m", retries=0, cache=tmp_path)
        assert isinstance(server.ask(QUESTION), NoReply) and server.ask(QUESTION) == Reply("better")
