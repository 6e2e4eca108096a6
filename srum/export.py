"""A run as one parquet file for the ``datasets`` library, and back, bit for bit. Needs pyarrow, ``srum[export]``.

A row is a candidate with everything known of it. The image is a struct of its PNG and its name, which ``datasets`` can
show: ``load_dataset("parquet", data_files="run.parquet").cast_column("image", Image())``. Regions and judgements are
lists of structs with the fields of ``srum.records``, null where the stage has not run; the reward map is a list of rows
(h, w) of float32; the latent is the safetensors file. Free dictionaries are JSON. Checkpoints, evaluations and prompts
without a candidate stay behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from srum.config import RunConfig, dump
from srum.reading import CandidateView, RunView
from srum.records import Candidate, Grounding, Judgement, Prompt, Record, RewardMap
from srum.run_dir import CONFIG, ImageError, RunError, atomic, inside, record_id, round_dir, write_records, write_text

T = TypeVar("T")

ROWS = 64  # per row group: what is in memory at a time
CONFIG_KEY = b"srum.config"  # in the metadata of the file

FILE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
SIZE = pa.list_(pa.int32())  # (H, W) or (h, w)
MASK = pa.struct({"size": SIZE, "counts": pa.list_(pa.int32())})
SAID = {
    "score": pa.float64(),
    "reason": pa.string(),
    "failure": pa.string(),
    "raw": pa.string(),
    "attempts": pa.int32(),
    "confidence": pa.float64(),
}
REGION = pa.struct(
    {
        "id": pa.int32(),
        "box": pa.list_(pa.float64()),
        "mask": MASK,
        "area": pa.float64(),
        "source": pa.string(),
        "label": pa.string(),
    }
)
SCHEMA = pa.schema(
    {
        "round": pa.int32(),
        "id": pa.string(),
        "prompt_id": pa.string(),
        "prompt": pa.string(),
        "metadata": pa.string(),
        "index": pa.int32(),
        "seed": pa.int64(),
        "plan": pa.string(),
        "size": SIZE,
        "sampling": pa.string(),
        "image": FILE,
        "latent": FILE,
        "regions": pa.list_(REGION),
        "grounding_error": pa.string(),
        "region_judgements": pa.list_(pa.struct({**SAID, "region_id": pa.int32(), "label": pa.string()})),
        "layout_judgement": pa.struct(SAID),
        "reward": pa.struct(
            {
                "values": pa.string(),
                "grid": SIZE,
                "mapping": pa.string(),
                "alpha": pa.float64(),
                "sample_score": pa.float64(),
            }
        ),
        "reward_map": pa.list_(pa.list_(pa.float32())),
    }
)


def write_export(run: RunView, out: Path) -> tuple[int, int]:
    """Write the candidates of all rounds to the parquet file ``out``; how many, and how many are left out because their
    image cannot be read."""
    schema = SCHEMA.with_metadata({CONFIG_KEY: run.config.model_dump_json().encode()})
    written = unreadable = 0
    with atomic(out) as partial, pq.ParquetWriter(partial, schema) as writer:
        for group in _groups(run.candidates(), ROWS):
            readable = [candidate for candidate in group if _has_image(candidate)]
            writer.write_table(pa.Table.from_pylist([_row(candidate) for candidate in readable], schema))
            written, unreadable = written + len(readable), unreadable + len(group) - len(readable)
    return written, unreadable


def read_export(path: Path, folder: Path) -> RunView:
    """Unpack an export into ``folder``, a new or empty one, and open it as a run; its files are those exported.

    Raises RunError, before anything is written, for a folder that holds something and for a file that is no export.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty; choose another folder")
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise RunError(f"{path} is not a parquet file: {error}") from None
    config = (file.schema_arrow.metadata or {}).get(CONFIG_KEY)
    if config is None:
        raise RunError(f"{path} was not written by srum export: it holds no config")
    records: dict[Path, dict[str, Record]] = {}
    for batch in file.iter_batches(ROWS):
        for row in batch.to_pylist():
            _unpack(row, round_dir(folder, row["round"]), records)
    for name, lines in records.items():
        write_records(name, lines.values())
    write_text(folder / CONFIG, dump(RunConfig.model_validate_json(config)))  # last: what is half unpacked is no run
    return RunView(folder)


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _has_image(candidate: CandidateView) -> bool:
    try:
        candidate.image()
    except ImageError:
        return False
    return True


def _row(candidate: CandidateView) -> dict[str, Any]:
    record, grounding, judgement, reward = candidate.record, candidate.grounding, candidate.judgement, candidate.reward
    values = candidate.reward_map()
    row = record.model_dump(mode="json") | {
        "round": candidate.round,
        "metadata": json.dumps(candidate.prompt.metadata, ensure_ascii=False),
        "sampling": json.dumps(record.sampling, ensure_ascii=False),
        "image": {"bytes": (candidate.folder / record.image).read_bytes(), "path": record.image},
        "latent": {"bytes": (candidate.folder / record.latent).read_bytes(), "path": record.latent},
        "reward": reward.model_dump(mode="json") if reward else None,
        "reward_map": None if values is None else values.tolist(),
    }
    if grounding:
        row |= {"regions": grounding.model_dump(mode="json")["regions"], "grounding_error": grounding.error}
    if judgement:
        said = judgement.model_dump(mode="json")
        row |= {"region_judgements": said["regions"], "layout_judgement": said["layout"]}
    return row


def _unpack(row: dict[str, Any], folder: Path, records: dict[Path, dict[str, Record]]) -> None:
    """Write the files of a row into the ``folder`` of its round, and add its records by id to those of their files."""
    owner = {"candidate_id": row["id"]}
    fields = {name: row[name] for name in Candidate.model_fields}
    files = {name: row[name]["path"] for name in ("image", "latent")}
    for name in files:
        with atomic(inside(folder, row[name]["path"])) as partial:
            partial.write_bytes(row[name]["bytes"])
    prompt = Prompt(id=row["prompt_id"], text=row["prompt"], metadata=json.loads(row["metadata"]))
    candidate = Candidate.model_validate(fields | files | {"sampling": json.loads(row["sampling"])})
    found: dict[str, Record] = {"prompts": prompt, "candidates": candidate}
    if row["regions"] is not None:
        facts = {"regions": row["regions"], "error": row["grounding_error"]}
        found["regions"] = Grounding.model_validate(owner | facts)
    if row["layout_judgement"] is not None:
        facts = {"regions": row["region_judgements"], "layout": row["layout_judgement"]}
        found["judgements"] = Judgement.model_validate(owner | facts)
    if row["reward"] is not None:
        reward = RewardMap.model_validate(owner | row["reward"])
        with atomic(inside(folder, reward.values)) as partial:
            save_file({"reward": torch.tensor(row["reward_map"])}, partial)
        found["rewards"] = reward
    for name, record in found.items():
        records.setdefault(folder / f"{name}.jsonl", {}).setdefault(record_id(record), record)
