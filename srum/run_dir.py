"""The folder of a run: what is in it, how it is written, how it is read back after an interruption.

    runs/NAME/
      config.yaml  made_with.json  timings.json  summary.json  report.html
      eval/ARM/                  verdicts.jsonl, images/: every arm after the last round, on the held-out prompts
      round-000/
        prompts.jsonl candidates.jsonl regions.jsonl judgements.jsonl rewards.jsonl  counts.json
        imported.json                     only of srum import: the lines and the folder of images that it is from
        images/ latents/ rewards/         PNG and safetensors, addressed by candidate id
        pictures.jsonl pictures/ latents/ images read for reconstruction (srum/pictures.py); pairs.jsonl (srum/pairs.py)
        train/ARM/                        metrics.jsonl, checkpoints/, model/ (official layout), adapter/ (LoRA)

A stage cuts the items that it has no record of into batches, in order. A finished batch is one shard,
``candidates.parts/00003.jsonl``; when all items are done the shards become ``candidates.jsonl``, and the stage is
finished. Files and shards appear by rename, so a kill at any moment loses at most one batch of every process, and the
next attempt, with any number of processes, does that batch again; with the same batch size it has the same members.
What is there is asked of the disk by process 0 and told to the others. A stage is repeated after its file has been
deleted. Lines are records with the schema's version.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from pydantic import ValidationError
from tqdm import tqdm

from srum.config import CONFIG, FREE, RunConfig, differing_fields, dump, load_config
from srum.disk import DiskFullError, writing
from srum.errors import SrumError
from srum.json_files import as_unicode, read_json
from srum.processes import Processes
from srum.provenance import next_entry, read_entries
from srum.records import FILE_SAFE, SCHEMA_VERSION, Prompt, Record

MADE_WITH = "made_with.json"
PARTS = ".parts"  # how the folder of a stage's shards ends
T = TypeVar("T")
R = TypeVar("R", bound=Record)

STAGE_OF = {
    "prompts": "rollout",
    "candidates": "rollout",
    "regions": "ground",
    "judgements": "judge",
    "rewards": "rasterize",
    "pictures": "images",
    "pairs": "pair",
    "verdicts": "eval",
}  # the command that writes a file of this name
NAMED = 3  # ids that an error names
LONGEST_PROMPT_ID = 100  # characters; the ids of candidates are longer


class RunError(SrumError, ValueError):
    """A file or folder that a run cannot go on with; the message is one line and names it."""


class ImageError(RunError):
    """An image that cannot be read, or has no pixels."""


# --- the folder


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other launch works in ``folder`` meanwhile; it is made where there is none.

    Process 0 of a launch holds a lock on the hidden file ``.lock``; the system takes it back when the process ends, in
    whatever way. Raises RunError where another launch holds it and, writing nothing, for a folder that is no run's.
    """
    processes = Processes.here()
    lock = FileLock(folder / ".lock")

    def acquire() -> None:
        if not (folder / CONFIG).exists():
            _require_empty(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            raise RunError(f"{folder}: another srum is at work in it; wait for it, or choose another folder") from None
        except OSError as error:
            raise RunError(f"{folder} cannot be worked in: {error.strerror}") from None

    processes.once(acquire)
    try:
        yield
    finally:
        lock.release()


def _require_empty(folder: Path) -> None:
    if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise RunError(f"{folder} is not empty and has no {CONFIG}; choose another folder")


def claim_run(folder: Path, config: RunConfig, resume: bool = False) -> None:
    """Make ``folder`` the folder of a run with this config, or go on in it where ``resume`` allows that.

    Fields that change no result (``config.FREE``) may differ, and there may be more rounds: the folder's config is then
    the one given here. Results of what was the last round (eval/, summary.json) go into its folder. Fields that the
    folder's config lacks, because it is of older code, get their defaults, of which a warning tells. What the run is
    made with goes into ``made_with.json``. Raises RunError, and writes nothing, for a folder of another config (naming
    the fields), for an existing run without ``resume``, and for a folder that holds something else.
    """
    if not (folder / CONFIG).exists():
        _require_empty(folder)
        write_text(folder / CONFIG, dump(config))
        _note_launch(folder, config, [])
        return
    existing = load_config(folder / CONFIG)
    grows = config.rounds > existing.rounds
    if different := differing_fields(existing, config, besides=(*FREE, "rounds") if grows else FREE):
        raise RunError(f"{folder} is a run of another config ({'; '.join(different)}); choose another folder")
    if not resume:
        raise RunError(f"{folder} already holds this run; pass --resume to go on with it")
    changes = [change.replace(" != ", " -> ") for change in differing_fields(existing, config)]
    added = list(
        _lacking(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")) or {}, existing.model_dump(mode="json"))
    )
    if added:
        warnings.warn(f"{folder / CONFIG} is of older code; today's adds the defaults {'; '.join(added)}", stacklevel=2)
    _note_launch(folder, config, [*changes, *(f"{field} (default of a field that was not there)" for field in added)])
    if grows:
        _put_results_aside(folder, existing.rounds)
    if config != existing or added:
        write_text(folder / CONFIG, dump(config))


def _lacking(values: Mapping[str, Any], complete: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """``reward.binary: False`` for every field of a complete config that the ``values`` of a file lack."""
    for key, value in complete.items():
        if key not in values:
            yield f"{prefix}{key}: {value}"
        elif isinstance(value, dict):
            yield from _lacking(values[key] or {}, value, f"{prefix}{key}.")


def _note_launch(folder: Path, config: RunConfig, notes: Sequence[str]) -> None:
    """Add this launch to ``made_with.json`` where it changes something."""
    entries = read_entries(folder / MADE_WITH)
    if not entries and round_dirs(folder):
        notes = ["what it was begun with was not recorded", *notes]
    if entry := next_entry(entries, config.device, notes):
        write_json(folder / MADE_WITH, [*entries, entry])


def _put_results_aside(folder: Path, rounds: int) -> None:
    """Move the results after so many rounds to where ``srum eval --round`` puts them: they are no longer the last."""
    last = round_dir(folder, rounds - 1)
    if (folder / "eval").exists():
        shutil.rmtree(last / "eval", ignore_errors=True)
        (folder / "eval").rename(last / "eval")
    if (folder / "summary.json").exists():
        (folder / "summary.json").replace(last / "summary.json")


def round_dirs(folder: Path) -> list[Path]:
    """The rounds that a run has, in order; a copy such as ``round-000.bak`` is none."""
    return [
        path for path in sorted(folder.glob("round-*")) if re.fullmatch(r"round-\d{3,}", path.name) and path.is_dir()
    ]


def round_dir(folder: Path, round_index: int) -> Path:
    """``round-000`` of a run."""
    return folder / f"round-{round_index:03d}"


# --- files


def inside(folder: Path, name: str) -> Path:
    """The path of a file of ``folder``, which need not exist.

    Names come from anywhere, and so do links: raises RunError where they lead out of the folder. Those of a folder in
    the hub's cache lead to the blobs of its repository (snapshots/REVISION/x -> ../../blobs/HASH), which is fine.
    """
    home = folder.resolve()
    if "\0" in name or not any(_real(folder / name).is_relative_to(place) for place in (home, *_blobs(home))):
        raise RunError(f"{name!r} is not in {folder}")
    return folder / name


def _real(path: Path) -> Path:
    """Where links lead; of a link that leads to itself the path (``Path.resolve`` raises until Python 3.13)."""
    return Path(os.path.realpath(path))


def _blobs(folder: Path) -> list[Path]:
    """Where the files of a ``folder`` in the hub's cache are: datasets--owner--name/blobs."""
    revisions = (above for above in (folder, *folder.parents) if above.parent.name == "snapshots")
    return [above.parents[1] / "blobs" for above in revisions if "--" in above.parents[1].name]


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; the file takes its name, and its folder exists, once it is complete.

    Raises DiskFullError where the disk is full; what was written then goes.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # what a kill left; a link there would be written through
            yield partial
            partial.replace(path)
    except DiskFullError:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file at once."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file at once."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def claim_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep in settings.json what a folder is made with, plain values. Raises RunError, naming what differs, where that
    is something else: what is there would be mixed with what is to come."""
    held, wanted = folder / "settings.json", json.loads(json.dumps(settings))
    if not held.exists():
        write_json(held, wanted)
        return
    there = read_json(held)
    if changed := [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]:
        raise RunError(
            f"{folder} was made with other settings ({held.name}: {', '.join(changed)}); delete it, or choose another"
        )


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines at once, each with the schema's version."""
    lines = ({"schema": SCHEMA_VERSION} | record.model_dump(mode="json") for record in records)
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_records(path: Path, kind: type[R]) -> list[R]:
    """The records of a file of JSON lines.

    Raises RunError, naming file and line, for a missing file, a torn last line (which only the stage that writes the
    file can mend, ``run_stage``), any other malformed line, and one that names a file outside the file's folder.
    """
    records, torn = _read_whole_lines(path, kind)
    if torn:
        again = f"srum {STAGE_OF[path.stem]}" if path.stem in STAGE_OF else "the stage that writes it"
        raise RunError(f"{path}:{len(records) + 1} is torn; run `{again}` again, which mends it")
    return records


def read_by_id(path: Path, kind: type[R], ids: Collection[str] | None = None, gaps: bool = False) -> dict[str, R]:
    """The records of a finished stage by the id of what they are about.

    There must be one for each of ``ids`` (None: any) or, with ``gaps``, at most one; else RunError names file and
    ids. Raises as ``read_records`` does.
    """
    return _by_id(path, read_records(path, kind), ids, gaps)


def _by_id(path: Path, records: Sequence[R], ids: Collection[str] | None, gaps: bool) -> dict[str, R]:
    found = {record_id(record): record for record in records}
    expected = found if ids is None else ids
    faults = {
        "nothing about": [] if gaps else [name for name in expected if name not in found],
        "records about the unknown": [name for name in found if name not in expected],
        "several records about": [name for name, count in Counter(map(record_id, records)).items() if count > 1],
    }
    if any(faults.values()):
        said = "; ".join(f"{fault} {_some(names)}" for fault, names in faults.items() if names)
        raise RunError(f"{path} holds {said}; delete it and what was made of it, and run its stage again")
    return found


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def _read_whole_lines(path: Path, kind: type[R]) -> tuple[list[R], bool]:
    """The records, and whether a torn last line followed them."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the stage that writes it has not finished") from None
    folder = path.parent.parent if path.parent.suffix == PARTS else path.parent
    records: list[R] = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) and not line.endswith(b"\n"):
                return records, True
            raise RunError(f"{path}:{number}: not JSON: {line[:80]!r}") from None
        where = f"{path}:{number}"
        if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA_VERSION:
            raise RunError(f"{where}: not a record of schema version {SCHEMA_VERSION}")
        records.append(make_record(values, kind, folder, where))
    return records, False


def make_record(values: Mapping[str, Any], kind: type[R], folder: Path, where: str) -> R:
    """The record of plain ``values`` that came from ``where``. Raises RunError, also for files outside ``folder``."""
    try:
        record = kind.model_validate(values)
        for name in record.files():
            inside(folder, name)
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(map(str, detail["loc"])) or kind.__name__
        raise RunError(f"{where}: {field}: {detail['msg'].removeprefix('Value error, ')}") from None
    except RunError as error:
        raise RunError(f"{where}: {error}") from None
    return record


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG at once."""
    with atomic(path) as partial:
        image.save(partial, format="png")


def open_image(path: Path) -> Image.Image:
    """The RGB image of a file (``to_rgb``).

    Raises ImageError, naming the file, where it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow's readers raise
        raise ImageError(f"{path} is not a readable image: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB, turned as its EXIF orientation says, its pixels as stored: 16-bit grey is scaled, what is
    transparent lies on white.

    Numbers with a fraction are taken for shares of 1, of 255 or of 65535, the first that none exceeds. Raises
    ImageError for an image without pixels, or with some that are no numbers.
    """
    if 0 in image.size:
        raise ImageError(f"an image of {image.width}x{image.height} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        image = _from_floats(np.asarray(image))
    elif image.mode.startswith("I"):  # 16 bits, perhaps kept in 32; Pillow would cut them off at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _from_floats(values: np.ndarray) -> Image.Image:
    """The grey image of numbers (H, W)."""
    if not np.isfinite(values).all():
        raise ImageError("an image with pixels that are no numbers")
    white = next((limit for limit in (1, 255, 65535) if values.max() <= limit), float(values.max()))
    return Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))


# --- stages


def run_stage(
    folder: Path,
    name: str,
    kind: type[R],
    items: Mapping[str, T],
    batch_size: int,
    work: Callable[[Mapping[str, T]], list[R]],
    gaps: bool = False,
) -> list[R]:
    """The records of a stage: read from ``NAME.jsonl`` where finished, else computed batch by batch and kept.

    ``items`` are by id, in order; ``work`` turns a batch of them into a record for each or, with ``gaps``, for some.
    The first field of a record is the id of its item. Items without a record are tried again after an interruption.
    Several processes share the batches that are missing; all return all records, in the order of the items. Raises
    RunError, naming the file, where it holds records of other items or, finished, not of all.
    """
    final, parts = folder / f"{name}.jsonl", folder / f"{name}{PARTS}"
    processes = Processes.here()
    complete, done, shards = processes.once(lambda: _what_is_there(final, parts, kind, items, batch_size, gaps))
    if complete:
        return [done[key] for key in items if key in done]
    missing = [(key, item) for key, item in items.items() if key not in done]
    batches = [dict(missing[start : start + batch_size]) for start in range(0, len(missing), batch_size)]
    own = range(len(batches))[processes.rank :: processes.count]
    made: list[R] = []
    first = processes.rank == 0
    total = len(done) + sum(len(batches[number]) for number in own)
    with tqdm(total=total, initial=len(done), desc=name, disable=None if first else True) as bar:
        for number in own:
            records = work(batches[number])
            write_records(_shard(parts, shards + number), records)
            made += records
            bar.update(len(batches[number]))
    done |= {record_id(record): record for record in processes.joined(made)}
    merged = [done[key] for key in items if key in done]
    processes.once(lambda: _finish(final, parts, merged))
    return merged


def _shard(parts: Path, number: int) -> Path:
    return parts / f"{number:05d}.jsonl"


def _what_is_there(
    final: Path, parts: Path, kind: type[R], items: Collection[str], batch_size: int, gaps: bool
) -> tuple[bool, dict[str, R], int]:
    """Whether the stage is finished, the records that it has, by id, and from which number on its next shards count.

    A torn file becomes a shard, a torn shard goes.
    """
    if final.exists():
        records, torn = _read_whole_lines(final, kind)
        if not torn:
            _drop(parts)
            return True, _by_id(final, records, items, gaps), 0
        _warn_of_torn(final)
        _back_to_parts(final, parts, list(items), batch_size, records)
    done: dict[str, R] = {}
    last = -1
    for shard in sorted(parts.glob("*.jsonl")):
        records, torn = _read_whole_lines(shard, kind)
        if torn:
            _warn_of_torn(shard)
            shard.unlink()
            continue
        done |= _by_id(shard, records, items, gaps=True)
        last = int(shard.stem)
    return False, done, last + 1


def _warn_of_torn(path: Path) -> None:
    warnings.warn(f"{path} ends in a torn line; its batch is done again", stacklevel=2)


def _back_to_parts(final: Path, parts: Path, ids: Sequence[str], batch_size: int, records: Sequence[Record]) -> None:
    """One shard of the batches that a torn file still holds whole: those before the batch of its last record."""
    place = {name: number for number, name in enumerate(ids)}
    _by_id(final, records, place, gaps=True)
    end = place[record_id(records[-1])] // batch_size * batch_size if records else 0
    write_records(_shard(parts, 0), [record for record in records if place[record_id(record)] < end])
    final.unlink()


def _finish(final: Path, parts: Path, records: Sequence[Record]) -> None:
    write_records(final, records)
    _drop(parts)


def _drop(parts: Path) -> None:
    """Remove the shards of a finished stage, also those that a kill left: they would outlive its deleted file."""
    shutil.rmtree(parts, ignore_errors=True)


def record_id(record: Record) -> str:
    """The id of what a record is about: its first field."""
    return str(getattr(record, next(iter(type(record).model_fields))))


def forget(folder: Path, name: str, kind: type[R], unwanted: Callable[[R], bool]) -> None:
    """Have a stage, be it finished, do those items again whose records are ``unwanted``."""
    final, parts = folder / f"{name}.jsonl", folder / f"{name}{PARTS}"

    def rewrite() -> None:
        for path in [*parts.glob("*.jsonl"), *([final] if final.exists() else [])]:
            records, torn = _read_whole_lines(path, kind)
            wanted = [record for record in records if not unwanted(record)]
            if torn or len(wanted) == len(records):
                continue  # torn, it is the stage's to mend
            write_records(_shard(parts, 0) if path == final else path, wanted)
            if path == final:
                final.unlink()

    Processes.here().once(rewrite)


def finished(folder: Path, name: str) -> bool:
    """Whether the stage has written its file, and whole: a torn last line sends it back to ``run_stage``."""
    path = folder / f"{name}.jsonl"

    def whole() -> bool:
        if not path.exists() or path.read_bytes()[-1:] not in (b"", b"\n"):
            return False
        _drop(folder / f"{name}{PARTS}")
        return True

    return Processes.here().once(whole)


# --- prompts

PROMPT_FILES = (".jsonl", ".txt")  # how their names end


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a user's file, in order; blank lines are passed over.

    ``.txt``: a prompt per line. ``.jsonl``: an object per line with ``prompt`` or ``text``, and perhaps an ``id``
    (letters, digits and ``._-``; else it is ``line-0007``) and ``metadata``; other fields (GenEval's ``tag`` and
    ``include``) are metadata themselves. A line with half of a surrogate pair, which JSON can hold and no file in
    UTF-8, is left out with a warning that names it. Raises RunError, naming the line.
    """
    parse = _text_prompt if path.suffix == ".txt" else _json_prompt
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise RunError(f"cannot read the prompts {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: not UTF-8 at byte {error.start}") from None
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = parse(line.strip(), number, f"{path}:{number}")
        if prompt is None:
            continue
        if prompt.id in prompts:
            raise RunError(f"{path}:{number}: the id {prompt.id!r} is taken by an earlier line")
        prompts[prompt.id] = prompt
    if not prompts:
        raise RunError(f"{path}: no prompts in it")
    return list(prompts.values())


def _text_prompt(line: str, number: int, where: str) -> Prompt:
    return Prompt(id=f"line-{number:04d}", text=line)


def _json_prompt(line: str, number: int, where: str) -> Prompt | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RunError(f"{where}: expected an object with 'prompt', got {type(values).__name__}")
    if not _is_unicode(values):
        warnings.warn(f"{where} is left out: it holds half of a surrogate pair, such as \\ud83d alone", stacklevel=3)
        return None
    text = values.get("prompt", values.get("text"))
    if not isinstance(text, str) or not text.strip():
        raise RunError(f"{where}: expected a text in 'prompt' or 'text', got {text!r}")
    name = values.pop("id", f"line-{number:04d}")
    if not isinstance(name, str) or not FILE_SAFE.fullmatch(name) or len(name) > LONGEST_PROMPT_ID:
        raise RunError(f"{where}: id {name!r} cannot name a file; use at most {LONGEST_PROMPT_ID} letters, digits, ._-")
    metadata = values.get("metadata", values if set(values) - {"prompt", "text"} else {})
    if not isinstance(metadata, dict):
        raise RunError(f"{where}: expected an object in 'metadata', got {type(metadata).__name__}")
    return Prompt(id=name, text=text.strip(), metadata=metadata)


def _is_unicode(values: Any) -> bool:
    """Whether a file in UTF-8 can hold what was JSON."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


# --- times


class StageTimer:
    """Seconds per stage, added up over errors and interruptions short of a kill, in ``timings.json``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to ``name``."""
        start = time.perf_counter()
        try:
            yield
        except DiskFullError:
            raise  # and no room for this
        except BaseException:
            self._add(name, start)
            raise
        self._add(name, start)

    def _add(self, name: str, start: float) -> None:
        kept = read_json(self.path).items() if self.path.exists() else ()
        seconds = {as_unicode(stage): value for stage, value in kept if isinstance(value, int | float)}
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 3)
        write_json(self.path, seconds)
