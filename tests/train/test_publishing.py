"""Publishing: what is written loads and draws the same, the card says what the run was, and a hub gets the folder."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants, metadata_load
from PIL import Image
from safetensors.torch import load_file, save_file

from srum import models
from srum.config import LoraConfig, load_config
from srum.run import Run
from srum.run_dir import CONFIG, claim_run
from srum.train import lora, publishing
from srum.train.model_card import _changed, base_of, judge_of, licence_of, snippet
from srum.train.publishing import PublishError, publish, to_hub
from tests.fakes import FakeModel, run_on_fakes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on_fakes(tmp_path_factory.mktemp("publish") / "run", "rounds=1", "compare=[sft]")


@pytest.fixture
def run(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setattr(models, "load", FakeModel.load)
    monkeypatch.chdir(tmp_path)
    return Run(finished, load_config(finished / CONFIG))


def test_a_published_folder_draws_its_example_by_the_code_on_its_card(run: Run, tmp_path: Path) -> None:
    publish(run, "region_nft", str(tmp_path / "mine"))
    weights = run.train_dir("region_nft", 0) / "model/ema.safetensors"
    assert (tmp_path / "mine/ema.safetensors").read_bytes() == weights.read_bytes()
    card = (tmp_path / "mine/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    exec(code, {})
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / name)) for name in ("image.png", "mine/example.png")))


@pytest.mark.slow
def test_a_new_process_elsewhere_draws_the_example(tmp_path: Path) -> None:
    """The real network, as a run would have kept it, by the code on the card and nothing of the run."""
    config = load_config(None, ["rounds=1", "compare=[]", "eval.count=7"])
    run = Run(tmp_path / "run", config)
    claim_run(run.folder, config)
    shutil.copytree(models.EMBEDDED["srum-tiny"], run.train_dir("region_nft", 0) / "model")
    publish(run, "region_nft", str(tmp_path / "mine"))
    shutil.rmtree(run.folder)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "mine/README.md").read_text(), re.S)
    (tmp_path / "elsewhere").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "elsewhere", check=True)
    images = [Image.open(tmp_path / name) for name in ("elsewhere/image.png", "mine/example.png")]
    assert np.array_equal(*map(np.asarray, images))


def test_the_card_says_method_data_config_results_limits_and_licence(run: Run, tmp_path: Path) -> None:
    publish(run, "region_nft", str(tmp_path / "mine"))
    card, summary = (tmp_path / "mine/README.md").read_text(), json.loads((run.folder / "summary.json").read_text())
    facts = metadata_load(tmp_path / "mine/README.md")
    assert (facts["base_model"], facts["license"], facts["tags"]) == ("srum-tiny", "apache-2.0", ["srum", "region_nft"])
    (result,) = facts["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(summary["region_nft"]["accuracy"], 1)
    low, high = summary["region_nft"]["interval"]
    assert f"| region_nft | {summary['region_nft']['accuracy']:.1f} | {low:.1f} to {high:.1f} | " in card
    for part in ("12 candidates", "`train.steps` | 2 |", "the model itself", "12 prompts", "apache-2.0", "# mine\n"):
        assert part in card, part
    assert all(re.fullmatch(r"\|(.*\|)+", line) for line in card.splitlines() if line.startswith("|"))


def test_nothing_is_left_where_the_copy_draws_another_image(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(source: Path, target: Path) -> None:
        target.mkdir()
        state = {name: value + 1 for name, value in load_file(source / "ema.safetensors").items()}
        save_file(state, target / "ema.safetensors")

    monkeypatch.setattr(shutil, "copytree", damaged)
    with pytest.raises(PublishError, match="draws another image than the run's weights"):
        publish(run, "region_nft", str(tmp_path / "mine"))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_published_is_said(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "get_token", lambda: None)
    for arm, where, adapter, message in (
        ("base", "x", False, "trains no arm 'base'; it has sft, region_nft"),
        ("sft", "x", True, "has no adapter; a training with train.lora.rank writes one"),
        ("sft", str(tmp_path), False, "is there already"),
        ("sft", "me/mine", False, "me/mine: pushing to the hub needs a token.*would be ./me/mine"),
    ):
        with pytest.raises(PublishError, match=message):
            publish(run, arm, where, adapter)
    assert [to_hub(name) for name in ("me/mine", "./me/mine", "mine", "/a/b", "a/b/c")] == [True] + 4 * [False]
    (tmp_path / "me").mkdir()
    assert not to_hub("me/mine")


def test_base_judge_and_licence_come_from_cards_and_config(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert (base_of(str(tmp_path / "mine")), licence_of(str(tmp_path / "mine"))) == ("mine", None)
    (tmp_path / "mine/README.md").write_text("---\nbase_model: a/b\nlicense: mit\n---\n")
    assert (base_of(str(tmp_path / "mine")), licence_of(str(tmp_path / "mine"))) == ("a/b", "mit")
    server = ["judge.soft=false", "judge.server={url: http://secret.example/v1, model: m}"]
    said = [judge_of(load_config(None, sets)) for sets in ([], ["judge.model=start"], ["judge.by=a:B"], server)]
    assert said == ["the model itself", "the base model", "`a:B`", "m, on a server"]


def test_the_card_tells_what_differs_from_the_methods_own_defaults() -> None:
    """A policy's own sections have other defaults than the run's."""
    config = load_config(None, ["method=flow_grpo", "train.lr=1e-6"])
    assert list(_changed(config)) == [("train.lr", "1e-06")]


def test_an_adapter_is_added_by_the_code_on_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real network, its updates as large as the weights' own spread: as merged."""
    monkeypatch.chdir(tmp_path)
    trained = models.load("srum-tiny", "cpu")
    names = [name for name, _ in trained.generation_parameters()]
    config = LoraConfig(rank=2, alpha=4)
    with lora.adapted(trained, names, config) as updates:
        lora.start(trained.network, seed=0)
        own = {name: p for name, p in trained.network.named_parameters() if name in updates}
        for number, parameter in enumerate(own.values()):
            torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(number))
        lora.save_adapter(own, config, tmp_path)
        lora.merge(trained.network)
    drawing = load_config(None, ["eval.timesteps=2", "eval.guidance=1"])
    fresh: dict[str, Any] = {}
    exec(snippet(str(tmp_path), "srum-tiny", "a red circle", 0, drawing, adapter=True), fresh)
    merged, added = dict(trained.network.named_parameters()), dict(fresh["model"].network.named_parameters())
    untouched = dict(models.load("srum-tiny", "cpu").network.named_parameters())
    assert merged.keys() == added.keys() and all(torch.equal(merged[name], added[name]) for name in merged)
    assert any(not torch.equal(merged[name], untouched[name]) for name in merged)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A hub of a few lines: it takes repositories and commits of small files, and keeps them."""
    kept: dict[str, Any] = {"files": {}, "tokens": set()}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept["tokens"].add(self.headers["Authorization"])
            if self.path == "/api/repos/create":
                kept["created"] = json.loads(body)
                self.answer({"url": f"{address}/me/mine"})
            elif "/preupload/" in self.path:
                files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
                self.answer({"files": [one | {"shouldIgnore": False} for one in files]})
            elif "/commit/" not in self.path:  # is the card's front matter valid?
                self.answer({"errors": [], "warnings": []})
            else:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        kept["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer({"commitUrl": f"{address}/me/mine/commit/1", "commitOid": "1", "pullRequestUrl": None})

        def answer(self, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            kept.setdefault("asked", []).append(self.path)
            self.answer({"id": "me/mine", "sha": "0", "siblings": []})

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    monkeypatch.setenv("no_proxy", "*")
    yield kept
    server.shutdown()
    server.server_close()


def test_a_hub_gets_the_folder_with_the_token(run: Run, hub: dict[str, Any], tmp_path: Path) -> None:
    assert publish(run, "region_nft", "me/mine", private=True).endswith("/me/mine")
    publish(run, "region_nft", str(tmp_path / "mine"))
    ours = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert hub["files"].keys() == ours.keys() and hub["tokens"] == {"Bearer hf_stand_in"}
    assert hub["created"]["name"] == "mine" and hub["created"]["organization"] == "me"
    assert "private" in json.dumps(hub["created"])
    assert hub["files"]["ema.safetensors"] == ours["ema.safetensors"]
    assert b"models.load('me/mine')" in hub["files"]["README.md"]
