"""RvR's training pairs as its authors keep them (docs/specs/rvr.md, 3), read as a round of ours and written from one.

A row of parquet has ``image_list``, two paths from one data root, the misaligned image and the aligned one (a list, or
the text of a list), and ``user_prompt``, a list whose first entry is the prompt. A row for text to image has one image
in ``image_list``, or its path in ``cache_image``. Any other number of images is an error of that row.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from PIL.Image import Image
from safetensors.torch import save_file

from srum.exchange.interchange import claim_import, fault
from srum.images import open_image, save_image
from srum.models.base import UnifiedModel
from srum.records import Candidate, Pair, Prompt
from srum.run_dir import RunError, atomic, inside, read_by_id, read_records, run_stage, write_json, write_records
from srum.views.reading import RunView

BATCH = 16  # images per shard
MISALIGNED, ALIGNED = -1.0, 1.0  # the scores of pairs that others have labelled


class Row(NamedTuple):
    """The prompt, and the image that meets it, last; before it, in a pair, the one that misses it."""

    prompt: str
    images: tuple[str, ...]


def import_pairs(path: Path, images: Path, model: UnifiedModel, folder: Path) -> tuple[int, list[str]]:
    """Make a round in ``folder``, up to its pairs, of a parquet file, or a folder of them, and images under ``images``.

    Returns how many pairs there are, and what is wrong with the rows that were left out. It goes on with an import that
    was interrupted: which one is in ``imported.json``. Raises RunError for a folder that holds another round, be it of
    the same files with other rows, and where no row can be used.
    """
    rows, problems = read_rows(path)
    if not rows:
        raise RunError(f"{path}: no row that can be used" + (f"; {problems[0]}" if problems else ""))
    claim_import(folder, {"pairs": path.name, "sha256": _digest(path), "images": str(images.resolve())})
    names = {f"{name}-{n}": (row, file) for name, row in rows.items() for n, file in enumerate(row.images)}

    def work(batch: Mapping[str, tuple[Row, str]]) -> list[Candidate]:
        made = []
        for name, (row, file) in batch.items():
            try:
                image = open_image(inside(images, file))
            except RunError:
                continue  # named below, also where an earlier call met it
            made.append(_candidate(name, row, image, file, model, folder))
        return made

    write_records(folder / "prompts.jsonl", [Prompt(id=name, text=row.prompt) for name, row in rows.items()])
    read = {candidate.id for candidate in run_stage(folder, "candidates", Candidate, names, BATCH, work, gaps=True)}
    left_out = {name: file for name, (_, file) in names.items() if name not in read}
    problems += [f"{name.rpartition('-')[0]}: {fault(images, file)}" for name, file in left_out.items()]
    pairs = [
        Pair(
            id=f"{name}-pair",
            prompt_id=name,
            prompt=row.prompt,
            misaligned=f"{name}-0",
            aligned=f"{name}-1",
            misaligned_score=MISALIGNED,
            aligned_score=ALIGNED,
        )
        for name, row in rows.items()
        if len(row.images) == 2 and {f"{name}-0", f"{name}-1"} <= read
    ]
    if not pairs:
        raise RunError(f"{path}: no pair that can be used" + (f"; {problems[0]}" if problems else ""))
    write_records(folder / "pairs.jsonl", pairs)
    return len(pairs), problems


def _candidate(name: str, row: Row, image: Image, file: str, model: UnifiedModel, folder: Path) -> Candidate:
    """The image of ``file`` at the size at which it is encoded, and its latent."""
    resized = model.resized(image)
    prompt_id, _, index = name.rpartition("-")
    candidate = Candidate(
        id=name,
        prompt_id=prompt_id,
        prompt=row.prompt,
        index=int(index),
        seed=0,
        image=f"images/{name}.png",
        latent=f"latents/{name}.safetensors",
        size=(resized.height, resized.width),
        sampling={"imported": PurePath(file).name},
    )
    save_image(resized, folder / candidate.image)
    with atomic(folder / candidate.latent) as partial:
        save_file({"latent": model.encode([resized])[0].contiguous()}, partial)
    return candidate


def read_rows(path: Path) -> tuple[dict[str, Row], list[str]]:
    """The rows by name, and what is wrong with the others. Raises RunError for a file that is no parquet."""
    pyarrow = _pyarrow()
    files = _files(path)
    if not files:
        raise RunError(f"{path} has no .parquet file")
    rows: dict[str, Row] = {}
    problems = []
    for number, file in enumerate(files):
        try:
            table = pyarrow.parquet.read_table(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise RunError(f"{file} is no parquet file: {error}") from None
        for place, values in enumerate(table.to_pylist()):
            try:
                rows[f"file-{number:03d}-row-{place:07d}"] = row_of(values)
            except ValueError as error:
                problems.append(f"{file}:{place}: {error}")
    return rows, problems


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.parquet")) if path.is_dir() else [path]


def _digest(path: Path) -> str:
    """Of all files, in their order."""
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _pyarrow() -> Any:
    """The library. Raises RunError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise RunError("pyarrow is missing: pip install 'srum[export]'") from None
    return pyarrow


def row_of(values: Mapping[str, Any]) -> Row:
    """A row of plain values. Raises ValueError that names the field."""
    prompts = values.get("user_prompt")
    if isinstance(prompts, str):  # of which the released loader would take the first letter
        raise ValueError(f"user_prompt: expected a list whose first entry is the prompt, got the text {prompts[:40]!r}")
    if not prompts or not isinstance(prompts[0], str) or not prompts[0].strip():
        raise ValueError(f"user_prompt: expected a list whose first entry is the prompt, got {prompts!r:.60}")
    images = _paths(values.get("image_list") or values.get("cache_image"))
    if len(images) not in (1, 2):
        raise ValueError(f"image_list: expected two images, or one for text to image, got {len(images)}")
    return Row(prompts[0], images)


def _paths(value: Any) -> tuple[str, ...]:
    """The paths of a list, of the text of a list, or of one text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"image_list: {value[:60]!r} is no list") from None
    paths = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(path, str) for path in paths):
        raise ValueError(f"image_list: expected paths, got {paths!r:.60}")
    return tuple(paths)


def write_pairs(run: RunView, out: Path) -> int:
    """Write the pairs of all rounds to ``out`` and, beside it, ``parquet_info.json``; how many there are.

    Paths lead from the folder of the run. Raises RunError where there are none.
    """
    pyarrow = _pyarrow()
    rows = [row for k in run.rounds for row in _rows(run.folder, f"round-{k:03d}")]
    if not rows:
        raise RunError(f"{run.folder} has no pairs: srum pair makes them")
    table = pyarrow.Table.from_pylist(rows)
    with atomic(out) as partial:
        pyarrow.parquet.write_table(table, partial)
    groups = pyarrow.parquet.ParquetFile(out).num_row_groups
    write_json(out.with_name("parquet_info.json"), {str(out): {"num_row_groups": groups}})
    return len(rows)


def _rows(run: Path, name: str) -> Iterator[dict[str, list[str]]]:
    folder = run / name
    if not (folder / "pairs.jsonl").exists():
        return
    candidates = read_by_id(folder / "candidates.jsonl", Candidate)
    for pair in read_records(folder / "pairs.jsonl", Pair):
        images = [f"{name}/{candidates[side].image}" for side in (pair.misaligned, pair.aligned)]
        yield {"image_list": images, "user_prompt": [pair.prompt]}
