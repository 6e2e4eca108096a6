"""Pictures: images of any source, read one by one, with their latents. What RecA learns from (docs/specs/reca.md, 5).

A source is named in ``images.source``:

    rendered            scenes of the embedded world, without captions: information from outside
    candidates, good    the round's own candidates; those that the model's own judge scores 0.5 and better
    a path or pattern   an image, a folder of them (with its subfolders), webdataset .tar files, .parquet with an image
                        column (bytes, or {bytes, path}), .jsonl with the path of an image per line
    datasets:NAME       a data set of the datasets library

Only pixels are read. What cannot be read is a failure, recorded and counted; where nothing can, that is an error.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from srum.config import ImagesConfig, RunConfig
from srum.images import ImageError, open_image, save_image, to_rgb
from srum.models.base import UnifiedModel
from srum.processes import Processes
from srum.records import Candidate, Picture, RewardMap
from srum.run import Run, console, load_model
from srum.run_dir import RunError, finished, read_by_id, require_use, run_stage
from srum.seeding import seed_for
from srum.shapes.render import render
from srum.shapes.scenes import random_scene

IMAGE_FILES = {".png", ".jpg", ".jpeg", ".webp"}
READERS = {".tar", ".parquet", ".jsonl"}
GOOD = 0.5  # where the rubric's "good" begins


class Entry(NamedTuple):
    """One image of a source: where it is from, in words, and how it is opened. ``open`` raises ImageError."""

    source: str
    open: Callable[[], Image.Image]


def images_stage(run: Run, k: int) -> None:
    """pictures.jsonl, pictures/: the images of round ``k``, each with what is seen of it and its latent."""
    folder, config, cache = run.round(k), run.config.images, run.folder / "latent_cache"
    if finished(folder, "pictures"):
        return
    chosen = entries_of(run.config, folder, k)
    model = load_model(run.config, run.newest(k))

    def work(batch: Mapping[str, Entry]) -> list[Picture]:
        return [_picture(model, folder, cache, name, entry, config) for name, entry in batch.items()]

    pictures = run_stage(folder, "pictures", Picture, chosen, config.batch_size, work)

    def fault() -> str | None:
        failed = sum(picture.failure is not None for picture in pictures)
        if failed == len(pictures):
            return f"images.source: none of {failed} images can be read; the first: {pictures[0].failure}"
        console.print(
            f"{folder.name}: {len(pictures) - failed} pictures of {config.source}, {failed} could not be read"
        )
        return None

    require_use(folder / "pictures.jsonl", fault)


def entries_of(config: RunConfig, folder: Path | None, k: int) -> dict[str, Entry]:
    """``images.count`` of the source's images by their ids, drawn by the run's seed and the round ``k``.

    ``folder``: of the round, for its own candidates. Raises RunError where there are none.
    """
    images = config.images
    if images.source == "rendered":
        seeds = [seed_for(config.seed, k, "rendered", number) for number in range(images.count)]
        return {f"rendered-{n:06d}": Entry(f"scene {s}", partial(_rendered, s)) for n, s in enumerate(seeds)}
    if images.source in ("candidates", "good"):
        if folder is None:
            raise RunError(f"images.source: {images.source} are those of a run; name the run")
        entries = _candidates(folder, only_good=images.source == "good")
    else:
        entries = {f"picture-{n:07d}": entry for n, entry in enumerate(read_entries(images))}
    if not entries:
        raise RunError(f"images.source: there is no image in {images.source}")
    names = list(entries)
    places = random.Random(seed_for(config.seed, k, "images")).sample(range(len(names)), min(images.count, len(names)))
    return {names[place]: entries[names[place]] for place in sorted(places)}


def _picture(model: UnifiedModel, folder: Path, cache: Path, name: str, entry: Entry, config: ImagesConfig) -> Picture:
    try:
        image = entry.open()
    except ImageError as error:
        return Picture(id=name, source=entry.source, failure=str(error))
    seen = f"pictures/{name}.png"
    save_image(image, folder / seen)
    if config.blur > 1:
        seen = f"pictures/{name}-seen.png"
        save_image(blurred(image, config.blur), folder / seen)
    latent = f"pictures/{name}.safetensors"
    _link(_cached_latent(model, image, cache), folder / latent)
    size = (image.height, image.width)
    return Picture(id=name, source=entry.source, image=f"pictures/{name}.png", seen=seen, latent=latent, size=size)


def _cached_latent(model: UnifiedModel, image: Image.Image, cache: Path) -> Path:
    """The file of the image's latent, encoded once for the run: the autoencoder is never trained."""
    content = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    path = cache / f"{content}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial_file = cache / f".{content}.{Processes.here().rank}"  # two processes may meet the same image
        save_file({"latent": model.encode([image])[0].contiguous()}, partial_file)
        partial_file.replace(path)
    return path


def _link(old: Path, new: Path) -> None:
    """``new`` as another name of ``old``; a copy where the file system has no links."""
    new.unlink(missing_ok=True)
    with suppress(OSError):
        os.link(old, new)
        return
    new.write_bytes(old.read_bytes())


def blurred(image: Image.Image, factor: int) -> Image.Image:
    """The image shrunk ``factor`` times and enlarged again."""
    small = image.resize((max(1, image.width // factor), max(1, image.height // factor)), Image.Resampling.BICUBIC)
    return small.resize(image.size, Image.Resampling.BICUBIC)


# --- sources


def read_entries(config: ImagesConfig) -> Iterator[Entry]:
    """The images of a path, a pattern or a data set, in a fixed order. Raises RunError where there is none."""
    if config.source.startswith("datasets:"):
        yield from _data_set(config.source.removeprefix("datasets:"), config)
        return
    for path in _files(config.source):
        if path.suffix == ".tar":
            yield from _tar(path)
        elif path.suffix == ".parquet":
            yield from _parquet(path, config.column)
        elif path.suffix == ".jsonl":
            yield from _json_lines(path, config.column)
        else:
            yield Entry(str(path), partial(open_image, path))


def _files(source: str) -> list[Path]:
    """The files that a source names. Raises RunError."""
    path = Path(source)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix.lower() in IMAGE_FILES | READERS and file.is_file()]
    else:
        files = [path] if path.is_file() else [Path(name) for name in glob.glob(source, recursive=True)]
    known = [file for file in sorted(files) if file.suffix.lower() in IMAGE_FILES | READERS]
    if not known:
        kinds = ", ".join(sorted(IMAGE_FILES | READERS))
        raise RunError(
            f"images.source: {source!r} is no image, folder or pattern of images ({kinds}), nor datasets:NAME"
        )
    return known


def _tar(path: Path) -> Iterator[Entry]:
    """Every image member, read where it lies: nothing is unpacked."""
    try:
        with tarfile.open(path, "r:") as archive:
            members = [member for member in archive if member.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise RunError(f"{path} cannot be read as an uncompressed tar: {error}") from None
    for member in members:
        if Path(member.name).suffix.lower() in IMAGE_FILES:
            place = f"{path}:{member.name}"
            yield Entry(place, partial(_from_file, path, member.offset_data, member.size, place))


def _from_file(path: Path, offset: int, size: int, place: str) -> Image.Image:
    with path.open("rb") as file:
        file.seek(offset)
        return from_bytes(file.read(size), place)


def from_bytes(data: bytes, place: str) -> Image.Image:
    """The RGB image of an encoded file. Raises ImageError, naming the place."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow's readers raise
        raise ImageError(f"not a readable image: {place}: {error}") from None


def _parquet(path: Path, column: str) -> Iterator[Entry]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise RunError("pyarrow is missing: pip install 'srum[export]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise RunError(f"{path} is no parquet file: {error}") from None
    if column not in file.schema_arrow.names:
        raise RunError(f"{path} has no column {column!r} (images.column); it has {', '.join(file.schema_arrow.names)}")
    for group in range(file.num_row_groups):
        for row in range(file.metadata.row_group(group).num_rows):
            place = f"{path}:{group}/{row}"
            yield Entry(place, partial(_from_parquet, path, column, group, row, place))


def _from_parquet(path: Path, column: str, group: int, row: int, place: str) -> Image.Image:
    return from_value(_row_group(path, column, group)[row], path.parent, place)


@lru_cache(maxsize=2)
def _row_group(path: Path, column: str, group: int) -> list[Any]:
    import pyarrow.parquet

    values: list[Any] = pyarrow.parquet.ParquetFile(path).read_row_group(group, [column])[column].to_pylist()
    return values


def from_value(value: Any, folder: Path, place: str) -> Image.Image:
    """The image of bytes, of {bytes, path}, of a path from ``folder``, or of an image itself. Raises ImageError."""
    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return from_bytes(value, place)
    if isinstance(value, str):
        return open_image(folder / value)
    raise ImageError(f"not an image: {place}: {value!r:.60}")


def _json_lines(path: Path, column: str) -> Iterator[Entry]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            values = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise RunError(f"{place}: not JSON in UTF-8: {error}") from None
        if not isinstance(values, dict) or not isinstance(values.get(column), str):
            raise RunError(f"{place}: expected the path of an image in {column!r} (images.column)")
        yield Entry(place, partial(from_value, values[column], path.parent, place))


def _data_set(name: str, config: ImagesConfig) -> Iterator[Entry]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise RunError("datasets is missing: pip install datasets") from None
    try:
        rows = load_dataset(name, split=config.split)
    except (OSError, ValueError) as error:
        raise RunError(f"images.source: the data set {name!r} cannot be had: {' '.join(str(error).split())}") from None
    if config.column not in rows.column_names:
        raise RunError(f"{name} has no column {config.column!r} (images.column); it has {', '.join(rows.column_names)}")
    for number in range(len(rows)):
        yield Entry(f"{name}:{number}", partial(_of_row, rows, number, config.column, f"{name}:{number}"))


def _of_row(rows: Any, number: int, column: str, place: str) -> Image.Image:
    return from_value(rows[number][column], Path(), place)


def _rendered(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(render(random_scene(int(rng.integers(1, 7)), rng)))


def _candidates(folder: Path, only_good: bool) -> dict[str, Entry]:
    candidates: Mapping[str, Candidate] = read_by_id(folder / "candidates.jsonl", Candidate)
    if only_good:
        rewards = read_by_id(folder / "rewards.jsonl", RewardMap, candidates, gaps=True)
        scores = {name: reward.sample_score for name, reward in rewards.items()}
        candidates = {name: one for name, one in candidates.items() if scores.get(name, -1.0) >= GOOD}
    return {n: Entry(f"candidate {n}", partial(open_image, folder / one.image)) for n, one in candidates.items()}
