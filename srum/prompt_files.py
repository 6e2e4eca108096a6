"""Files of a user's own prompts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from srum.records import FILE_SAFE, Prompt
from srum.run_dir import RunError

PROMPT_FILES = (".jsonl", ".txt")  # how their names end
LONGEST_PROMPT_ID = 100  # characters; the ids of candidates are longer


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a user's file, in order; blank lines are passed over.

    ``.txt``: a prompt per line; one that begins with # is a comment. ``.jsonl``: an object per line with ``prompt`` or
    ``text``, and perhaps an ``id`` (letters, digits and ``._-``; else it is ``line-0007``) and ``metadata``; other
    fields (GenEval's ``tag`` and ``include``) are metadata themselves. A line with half of a surrogate pair, which JSON
    can hold and no file in UTF-8, is left out with a warning that names it. Raises RunError, naming the line.
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
        if not line.strip() or (path.suffix == ".txt" and line.lstrip().startswith("#")):
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
