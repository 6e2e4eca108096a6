"""The server around a model: what goes through it is what the model gives in process, and nothing takes it down."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srum import models
from srum.config import load_config
from srum.drawing import contexts_of, draw_prompts
from srum.exchange.chat import Ask, Reply, Server, ServerError, assistant, system, user
from srum.exchange.serve import Http, Job, Limits, Line, ServeError, Service, Shown
from srum.images import data_uri
from srum.judging.remote import Server as RemoteJudge
from srum.loop import perform
from srum.models.base import Decoding, Generated, Sampling, Segment, Written, to_edit
from srum.run import Run
from tests.fakes import FakeModel
from tests.servers import serving

SMALL = Sampling(size=(64, 64), timesteps=4)
RED = Image.new("RGB", (64, 64), "red")


def post(address: str, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Status and body of the response to a POST of plain values, or of bytes as they are."""
    connection = HTTPConnection(address.removeprefix("http://").removesuffix("/v1"), timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json"} | headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def image_of(data: dict[str, Any]) -> Image.Image:
    return _of_base64(data["b64_json"])


def _of_base64(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def drawing(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a red circle", "size": "64x64", "timesteps": 4, "seed": 3} | fields


@pytest.fixture(scope="module")
def tiny() -> Any:
    return models.load("srum-tiny", "cpu")


def test_replies_and_images_are_those_of_the_model_in_process(tiny: Any) -> None:
    context = [Segment("seen", image=RED), Segment("text", text="What is this?")]
    (written,) = tiny.write([context], Decoding(max_tokens=12), [0])
    (drawn,) = draw_prompts(tiny, ["a red circle"], SMALL, [3])
    begun, size = to_edit(tiny, RED)
    (edited,) = tiny.draw([[*begun, Segment("text", text="make it blue", droppable=True)]], SMALL, [3], sizes=[size])
    with serving(tiny) as address:
        assert Server(address, "m").ask(Ask([user(RED, "What is this?")], 12)) == Reply(
            written.text, cut=not written.ended
        )
        (first,) = post(address, "/v1/images/generations", drawing())[1]["data"]
        assert image_of(first).tobytes() == drawn.image.tobytes()
        two = [image_of(data) for data in post(address, "/v1/images/generations", drawing(n=2))[1]["data"]]
        near, far = (np.abs(np.asarray(image, float) - np.asarray(drawn.image, float)).mean() for image in two)
        assert near < 1 < far  # two in a batch round otherwise; the second has another seed
        _, change = post(address, "/v1/images/edits", drawing(prompt="make it blue", image=data_uri(RED)))
        assert image_of(change["data"][0]).tobytes() == edited.image.tobytes()


def test_the_openai_client_draws_edits_and_judges(tiny: Any) -> None:
    """The package itself: what it gets is what the model gives in process, and what is refused is its own errors."""
    openai = pytest.importorskip("openai")
    data = io.BytesIO()
    RED.save(data, format="png")
    context = [Segment("seen", image=RED), Segment("text", text="What is this?")]
    (written,) = tiny.write([context], Decoding(max_tokens=12), [0])
    (drawn,) = draw_prompts(tiny, ["a red circle"], SMALL, [3])
    begun, size = to_edit(tiny, RED)
    (edited,) = tiny.draw([[*begun, Segment("text", text="make it blue", droppable=True)]], SMALL, [3], sizes=[size])
    settings = {"seed": 3, "timesteps": 4}
    with serving(tiny, key="secret") as address:
        client = openai.OpenAI(base_url=address, api_key="secret", max_retries=0)
        assert [model.id for model in client.models.list()] == ["m"]
        reply = client.chat.completions.create(
            model="m", messages=[user(RED, "What is this?")], max_tokens=12, temperature=0
        )
        assert (reply.choices[0].message.content, reply.usage.completion_tokens) == (written.text, len(written.ids))
        made = client.images.generate(model="m", prompt="a red circle", size="64x64", extra_body=settings)
        assert _of_base64(made.data[0].b64_json).tobytes() == drawn.image.tobytes()
        changed = client.images.edit(
            model="m", image=("red.png", data.getvalue()), prompt="make it blue", size="64x64", extra_body=settings
        )
        assert _of_base64(changed.data[0].b64_json).tobytes() == edited.image.tobytes()
        with pytest.raises(openai.BadRequestError, match="size: image size"):
            client.images.generate(model="m", prompt="a red circle", size="60x60")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=address, api_key="other", max_retries=0).models.list()


def test_a_form_with_a_file_is_an_edit_too() -> None:
    class Editing(FakeModel):
        abilities = FakeModel.abilities | {"clean", "edit"}

    data = io.BytesIO()
    RED.save(data, format="png")
    parts = [
        b'Content-Disposition: form-data; name="prompt"\r\n\r\nmake it blue',
        b'Content-Disposition: form-data; name="seed"\r\n\r\n3',
        b'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
        + data.getvalue(),
    ]

    def form(*parts: bytes) -> bytes:
        return b"".join(b"--edge\r\n" + part + b"\r\n" for part in parts) + b"--edge--\r\n"

    with serving(Editing()) as address:
        kind = {"Content-Type": "multipart/form-data; boundary=edge"}
        status, body = post(address, "/v1/images/edits", form(*parts), **kind)
        two = [part.replace(b'"image"', b'"image[]"') for part in [*parts, parts[-1]]]
        for again, why in ((two, "one image is changed"), ([*parts, parts[0]], "prompt: ")):
            refused, said = post(address, "/v1/images/edits", form(*again), **kind)
            assert refused == 400 and why in said["error"]["message"]
        _, same = post(address, "/v1/images/edits", {"prompt": "make it blue", "seed": 3, "image": data_uri(RED)})
    assert status == 200 and body == same


def test_a_plan_comes_first_where_it_is_asked_for() -> None:
    model = FakeModel()
    plan = model.write([[Segment("text", text=model.plan_instruction), Segment("text", text="a cat")]], Decoding(), [0])
    sampling = Sampling(size=(64, 64))
    (expected,) = model.draw(contexts_of(model, ["a cat"], [plan[0].text]), sampling, [0])
    with serving(model) as address:
        _, body = post(address, "/v1/images/generations", {"prompt": "a cat", "size": "64x64", "plan": True})
    assert image_of(body["data"][0]).tobytes() == expected.image.tobytes()


def test_drawing_and_judging_through_it_gives_the_same_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)
    small = ["rounds=1", "prompt_count=3", "candidates_per_prompt=2", "judge.soft=false", "judge.retries=0"]
    runs = []
    with serving(FakeModel()) as address:
        named = [f"{part}.server.{field}" for part in ("rollout", "judge") for field in (f"url={address}", "model=m")]
        for name, fields in {"here": [], "there": named}.items():
            runs.append(Run(tmp_path / name, load_config(None, [*small, *fields])))
            for stage in ("rollout", "ground", "judge"):
                perform(runs[-1], stage, 0)
    first, second = ((run.round(0) / "judgements.jsonl").read_bytes() for run in runs)
    assert first == second


def test_two_hundred_requests_at_once_of_all_kinds_are_all_answered() -> None:
    class Counting(FakeModel):
        calls = 0

        def write(self, contexts: Any, *rest: Any) -> list[Written]:
            Counting.calls += 1
            if any("break" in (segment.text or "") for context in contexts for segment in context):
                raise RuntimeError("broken by one of them")
            return super().write(contexts, *rest)

    chatted = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    kinds: list[tuple[str, Any, int]] = [
        ("/v1/chat/completions", chatted, 200),
        ("/v1/chat/completions", {"messages": [user(RED, "Region ID: 1")]}, 200),
        ("/v1/images/generations", drawing(), 200),
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[" * 5000, 400),
        ("/v1/chat/completions", b"x" * 300_000, 413),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "break"}], "max_tokens": 8}, 500),
        ("/v1/images/generations", drawing(size="99999x99999"), 400),
        ("/v1/nothing", {}, 404),
        ("/v1/images/edits", drawing(image="data:image/png;base64,AAAA"), 400),
    ]
    with serving(Counting(), Limits(body=200_000)) as address:
        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(lambda n: post(address, *kinds[n % 10][:2]), range(200)))
        assert [status for status, _ in answers] == [kinds[n % 10][2] for n in range(200)]
        assert post(address, *kinds[0][:2])[0] == 200
    texts = {answers[n][1]["choices"][0]["message"]["content"] for n in range(0, 200, 10)}
    assert texts == {"a plan of hello"}
    assert Counting.calls < 60 + 21  # those that were waiting together went together; the broken batch one by one


def test_a_model_that_gives_too_few_results_does_not_end_the_line() -> None:
    class Short(FakeModel):
        def write(self, contexts: Any, *rest: Any) -> list[Written]:
            return super().write(contexts, *rest)[: len(contexts) - 1 or 1]

    line = Line(Short(), Limits())
    said: list[Any] = []
    jobs = [Job(("write", Decoding()), seed, [Segment("text", text="hello")]) for seed in range(3)]
    asking = threading.Thread(target=lambda: said.extend(line.add(jobs)), daemon=True)
    asking.start()
    asking.join(30)
    assert [one.text for one in said] == ["a plan of hello"] * 3
    line.close()


def test_images_that_were_shown_last_are_kept_up_to_so_many_bytes() -> None:
    looked: list[str] = []

    def look(url: str) -> Segment:
        looked.append(url)
        return Segment("seen", image=Image.new("RGB", (4, 4)))

    shown = Shown(look, most=2 * 48)
    first = shown("a")
    for url in ("b", "a", "c", "a", "b"):  # c takes the place of b
        shown(url)
    assert looked == ["a", "b", "c", "b"] and shown("a") is first
    Shown(look, most=47)("larger than what is kept")


def test_a_batch_is_made_of_what_waits_and_is_alike() -> None:
    batches: list[int] = []
    first, gate = threading.Event(), threading.Event()

    class Waiting(FakeModel):
        def write(self, contexts: Any, *rest: Any) -> list[Written]:
            batches.append(len(contexts))
            first.set()
            gate.wait(30)
            return super().write(contexts, *rest)

        def draw(self, contexts: Any, *rest: Any, **named: Any) -> list[Generated]:
            batches.append(-len(contexts))
            return super().draw(contexts, *rest, **named)

    with serving(Waiting(), Limits(batch=3)) as address, ThreadPoolExecutor(8) as pool:
        server = Server(address, "m", concurrency=8)
        asks = [pool.submit(server.ask, Ask([user("hello")], 8))]
        first.wait(30)
        asks += [pool.submit(server.ask, Ask([user(f"hello {n}")], 8)) for n in range(4)]
        image = pool.submit(post, address, "/v1/images/generations", drawing())
        threading.Event().wait(1.0)  # until all of them wait
        gate.set()
        assert all(isinstance(ask.result(), Reply) for ask in asks) and image.result()[0] == 200
    assert sorted(batches) == [-1, 1, 1, 3]


def test_a_full_line_says_when_to_come_back() -> None:
    gate = threading.Event()

    class Waiting(FakeModel):
        def write(self, *arguments: Any) -> list[Written]:
            gate.wait(30)
            return super().write(*arguments)

    with serving(Waiting(), Limits(waiting=1)) as address, ThreadPoolExecutor(4) as pool:
        asks = [pool.submit(Server(address, "m", retries=5).ask, Ask([user("hello")])) for _ in range(3)]
        threading.Event().wait(0.5)
        gate.set()
        assert [ask.result() for ask in asks] == [Reply("a plan of hello")] * 3


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", {}, "messages: there are none"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "has no content"),
        ("/v1/chat/completions", {"messages": [user("x")], "stream": True}, "no stream"),
        ("/v1/chat/completions", {"messages": [user("x")], "max_tokens": 10**9}, "max_tokens: 1 to 4096"),
        ("/v1/chat/completions", {"messages": [user("x")], "temperature": "hot"}, "temperature: 'hot'"),
        ("/v1/chat/completions", {"messages": [user("x")], "temperature": float("nan")}, "temperature: 0 to 10"),
        ("/v1/chat/completions", {"messages": [user("x", *[RED] * 17)]}, "more than 16 images"),
        ("/v1/images/generations", drawing(prompt=" "), "prompt: a text is needed"),
        ("/v1/images/generations", drawing(size="60x60"), "size: image size"),
        ("/v1/images/generations", drawing(size="big"), "size: 'big' is not like"),
        ("/v1/images/generations", drawing(n=99), "n: 1 to 16"),
        ("/v1/images/generations", drawing(timesteps="many"), "timesteps: "),
        ("/v1/images/generations", drawing(response_format="url"), "b64_json alone"),
        ("/v1/images/generations", drawing(seed=2**63), "seed: 0 to"),
        ("/v1/images/generations", drawing(seed="9" * 5000), "seed: '999"),
        ("/v1/images/generations", drawing(seed=-1), "seed: 0 to"),
        ("/v1/chat/completions", {"messages": [user("x")], "seed": 10**400}, "seed: 0 to"),
        ("/v1/images/generations", drawing(timesteps=1), "timesteps: Input should be greater"),
        ("/v1/images/generations", drawing(guidance=float("nan")), "guidance: Input should be a finite"),
        ("/v1/images/generations", drawing(image_guidance=float("inf")), "image_guidance: expected a finite"),
        ("/v1/images/generations", drawing(guidance_interval=[0.5, 0.5]), "guidance_interval: (0.5, 0.5) is empty"),
        ("/v1/images/edits", drawing(image="data:image/png;base64,\ud83d"), "an image is no base64"),
        ("/v1/images/edits", drawing(image="http://example.com/a.png"), "data:image/png;base64"),
    ],
)
def test_what_is_refused_is_said_in_one_line(path: str, body: Any, message: str) -> None:
    with serving(FakeModel()) as address:
        status, answer = post(address, path, body)
    assert status == 400 and message in answer["error"]["message"] and "\n" not in answer["error"]["message"]


def test_a_photograph_is_seen_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    Image.new("RGB", (48, 32)).save(data, "jpeg", exif=exif)
    assert Service(FakeModel(), "m")._picture(data.getvalue()).size == (32, 48)


def test_a_model_that_cannot_edit_says_so() -> None:
    class Drawing(FakeModel):
        abilities = FakeModel.abilities - {"edit"}

    with serving(Drawing()) as address:
        status, answer = post(address, "/v1/images/edits", drawing(image=data_uri(RED)))
    assert status == 400 and "needs a model with the ability edit" in answer["error"]["message"]


def test_a_key_is_wanted_where_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(FakeModel(), key="secret") as address:
        with pytest.raises(ServerError, match="HTTP 401"):
            Server(address, "m").ask(Ask([user("hello")]))
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert Server(address, "m").ask(Ask([user("hello")])) == Reply("a plan of hello")


def test_others_are_served_with_a_key_alone() -> None:
    with pytest.raises(ServeError, match=r"0\.0\.0\.0 is reached by others: name"):
        Http(Service(FakeModel(), "m"), "0.0.0.0", 0)


def test_turns_of_a_conversation_are_texts_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[list[Segment]] = []

    class Listening(FakeModel):
        def write(self, asked: Any, *rest: Any) -> list[Written]:
            contexts.extend(asked)
            return super().write(asked, *rest)

    with serving(Listening()) as address:
        Server(address, "m").ask(Ask([system("be brief"), user(RED, "what?"), assistant("red"), user("sure?")]))
        judge = RemoteJudge(address, "m")
        judge.write([[Segment("seen", image=RED), Segment("text", text="Region ID: 2")]], Decoding(), [1])
    kinds = [[segment.text or segment.kind for segment in context] for context in contexts]
    assert kinds == [["be brief", "seen", "what?", "red", "sure?"], ["seen", "Region ID: 2"]]


def test_it_stops_when_it_is_told(tmp_path: Path) -> None:
    environment = os.environ | {"no_proxy": "*"}
    code = "from srum.cli import app; app(['serve', 'srum-tiny', '--port', '0', '--device', 'cpu'])"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split(" at ")[1].split(";")[0]
        idle = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2].removesuffix("/v1"))))
        status, _ = post(address, "/v1/chat/completions", {"messages": [user("a red circle")], "max_tokens": 2})
        idle.close()
        process.send_signal(signal.SIGTERM)
        assert (status, process.wait(30)) == (200, 0)
    finally:
        process.kill()
        process.wait()
