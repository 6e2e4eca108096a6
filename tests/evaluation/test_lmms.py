"""The plug of lmms-eval, against the few names of it that it uses (the runner itself has some fifty dependencies)."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from srum import models
from srum.models.base import Decoding, Segment, Written
from tests.fakes import FakeModel

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


class Listening(FakeModel):
    asked: list[tuple[list[str], Decoding]]

    def write(self, contexts: Any, decoding: Decoding, seeds: Any) -> list[Written]:
        self.asked += [([segment.text or _colour(segment) for segment in context], decoding) for context in contexts]
        return super().write(contexts, decoding, seeds)


def _colour(segment: Segment) -> str:
    assert isinstance(segment.image, Image.Image)
    return str(segment.image.getpixel((0, 0)))


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plug, with a model that notes what it is asked."""

    class Base:
        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}

    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Base  # type: ignore[attr-defined]
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setattr(models, "load", lambda *_: Listening())
    monkeypatch.delitem(sys.modules, "srum.evaluation.lmms", raising=False)
    lmms = importlib.import_module("srum.evaluation.lmms")
    plug = lmms.Lmms("srum-tiny", batch_size="2")
    plug.model.asked = []
    plug.task_dict = {"mme": {"test": [{"images": [RED]}, {"images": [RED, BLUE]}, {"images": []}]}}
    yield plug
    del sys.modules["srum.evaluation.lmms"]  # it has met names that are no others'


def request(text: str, doc: int, **wanted: Any) -> Any:
    return SimpleNamespace(args=(text, wanted, lambda doc: doc["images"], doc, "mme", "test"))


def test_images_go_where_the_marks_are_and_replies_keep_their_order(plug: Any) -> None:
    requests = [
        request("hello world", 2, until=["world"], max_new_tokens=9),
        request("what?", 0, max_new_tokens=20),
        request("compare <image> and <image>.", 1, max_new_tokens=9, temperature=0.5, do_sample=False),
        request("hello", 2, max_new_tokens=9),
    ]
    replies = plug.generate_until(requests)
    asked = {tuple(texts): decoding for texts, decoding in plug.model.asked}
    red, blue = "(255, 0, 0)", "(0, 0, 255)"
    assert asked == {
        ("hello world",): Decoding(max_tokens=9),
        (red, "what?"): Decoding(max_tokens=20),
        ("compare ", red, " and ", blue, "."): Decoding(max_tokens=9),
        ("hello",): Decoding(max_tokens=9),
    }
    assert replies[0] == "a plan of hello " and replies[3] == "a plan of hello"
    with pytest.raises(ValueError, match="mme: 1 marks <image> for 2 images"):
        plug.generate_until([request("<image>", 1)])


def test_it_is_found_by_its_entry_point(plug: Any) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"srum": "srum.evaluation.lmms:manifest"}
    manifest = sys.modules["srum.evaluation.lmms"].manifest  # type: ignore[attr-defined]
    assert manifest.model_id == "srum" and manifest.simple_class_path == "srum.evaluation.lmms.Lmms"
