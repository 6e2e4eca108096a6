"""The folder of a run: what is in it, how it is written, how it is read back after an interruption.

    runs/NAME/
      config.yaml  made_with.json  timings.json  summary.json  report.html
      prompts.txt or .jsonl             the user's file of prompts as it was when the run began
      eval/ARM/                  verdicts.jsonl, images/: every arm after the last round, on the held-out prompts
      own/ARM/  own.json         the same of prompts held out of one's own file, by the judge (srum/own.py)
      round-000/
        prompts.jsonl candidates.jsonl regions.jsonl judgements.jsonl rewards.jsonl  counts.json
        rollout_counts.json               only of a server's images: how many came, why others did not
        imported.json                     only of srum import: the lines and the folder of images that it is from
        images/ latents/ rewards/         PNG and safetensors, addressed by candidate id
        pictures.jsonl pictures/          images read for reconstruction and their latents, linked to RUN/latent_cache/
                                          (srum/stages/pictures.py)
        pairs.jsonl                       which candidate is learned from which (srum/stages/pairs.py)
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
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml
from filelock import FileLock, Timeout
from pydantic import ValidationError

from srum.config import CONFIG, FREE, RunConfig, differing_fields, dump, load_config
from srum.disk import DiskFullError, writing
from srum.errors import SrumError, first_fault
from srum.json_files import read_json
from srum.lazy import Lazy
from srum.processes import Processes
from srum.progress import counting
from srum.provenance import next_entry, read_entries
from srum.records import SCHEMA_VERSION, Record
from srum.stages import STAGE_OF

MADE_WITH = "made_with.json"
RESULTS = ("eval", "summary.json", "own", "own.json")  # of the weights after the last round
PARTS = ".parts"  # how the folder of a stage's shards ends
T = TypeVar("T")
R = TypeVar("R", bound=Record)

VERSIONED = f'{{"schema": {SCHEMA_VERSION}, '.encode()  # how a line begins
SECOND_VALUE = re.compile(rb'\{"schema": \d+, "\w+": "([A-Za-z0-9._-]+)"')
LARGEST_FILE = 2**44  # bytes of a file of records
NAMED = 3  # ids that an error names


class RunError(SrumError, ValueError):
    """A file or folder that a run cannot go on with; the message is one line and names it."""


# --- the folder


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """As ``locked``, of the folder of a run. Raises RunError, writing nothing, for one that is no run's."""
    Processes.here().once(lambda: None if (folder / CONFIG).exists() else _require_empty(folder))
    with locked(folder):
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other launch works in ``folder`` meanwhile; it is made where there is none.

    Process 0 of a launch holds a lock on the hidden file ``.lock``; the system takes it back when the process ends, in
    whatever way. Raises RunError where another launch holds it.
    """
    processes = Processes.here()
    lock = FileLock(folder / ".lock")

    def acquire() -> None:
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
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; choose a folder")
    if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise RunError(f"{folder} is not empty and has no {CONFIG}; choose another folder")


def claim_run(folder: Path, config: RunConfig, resume: bool = False) -> None:
    """Make ``folder`` the folder of a run with this config, or go on in it where ``resume`` allows that.

    Fields that change no result (``config.FREE``) may differ, and there may be more rounds: the folder's config is then
    the one given here. Results of what was the last round (``RESULTS``) go into its folder. Fields that the
    folder's config lacks, because it is of older code, get their defaults, of which a warning tells. What the run is
    made with goes into ``made_with.json``. Raises RunError, and writes nothing, for a folder of another config (naming
    the fields), for an existing run without ``resume``, and for a folder that holds something else.

    A user's file of prompts is copied into the folder once (``prompts_copy``), so that what is held out of it stays so.
    """
    if not (folder / CONFIG).exists():
        _require_empty(folder)
        write_text(folder / CONFIG, dump(config))
        _copy_prompts(folder, config)
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
    _copy_prompts(folder, config)


def prompts_copy(folder: Path, config: RunConfig) -> Path:
    """Where a run keeps the file of prompts that its config names."""
    return inside(folder, f"prompts{Path(config.prompts).suffix}")


def _copy_prompts(folder: Path, config: RunConfig) -> None:
    """Of a file that is there, and in a run without a copy."""
    source, copy = Path(config.prompts), prompts_copy(folder, config)
    if source.suffix and source.is_file() and not copy.exists():
        with atomic(copy) as partial:
            shutil.copyfile(source, partial)


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
    for name in RESULTS:
        if (folder / name).exists():
            shutil.rmtree(last / name, ignore_errors=True)
            (folder / name).replace(last / name)


def round_dirs(folder: Path) -> list[Path]:
    """The rounds that a run has, in order; a copy such as ``round-000.bak`` is none."""
    return [
        path for path in sorted(folder.glob("round-*")) if re.fullmatch(r"round-\d{3,}", path.name) and path.is_dir()
    ]


def round_dir(folder: Path, round_index: int) -> Path:
    """``round-000`` of a run."""
    return folder / f"round-{round_index:03d}"


# --- files


class Home:
    """A folder that names come into from anywhere. Where its own folders lead is asked once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        home = folder.resolve()
        self._places = (home, *_blobs(home))
        self._known: set[str] = set()  # folders from here that lie inside

    def path(self, name: str) -> Path:
        """As :func:`inside`."""
        above, _, last = name.rpartition("/")
        path = self.folder / name
        inner = above in self._known and not name.startswith("/")
        if inner and last not in ("", ".", "..") and "\0" not in name and not path.is_symlink():
            return path
        if "\0" in name or not self._holds(path):
            raise RunError(f"{name!r} is not in {self.folder}")
        if self._holds(self.folder / above):
            self._known.add(above)
        return path

    def _holds(self, path: Path) -> bool:
        return any(_real(path).is_relative_to(place) for place in self._places)


def inside(folder: Path, name: str) -> Path:
    """The path of a file of ``folder``, which need not exist.

    Names come from anywhere, and so do links: raises RunError where they lead out of the folder. Those of a folder in
    the hub's cache lead to the blobs of its repository (snapshots/REVISION/x -> ../../blobs/HASH), which is fine.
    """
    return Home(folder).path(name)


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
            f"{folder} holds work of other settings or weights ({held.name}: {', '.join(changed)}); "
            "choose another, or delete it"
        )


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines at once, each with the schema's version."""
    lines = ({"schema": SCHEMA_VERSION} | record.model_dump(mode="json") for record in records)
    _write_lines(path, (f"{json.dumps(line, ensure_ascii=False)}\n".encode() for line in lines))


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    with atomic(path) as partial, partial.open("wb") as file:
        file.writelines(lines)


class Records(Mapping[str, R]):
    """Records by the id of what they are about, in the order of their lines.

    They stay in their files: kept of each is its id and where its line begins, and it is parsed whenever it is asked
    for. Raises RunError, as ``read_records`` does, where a line is no longer what it was.
    """

    def __init__(self, kind: type[R], files: Sequence[Path], places: dict[str, int]) -> None:
        self.kind, self.files, self._places = kind, files, places  # a place: the number of the file, and the byte
        self._open: tuple[int, BinaryIO] | None = None

    def line(self, name: str) -> bytes:
        """The line of a record as it is written."""
        number, start = divmod(self._places[name], LARGEST_FILE)
        if self._open is None or self._open[0] != number:
            self._close()
            self._open = number, self.files[number].open("rb")
        file = self._open[1]
        file.seek(start)
        return file.readline()

    def __getitem__(self, name: str) -> R:
        where = f"{self.files[self._places[name] // LARGEST_FILE]}: {name}"
        record = _parsed(self.line(name), self.kind, None, where)
        if record is None or record_id(record) != name:
            raise RunError(f"{where} is no longer where it was: the file has changed meanwhile")
        return record

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()

    __del__ = _close


def read_records(path: Path, kind: type[R]) -> list[R]:
    """The records of a file of JSON lines.

    Raises RunError, naming file and line, for a missing file, a torn last line (which only the stage that writes the
    file can mend, ``run_stage``), any other malformed line, and one that names a file outside the file's folder.
    """
    records = [record for _, record in _whole_lines(path, kind)]
    _require_whole(path, records)
    return [record for record in records if record is not None]


def read_by_id(path: Path, kind: type[R], ids: Collection[str] | None = None, gaps: bool = False) -> Records[R]:
    """The records of a finished stage by the id of what they are about, all of them checked.

    There must be one for each of ``ids`` (None: any) or, with ``gaps``, at most one; else RunError names file and
    ids. Raises as ``read_records`` does.
    """
    records, torn = _indexed([path], kind, ids, gaps)
    _require_whole(path, [*records, None] if torn else ())
    return records


def read_so_far(path: Path, kind: type[R]) -> Records[R]:
    """The same of a stage that may still be going on in this process: its finished batches."""
    return read_by_id(path, kind) if path.exists() else _indexed(_shards(path.with_suffix(PARTS)), kind, None, True)[0]


def _require_whole(path: Path, records: Sequence[object]) -> None:
    """RunError for a file that ends in a torn line, None."""
    if records and records[-1] is None:
        again = f"srum {STAGE_OF[path.stem]}" if path.stem in STAGE_OF else "the stage that writes it"
        raise RunError(f"{path}:{len(records)} is torn; run `{again}` again, which mends it")


def _indexed(files: Sequence[Path], kind: type[R], ids: Collection[str] | None, gaps: bool) -> tuple[Records[R], bool]:
    """The records of files, and whether the last of these ended in a torn line. Raises as ``read_by_id`` does."""
    places: dict[str, int] = {}
    torn = False
    for number, path in enumerate(files):
        found: Counter[str] = Counter()
        for start, record in _whole_lines(path, kind):
            torn = record is None
            if record is not None:
                name = record_id(record)
                found[name] += 1
                places[name] = number * LARGEST_FILE + start
        _require_ids(path, found, found if ids is None else ids, gaps or torn)
    return Records(kind, files, places), torn


def _require_ids(path: Path, found: Mapping[str, int], expected: Collection[str], gaps: bool) -> None:
    """RunError for a file that does not have the ``expected`` ids once each."""
    faults = {
        "nothing about": [] if gaps else [name for name in expected if name not in found],
        "records about the unknown": [name for name in found if name not in expected],
        "several records about": [name for name, count in found.items() if count > 1],
    }
    if any(faults.values()):
        said = "; ".join(f"{fault} {_some(names)}" for fault, names in faults.items() if names)
        raise RunError(f"{path} holds {said}; delete it and what was made of it, and run its stage again")


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def _whole_lines(path: Path, kind: type[R]) -> Iterator[tuple[int, R | None]]:
    """Where each line begins, and its record; None for a torn last line."""
    home = Home(path.parent.parent if path.parent.suffix == PARTS else path.parent)
    start = 0
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the stage that writes it has not finished") from None
    with file:
        for number, line in enumerate(file, start=1):
            yield start, _parsed(line, kind, home, f"{path}:{number}")
            start += len(line)


def _parsed(line: bytes, kind: type[R], home: Home | None, where: str) -> R | None:
    """The record of a line from ``where``, its files asked for in ``home``; None for one that is torn."""
    if (record := _as_written(line, kind)) is None:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            if not line.endswith(b"\n"):
                return None
            raise RunError(f"{where}: not JSON: {line[:80]!r}") from None
        if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA_VERSION:
            raise RunError(f"{where}: not a record of schema version {SCHEMA_VERSION}")
        record = _validated(values, kind, where)
    if home is not None:
        _require_inside(record, home, where)
    return record


def _as_written(line: bytes, kind: type[R]) -> R | None:
    """The record of a line as ``write_records`` begins it, in half the time; None for any other and for what fails."""
    if not line.startswith(VERSIONED):
        return None
    try:
        return kind.model_validate_json(b"{" + line[len(VERSIONED) :])
    except ValidationError:
        return None


def make_record(values: Mapping[str, Any], kind: type[R], folder: Path, where: str) -> R:
    """The record of plain ``values`` that came from ``where``. Raises RunError, also for files outside ``folder``."""
    record = _validated(values, kind, where)
    _require_inside(record, Home(folder), where)
    return record


def _validated(values: Mapping[str, Any], kind: type[R], where: str) -> R:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RunError(f"{where}: {first_fault(error)}") from None


def _require_inside(record: Record, home: Home, where: str) -> None:
    try:
        for name in record.files():
            home.path(name)
    except RunError as error:
        raise RunError(f"{where}: {error}") from None


# --- stages


def run_stage(
    folder: Path,
    name: str,
    kind: type[R],
    items: Mapping[str, T],
    batch_size: int,
    work: Callable[[Mapping[str, T]], list[R]],
    gaps: bool = False,
) -> Sequence[R]:
    """The records of a stage: read from ``NAME.jsonl`` where finished, else computed batch by batch and kept.

    ``items`` are by id, in order; ``work`` turns a batch of them into a record for each or, with ``gaps``, for some.
    The first field of a record is the id of its item. Items without a record are tried again after an interruption.
    Several processes share the batches that are missing; all return all records, in the order of the items, each read
    whenever it is asked for. Raises RunError, naming the file, where it holds records of other items or, finished, not
    of all.
    """
    final, parts = folder / f"{name}.jsonl", folder / f"{name}{PARTS}"
    processes = Processes.here()
    complete, done = processes.once(lambda: _what_is_there(final, parts, kind, items, batch_size, gaps))
    if not complete:
        missing = [key for key in items if key not in done]
        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        first = int(done.files[-1].stem) + 1 if done.files else 0
        shards = [_shard(parts, first + number) for number in range(len(batches))]
        own = range(len(batches))[processes.rank :: processes.count]
        total = len(done) + sum(len(batches[number]) for number in own)
        with counting(name, total, len(done), told=processes.rank == 0) as advance:
            for number in own:
                write_records(shards[number], work({key: items[key] for key in batches[number]}))
                advance(len(batches[number]), "")
        processes.wait()
        done = processes.once(lambda: _merged(final, parts, [*done.files, *shards], kind, items))
    return Lazy([key for key in items if key in done], done.__getitem__)


def _shard(parts: Path, number: int) -> Path:
    return parts / f"{number:05d}.jsonl"


def _shards(parts: Path) -> list[Path]:
    return sorted(parts.glob("*.jsonl"), key=lambda path: int(path.stem))


def _what_is_there(
    final: Path, parts: Path, kind: type[R], items: Collection[str], batch_size: int, gaps: bool
) -> tuple[bool, Records[R]]:
    """Whether the stage is finished, and the records that it has. A torn file becomes a shard, a torn shard goes."""
    if final.exists():
        records, torn = _indexed([final], kind, items, gaps)
        if not torn:
            _drop(parts)
            return True, records
        _warn_of_torn(final)
        _back_to_parts(final, parts, list(items), batch_size, records)
    whole = []
    for shard in _shards(parts):
        if _indexed([shard], kind, items, gaps=True)[1]:
            _warn_of_torn(shard)
            shard.unlink()
        else:
            whole.append(shard)
    return False, _indexed(whole, kind, items, gaps=True)[0]


def _warn_of_torn(path: Path) -> None:
    warnings.warn(f"{path} ends in a torn line; its batch is done again", stacklevel=2)


def _back_to_parts(final: Path, parts: Path, ids: Sequence[str], batch_size: int, records: Records[R]) -> None:
    """One shard of the batches that a torn file still holds whole: those before the batch of its last record."""
    place = {name: number for number, name in enumerate(ids)}
    end = max((place[name] for name in list(records)[-1:]), default=0) // batch_size * batch_size
    _write_lines(_shard(parts, 0), (records.line(name) for name in records if place[name] < end))
    final.unlink()


def _merged(final: Path, parts: Path, shards: Sequence[Path], kind: type[R], items: Iterable[str]) -> Records[R]:
    """The file of the records of all shards, in the order of the items."""
    done = Records(kind, shards, _places(shards))
    names = [name for name in items if name in done]
    _write_lines(final, map(done.line, names))
    _drop(parts)
    return Records(kind, [final], _places([final]))


def _places(files: Sequence[Path]) -> dict[str, int]:
    """Where the records of files that are known to be whole begin, by their ids."""
    places: dict[str, int] = {}
    for number, path in enumerate(files):
        start = number * LARGEST_FILE
        with path.open("rb") as file:
            for line in file:
                places[_id_in(line)] = start
                start += len(line)
    return places


def _id_in(line: bytes) -> str:
    """The id in a line that ``write_records`` wrote: the second of its values."""
    found = SECOND_VALUE.match(line)
    name: str = list(json.loads(line).values())[1] if found is None else found[1].decode()
    return name


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
            records, torn = _indexed([path], kind, None, gaps=True)
            wanted = [name for name, record in records.items() if not unwanted(record)]
            if torn or len(wanted) == len(records):
                continue  # torn, it is the stage's to mend
            _write_lines(_shard(parts, 0) if path == final else path, map(records.line, wanted))
            if path == final:
                final.unlink()

    Processes.here().once(rewrite)


def finished(folder: Path, name: str) -> bool:
    """Whether the stage has written its file, and whole: a torn last line sends it back to ``run_stage``."""
    path = folder / f"{name}.jsonl"

    def whole() -> bool:
        if not path.exists() or not _ends_a_line(path):
            return False
        _drop(folder / f"{name}{PARTS}")
        return True

    return Processes.here().once(whole)


def require_use(path: Path, fault: Callable[[], str | None]) -> None:
    """Raise RunError in all processes with the ``fault`` of a stage's finished file, where it has one; the file is then
    removed, else the next attempt would find the stage finished.

    Process 0 alone asks: records are read whenever they are asked for, so another's would be gone under its hands.
    """

    def found() -> str | None:
        message = fault()
        if message is not None:
            path.unlink()
        return message

    if (message := Processes.here().once(found)) is not None:
        raise RunError(message)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END) if file.seek(0, os.SEEK_END) else None
        return file.read() in (b"", b"\n")
