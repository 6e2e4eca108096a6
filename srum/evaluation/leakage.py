"""Whether training has met the prompts of a benchmark, or its wording."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

OPENING = re.compile(r"^(?:a|an|the)? ?(?:photo|picture|image|photograph) of (?:an? )?")


@dataclass(frozen=True)
class Leakage:
    """Of so many training ``prompts``: how many are ``equal`` to one of the benchmark's, ignoring case, full stops and
    blanks; equal but for an opening such as "a photo of" (``bare``); and begin as all the benchmark's do
    (``template``), where it has a template."""

    prompts: int
    equal: int
    bare: int
    template: int
    examples: tuple[str, ...] = ()

    def sentence(self, name: str = "the benchmark") -> str:
        """The same in words, of a benchmark with this name."""
        shown = f", such as {', '.join(map(repr, self.examples))}" if self.examples else ""
        return (
            f"Of {self.prompts} training prompts {self.equal} are prompts of {name}, {self.bare} more are but"
            f" for their opening, {self.template} have its template{shown}."
        )


def leakage(training: Iterable[str], benchmark: Iterable[str], examples: int = 3) -> Leakage:
    """How many training prompts match the benchmark's."""
    met, asked = list(dict.fromkeys(map(_plain, training))), {_plain(prompt) for prompt in benchmark}
    bare = {_bare(prompt) for prompt in asked}
    opening = _shared_opening(asked)
    equal = [prompt for prompt in met if prompt in asked]
    nearly = [prompt for prompt in met if prompt not in asked and _bare(prompt) in bare]
    alike = [prompt for prompt in met if opening and prompt.startswith(opening)]
    return Leakage(len(met), len(equal), len(nearly), len(alike), tuple([*equal, *nearly][:examples]))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(" .")


def _bare(text: str) -> str:
    return re.sub(r"^an? ", "", OPENING.sub("", text))


def _shared_opening(texts: Iterable[str]) -> str:
    """The words, at least three, with which all texts begin."""
    words = [text.split() for text in texts]
    shared = []
    for column in zip(*words, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return " ".join(shared) + " " if len(shared) >= 3 else ""
