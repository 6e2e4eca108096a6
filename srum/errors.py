"""What a user can put right."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class SrumError(Exception):
    """Base of all expected errors: a file, a setting or a machine with which the work cannot go on.

    The message is one line: what is wrong, in which file or field, what to do. The command line shows that line and
    ends with exit code 2. Everything else that is raised is an error of ours, and is shown as a traceback.
    """


class ModelError(SrumError, ValueError):
    """A model that is not there, that is not one, or that cannot do here what is asked of it."""


class TrainingError(SrumError, RuntimeError):
    """Training cannot go on, or has done nothing."""


def first_fault(error: ValidationError, within: str = "") -> str:
    """``within.field: what is wrong`` of the first thing that pydantic found, and what stood there, where that says
    more."""
    detail = error.errors()[0]
    where = ".".join(map(str, [*([within] if within else []), *detail["loc"]]))
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] not in ("value_error", "missing"):  # of those the message says it, or nothing stood there
        message = f"{message}, got {detail['input']!r:.80}"
    return f"{where}: {message}" if where else message
