"""A disk that is full: said in one line, with the path, and where it can be before the work is begun."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from srum.errors import SrumError

FULL = (errno.ENOSPC, errno.EDQUOT)
WORDS = ("No space left", "os error 28", "Disk quota exceeded", "os error 122")  # of libraries that keep no errno
NOTHING = 2**20  # bytes below which a disk is taken for full where an error does not say
GIGABYTE = 1e9


class DiskFullError(SrumError, OSError):
    """No room for a file; the message names it and says how to go on."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises DiskFullError, naming ``path``, where what the block writes to its disk finds no room."""
    try:
        yield
    except DiskFullError:
        raise
    except BaseException as error:  # torch's checkpoints raise what is no Exception
        if not _is_of_full_disk(error, path):
            raise
        raise DiskFullError(
            f"no space left on the disk for {path}; what is finished is kept: make room, and the same command goes on"
        ) from None


def _is_of_full_disk(error: BaseException, path: Path) -> bool:
    if (isinstance(error, OSError) and error.errno in FULL) or any(words in str(error) for words in WORDS):
        return True
    of_torch = isinstance(error, RuntimeError) and "failed writing" in str(error)
    return of_torch and free(path) < NOTHING


def free(path: Path) -> int:
    """Bytes free on the disk of a path that need not exist."""
    return shutil.disk_usage(next(above for above in (path, *path.absolute().parents) if above.exists())).free


def require_room_for_images(folder: Path, size: tuple[int, int], names: Iterable[str], kinds: int = 1) -> None:
    """DiskFullError where ``folder`` has no room for those of the files ``names`` that are not there, of (H, W) pixels
    each, at a byte per pixel, and as much again for each further of ``kinds`` of a file, such as latents."""
    height, width = size
    missing = sum(not (folder / name).exists() for name in names)
    require_room(folder, kinds * height * width * missing, f"{missing} images of {height}x{width} pixels")


def require_room(path: Path, needed: int, what: str) -> None:
    """DiskFullError where ``path`` has no room for the ``needed`` bytes that ``what`` take at least."""
    if (there := free(path)) < needed:
        raise DiskFullError(
            f"{path}: {what} take {needed / GIGABYTE:.3g} GB, {there / GIGABYTE:.3g} GB are free; make room, "
            "or choose a folder on another disk"
        )
