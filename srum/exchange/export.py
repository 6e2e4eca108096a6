"""A run as one parquet file for the ``datasets`` library, and back, bit for bit. Needs pyarrow, ``srum[export]``.

A row is a candidate with everything known of it. The image is a struct of its PNG and its name, which ``datasets`` can
show: ``load_dataset("parquet", data_files="run.parquet").cast_column("image", Image())``. Regions and judgements are
lists of structs with the fields of ``srum.records``, null where the stage has not run; the reward map is a list of rows
(h, w) of float32; the latent is the safetensors file. Free dictionaries are JSON. Checkpoints, evaluations and prompts
without a candidate stay behind. What is unpacked goes into images/, latents/ and rewards/ of its round alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from srum.config import dump, parse_config
from srum.images import ImageError
from srum.records import Candidate, Grounding, Judgement, Prompt, Record, RewardMap
from srum.run_dir import CONFIG, RunError, atomic, inside, make_record, record_id, round_dir, write_records, write_text
from srum.views.reading import CandidateView, RunView

T = TypeVar("T")

ROWS = 64  # per row group: what is in memory at a time
CONFIG_KEY = b"srum.config"  # in the metadata of the file
LATER = {"parent", "context"}  # columns that exports of version 0.1.0 may lack

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
        "parent": pa.string(),
        "context": pa.list_(
            pa.struct({"kind": pa.string(), "text": pa.string(), "candidate_id": pa.string()}),
        ),
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
    image cannot be read. Raises RunError, and writes nothing, where a latent cannot be read."""
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

    Raises RunError, before anything is written, for a folder that holds something and for a file that is no export;
    for a row that is none, or that names a file outside the folders of its round, before any of that row is written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty; choose another folder")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path} is not a parquet file: {' '.join(str(error).split())}") from None
    config = (file.schema_arrow.metadata or {}).get(CONFIG_KEY)
    if config is None:
        raise RunError(f"{path} was not written by srum export: it holds no config")
    if lacking := set(SCHEMA.names) - LATER - set(file.schema_arrow.names):
        raise RunError(f"{path} was not written by srum export: it lacks {', '.join(sorted(lacking))}")
    whole_config = parse_config(_parsed(config, f"{path}: its config"))
    records: dict[Path, dict[str, Record]] = {}
    for number, row in enumerate(_rows(file, path), start=1):
        _unpack(row, folder, records, f"{path}: row {number}")
    for name, lines in records.items():
        write_records(name, lines.values())
    write_text(folder / CONFIG, dump(whole_config))  # last: what is half unpacked is no run
    return RunView(folder)


def _rows(file: pq.ParquetFile, path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an export. Raises RunError for what cannot be decoded."""
    try:
        yield from (row for batch in file.iter_batches(ROWS) for row in batch.to_pylist())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {' '.join(str(error).split())[:300]}") from None


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
        "latent": {"bytes": _latent_file(candidate), "path": record.latent},
        "reward": reward.model_dump(mode="json") if reward else None,
        "reward_map": None if values is None else values.tolist(),
    }
    if grounding:
        row |= {"regions": grounding.model_dump(mode="json")["regions"], "grounding_error": grounding.error}
    if judgement:
        said = judgement.model_dump(mode="json")
        row |= {"region_judgements": said["regions"], "layout_judgement": said["layout"]}
    return row


def _latent_file(candidate: CandidateView) -> bytes:
    path = candidate.folder / candidate.record.latent
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}; an export needs the latents") from None


def _unpack(row: dict[str, Any], run: Path, records: dict[Path, dict[str, Record]], where: str) -> None:
    """Write the files of a row into the folder of its round and add its records by id to those of their files."""
    if not isinstance(row["round"], int) or row["round"] < 0:
        raise RunError(f"{where}: round: expected a number from 0, got {row['round']!r}")
    folder = round_dir(run, row["round"])
    made = _records(row, folder, where)
    for path, content in _files(row, made, folder, where).items():
        with atomic(path) as partial:
            partial.write_bytes(content)
    for name, record in made.items():
        records.setdefault(folder / f"{name}.jsonl", {}).setdefault(record_id(record), record)


def _records(row: dict[str, Any], folder: Path, where: str) -> dict[str, Record]:
    """The records of a row, by the name of the stage's file."""

    def made(kind: type[Record], **values: Any) -> Record:
        return make_record(values, kind, folder, where)

    plain = {name: row[name] for name in Candidate.model_fields if row.get(name) is not None}
    paths = {name: (row[name] or {}).get("path") for name in ("image", "latent")}
    metadata, sampling = (_parsed(row[name], f"{where}: {name}") for name in ("metadata", "sampling"))
    records = {
        "prompts": made(Prompt, id=row["prompt_id"], text=row["prompt"], metadata=metadata),
        "candidates": made(Candidate, **(plain | paths | {"sampling": sampling})),
    }
    owner = row["id"]
    if row["regions"] is not None:
        records["regions"] = made(Grounding, candidate_id=owner, regions=row["regions"], error=row["grounding_error"])
    if row["layout_judgement"] is not None:
        said = {"regions": row["region_judgements"], "layout": row["layout_judgement"]}
        records["judgements"] = made(Judgement, candidate_id=owner, **said)
    if row["reward"] is not None:
        records["rewards"] = made(RewardMap, candidate_id=owner, **row["reward"])
    return records


def _files(row: dict[str, Any], records: dict[str, Record], folder: Path, where: str) -> dict[Path, bytes]:
    """The contents of a row's files by their paths: images/, latents/ and rewards/ are all that a row may write to."""
    contents = {"images": row["image"]["bytes"], "latents": row["latent"]["bytes"]}
    names = dict(zip(contents, records["candidates"].files(), strict=True))
    if "rewards" in records:
        contents["rewards"] = save({"reward": torch.tensor(row["reward_map"])})
        (names["rewards"],) = records["rewards"].files()
    if empty := [kind for kind, content in contents.items() if content is None]:
        raise RunError(f"{where}: nothing to write into {empty[0]}/")
    if strays := [name for kind, name in names.items() if not _lies_in(kind, PurePosixPath(name).parts)]:
        raise RunError(f"{where}: {strays[0]!r} is not in images/, latents/ or rewards/")
    return {inside(folder, name): contents[kind] for kind, name in names.items()}


def _lies_in(kind: str, parts: Sequence[str]) -> bool:
    """Whether a path is of a file in the folder ``kind``, or in a sub-folder of it (``srum.stages.rollout.CROWD``)."""
    return len(parts) > 1 and parts[0] == kind


def _parsed(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{where}: not JSON: {error}") from None
