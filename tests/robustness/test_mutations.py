"""Files of every kind with bytes changed, cut, doubled or put in: each ends in a result or in one typed line.

How many of each kind: ``MUTATIONS`` in the environment is a factor on the numbers below, 100,000 in all.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import warnings
from base64 import b64encode
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from srum.config import RunConfig, dump, load_config
from srum.errors import SrumError
from srum.exchange.export import read_export, write_export
from srum.exchange.interchange import read_lines
from srum.exchange.serve import Refused, Service
from srum.grounding.base import ProposalError
from srum.grounding.native import parse_boxes
from srum.images import open_image
from srum.judging.instructions import layout_reply, region_reply
from srum.judging.replies import parse_layout, parse_regions
from srum.models.bagel.checkpoint import weight_files
from srum.models.bagel.config import BagelConfig
from srum.models.blip3o.checkpoint import read_headers
from srum.models.blip3o.config import Blip3oConfig
from srum.models.checkpoints import Headers
from srum.prompt_files import read_prompts
from srum.records import Candidate, Grounding, Judgement, LayoutJudgement, Record, Region, RegionJudgement, RewardMap
from srum.run import StageTimer
from srum.run_dir import read_records, write_records
from srum.tensors import read_tensors
from srum.views.reading import RunView
from tests.fakes import FakeModel, run_on_fakes

FACTOR = float(os.environ.get("MUTATIONS", "1"))
CHECKPOINT = Path(__file__).parents[1] / "golden" / "bagel" / "checkpoint"
SECOND = Path(__file__).parents[1] / "golden" / "blip3o" / "checkpoint"
PIECES = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\\ud83d",
    b"NaN",
    b"1e999",
    b"-1",
    b"null",
    b"9" * 5000,
    b"[" * 3000,
]
PIECES += [
    b'{"',
    b'"',
    b"}",
    b",",
    b":",
    b"\n",
    b"\r\n",
    b"{a: &a [*a]}",
    b"!!python/object:x",
    b"2001-99-99",
    b"../../x",
]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one to four changes."""
    for _ in range(rng.randint(1, 4)):
        start, end = sorted(rng.randint(0, len(data)) for _ in range(2))
        end = min(end, start + rng.choice([1, 2, 8, 64, 100_000]))
        match rng.randrange(6):
            case 0:
                middle = bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start:end][:8]) + data[start:end][8:]
            case 1:
                middle = b""
            case 2:
                middle = data[start:end] * 2
            case 3:
                middle, end = b"", len(data)
            case 4:
                middle = rng.choice(PIECES)
            case _:
                middle = rng.choice(PIECES) + data[start:end]
        data = data[:start] + middle + data[end:]
    return data


def png(size: tuple[int, int] = (16, 12), kind: str = "png") -> bytes:
    data = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1])).save(data, format=kind)
    return data.getvalue()


def written(record: Record, path: Path) -> bytes:
    write_records(path, [record])
    return path.read_bytes()


RECORDS: dict[str, Record] = {
    "candidates": Candidate(
        id="a-0", prompt_id="a", prompt="a cat", index=0, seed=1, image="images/a.png", latent="latents/a", size=(8, 8)
    ),
    "regions": Grounding(candidate_id="a-0", regions=[Region(id=1, box=(0, 0, 4, 4), area=16, source="x")]),
    "judgements": Judgement(
        candidate_id="a-0", regions=[RegionJudgement(region_id=1, score=0.5)], layout=LayoutJudgement(score=-0.5)
    ),
    "rewards": RewardMap(candidate_id="a-0", values="r/a", grid=(4, 4), mapping="signed", alpha=0.5, sample_score=0.1),
}


def read_reply(path: Path) -> None:
    reply = path.read_bytes().decode(errors="surrogateescape")
    for reading in (*parse_regions(reply, [1, 2]).values(), parse_layout(reply), parse_layout(reply, False, True)):
        assert (reading.score is None) != (reading.failure is None)
        assert reading.score is None or -1 <= reading.score <= 1


def read_boxes(path: Path) -> None:
    try:
        for _, (x0, y0, x1, y1) in parse_boxes(path.read_bytes().decode(errors="replace")):
            assert x0 < x1 and y0 < y1
    except ProposalError:
        raise SrumError from None


def read_model(path: Path) -> None:
    config = BagelConfig.from_folder(path.parent)
    config.without_effect()


def read_second(path: Path) -> None:
    config = Blip3oConfig.from_folder(path.parent, second_headers())
    config.without_effect()


@cache
def second_headers() -> Headers:
    return read_headers(SECOND)


def read_index(path: Path) -> None:
    weight_files(path.parent)


def read_record(kind: type[Record]) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        for record in read_records(path, kind):
            assert kind.model_validate(record.model_dump(mode="json")) == record  # what is read can be written

    return read


def read_times(path: Path) -> None:
    with StageTimer(path).stage("rollout"):
        pass


def read_request(path: Path) -> None:
    """As ``srum serve`` answers it: what is refused has a message of one line and is the client's fault."""
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise SrumError from None
    service = Service(FakeModel(), "m")
    try:
        for kind in ("chat/completions", "images/generations", "images/edits"):
            service.answer(f"/v1/{kind}", body if isinstance(body, dict) else {})
    except Refused as error:
        assert error.status == 400
        raise SrumError(str(error)) from None
    finally:
        service.line.close()


REQUEST = json.dumps(
    {"prompt": "a cat", "size": "64x64", "timesteps": 4, "guidance": 2.5, "seed": 3, "n": 1, "plan": True}
    | {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is this"}]}], "max_tokens": 8}
    | {"image": f"data:image/png;base64,{b64encode(png()).decode()}"}
).encode()
LINES = b'{"prompt": "a cat", "id": "cat", "metadata": {"tag": "x", "n": 1.5}}\n{"text": "two dogs"}\n'
JUDGED = {"prompt": "a cat", "bad_image_file": "a.png", "good_image_file": "a.png"}
JUDGED |= {"vlm_rewards": [{"object": "cat", "bbox": [0, 0, 4, 4], "score": 0.5, "reason": "fine"}]}  # type: ignore[dict-item]
BOXES = b'[{"label": "cat", "bbox_2d": [1, 2, 30, 40]}, {"label": "dog", "bbox_2d": [1.5, 2, 3, 4]}]'
REPLY = "\n\n".join(
    [region_reply(1, "a cat", 0.5, "fine"), region_reply(2, "a dog", -0.5, "no"), layout_reply(0.1, "x")]
)

# kind: how many, the file's name, its bytes or who makes them, who reads them
Reader = Callable[[Path], Any]
KINDS: dict[str, tuple[int, str, bytes, Reader]] = {
    "replies": (30_000, "x.txt", REPLY.encode(), read_reply),
    "boxes": (10_000, "x.txt", BOXES, read_boxes),
    "prompts": (8_000, "x.jsonl", LINES, read_prompts),
    "prompts as text": (2_000, "x.txt", "a cat\nzwei Hunde\n三只猫\n".encode(), read_prompts),
    "lines of the authors": (6_000, "x.jsonl", json.dumps(JUDGED).encode(), read_lines),
    "times": (2_000, "timings.json", b'{"round-000/rollout": 1.5}', read_times),
    "png": (6_000, "x.png", png(), open_image),
    "jpeg": (3_000, "x.jpg", png(kind="jpeg"), open_image),
    "tiff": (3_000, "x.tiff", png(kind="tiff"), open_image),
    "llm_config": (4_000, "llm_config.json", (CHECKPOINT / "llm_config.json").read_bytes(), read_model),
    "vit_config": (3_000, "vit_config.json", (CHECKPOINT / "vit_config.json").read_bytes(), read_model),
    "config of the second": (3_000, "config.json", (SECOND / "config.json").read_bytes(), read_second),
    "requests": (3_000, "x.json", REQUEST, read_request),
    "index": (3_000, "ema.safetensors.index.json", b'{"weight_map": {"a": "llm_config.json"}}', read_index),
}


def survive(folder: Path, count: int, name: str, data: bytes, read: Reader, seed: int) -> tuple[int, int]:
    """How many mutated files were read, and how many refused in one line; what else is raised leaves the file there."""
    rng, refused = random.Random(seed), 0
    path = folder / name
    for number in range(count):
        path.write_bytes(mutated(data, rng))
        try:
            read(path)
        except SrumError as error:
            assert "\n" not in str(error), f"{number}: {error}"
            refused += 1
        except BaseException:
            path.rename(folder / f"fatal-{name}")
            raise
    return count - refused, refused


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(kind: str, tmp_path: Path) -> None:
    count, name, data, read = KINDS[kind]
    for other in ("llm_config.json", "vit_config.json"):
        shutil.copyfile(CHECKPOINT / other, tmp_path / other)
    if kind == "config of the second":
        shutil.copytree(SECOND / "diffusion-decoder", tmp_path / "diffusion-decoder")
    print(kind, survive(tmp_path, int(count * FACTOR), name, data, read, seed=len(kind)))


@pytest.mark.parametrize("kind", RECORDS)
def test_mutated_records(kind: str, tmp_path: Path) -> None:
    record, path = RECORDS[kind], tmp_path / f"{kind}.jsonl"
    print(
        kind,
        survive(tmp_path, int(3_000 * FACTOR), path.name, written(record, path), read_record(type(record)), seed=1),
    )


def test_mutated_tensors(tmp_path: Path) -> None:
    save_file({"latent": torch.arange(24.0).view(2, 3, 4), "x": torch.ones(2)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    print("safetensors", survive(tmp_path, int(8_000 * FACTOR), "x.safetensors", data, read_tensors, seed=2))


def test_mutated_configs(tmp_path: Path) -> None:
    """Defaults in full take 50 ms to read, so that few of them are: mostly a section of them is."""
    whole = dump(load_config()).encode()
    sections = [part for part in whole.split(b"\ntrain:") if part]
    for number, (count, data) in enumerate([(200, whole), (1_300, sections[0][:300])]):
        print("config", survive(tmp_path, int(count * FACTOR), "x.yaml", data, load_config, seed=number))
    assert isinstance(load_config(), RunConfig)


def test_mutated_exports(tmp_path: Path) -> None:
    run = run_on_fakes(tmp_path / "run", "rounds=1", "prompt_count=1", "candidates_per_prompt=2", "eval.count=0")
    write_export(RunView(run), tmp_path / "x.parquet")

    def read(path: Path) -> None:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        view = read_export(path, out)
        list(view.candidates())

    data = (tmp_path / "x.parquet").read_bytes()
    with warnings.catch_warnings():
        print("parquet", survive(tmp_path, int(500 * FACTOR), "x.parquet", data, read, seed=3))
