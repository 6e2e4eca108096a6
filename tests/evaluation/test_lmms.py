"""The plug of lmms-eval, against the few names of it that it uses, and against the runner itself where it is there (it
has some fifty dependencies)."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srum import models
from srum.models.base import Decoding, Segment, Written
from srum.shapes.render import render
from srum.shapes.scenes import random_scene
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


TASK = """
task: shapes
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.right
generation_kwargs: {{max_new_tokens: 16, temperature: 0, do_sample: false}}
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def right(doc, replies):
    return {"right": float(replies[0] == doc["answer"])}
"""


@pytest.mark.slow
def test_the_real_runner_gets_the_replies_of_the_model(tmp_path: Path) -> None:
    """lmms-eval's own command on a task of four local images: of two of them the expected answer is the model's own."""
    for package in ("lmms_eval", "datasets", "evaluate"):
        pytest.importorskip(package)
    images = [Image.fromarray(render(random_scene(1, np.random.default_rng(n)))) for n in range(4)]
    question, rows = "What is in the image?", []
    contexts = [[Segment("seen", image=image), Segment("text", text=question)] for image in images]
    replies = models.load("srum-tiny", "cpu").write(contexts, Decoding(max_tokens=16), [0] * 4)
    for n, (image, reply) in enumerate(zip(images, replies, strict=True)):
        image.save(tmp_path / f"{n}.png")
        answer = reply.text if n % 2 else "something else"
        rows.append({"image": str(tmp_path / f"{n}.png"), "question": question, "answer": answer})
    (tmp_path / "task").mkdir()
    (tmp_path / "task/utils.py").write_text(UTILS)
    (tmp_path / "task/shapes.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = "-m lmms_eval --model srum --model_args pretrained=srum-tiny,device=cpu --tasks shapes --batch_size 2"
    places = ["--include_path", str(tmp_path / "task"), "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "no_proxy": "*"}
    subprocess.run([sys.executable, *command.split(), *places], check=True, env=environment)
    (results,) = (tmp_path / "out").rglob("*results.json")
    assert json.loads(results.read_text())["results"]["shapes"]["right,none"] == 0.5
