"""What a user can put right."""

from __future__ import annotations


class SrumError(Exception):
    """Base of all expected errors: a file, a setting or a machine with which the work cannot go on.

    The message is one line: what is wrong, in which file or field, what to do. The command line shows that line and
    ends with exit code 2. Everything else that is raised is an error of ours, and is shown as a traceback.
    """


class ModelError(SrumError, ValueError):
    """A model that is not there, that is not one, or that cannot do here what is asked of it."""


class TrainingError(SrumError, RuntimeError):
    """Training cannot go on, or has done nothing."""
