"""Prompts of the embedded world: GenEval's six categories and one for size, their wordings, metadata and splits.

Every wording is unambiguous: the text alone says which facts hold (``scenes.canonical``), whatever its order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from srum.errors import SrumError
from srum.records import Prompt
from srum.shapes.scenes import (
    CATEGORIES,
    COLOURS,
    IMAGE_SIZE,
    INVERSE,
    RELATIONS,
    SHAPES,
    SIZES,
    Relation,
    Spec,
    Want,
    canonical,
    mentions_held_out,
    pick,
)

SPLITS = ("train", "development", "held_out", "compositional")
FEW_SPECS = ("single_object", "two_object", "colors")  # split by text, for want of specs
COLOURED = ("counting", "colors", "position", "color_attr", "size")  # categories that can name a held-out pair
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
FRAMES = ("", "", "a picture of ", "an image of ", "a drawing of ", "a photo of ")
PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
ASIDES = {"left of": "to its left", "right of": "to its right", "above": "above it", "below": "below it"}
PATIENCE = 2000  # draws without a new text after which a category counts as exhausted


class PromptError(SrumError, ValueError):
    """More prompts than a split has."""


# --- what is asked for


def _coloured(rng: np.random.Generator, count: int = 1) -> Want:
    return Want(pick(SHAPES, rng), pick(COLOURS, rng), None, count)


def _plain_shapes(rng: np.random.Generator, count: int) -> tuple[Want, ...]:
    return tuple(Want(SHAPES[index]) for index in rng.permutation(len(SHAPES))[:count])


def _counting(rng: np.random.Generator) -> tuple[Want, ...]:
    counts = pick(((2,), (3,), (4,), (1, 2), (1, 3), (2, 2)), rng)
    return tuple(
        Want(pick(SHAPES, rng), pick(COLOURS, rng) if rng.random() < 0.5 else None, None, count) for count in counts
    )


def _position(rng: np.random.Generator) -> tuple[Want, ...]:
    return (_coloured(rng), _coloured(rng)) if rng.random() < 0.8 else _plain_shapes(rng, 2)


def _color_attr(rng: np.random.Generator) -> tuple[Want, ...]:
    return tuple(_coloured(rng) for _ in range(2 if rng.random() < 0.6 else 3))


def _size(rng: np.random.Generator) -> tuple[Want, ...]:
    coloured = rng.random() < 0.6
    return tuple(
        Want(pick(SHAPES, rng), pick(COLOURS, rng) if coloured else None, pick(SIZES, rng))
        for _ in range(1 if rng.random() < 0.3 else 2)
    )


_WANTS: dict[str, Callable[[np.random.Generator], tuple[Want, ...]]] = {
    "single_object": lambda rng: _plain_shapes(rng, 1),
    "two_object": lambda rng: _plain_shapes(rng, 2),
    "counting": _counting,
    "colors": lambda rng: (_coloured(rng),),
    "position": _position,
    "color_attr": _color_attr,
    "size": _size,
}


def sample_spec(rng: np.random.Generator, category: str | None = None, compositional: bool = False) -> Spec:
    """A spec of the category (None: any, each equally likely). It names a held-out pair iff ``compositional``."""
    possible = COLOURED if compositional else CATEGORIES
    if category is not None and category not in possible:
        raise ValueError(f"category is {category!r}; expected one of {possible}")
    category = category or pick(possible, rng)
    while True:
        wants = _WANTS[category](rng)
        if any(want.overlaps(other) for index, want in enumerate(wants) for other in wants[:index]):
            continue
        relation = Relation(0, pick(RELATIONS, rng), 1) if category == "position" else None
        spec = Spec(wants, category, relation)
        if mentions_held_out(spec) == compositional:
            return spec


# --- how it is said


def _noun(want: Want, rng: np.random.Generator) -> str:
    if want.count == 1:
        return f"{'one' if rng.random() < 0.2 else 'a'} {want.name}"
    return f"{NUMBERS[want.count]} {want.name}s"


def _list(spec: Spec, rng: np.random.Generator) -> str:
    nouns = [_noun(spec.wants[index], rng) for index in rng.permutation(len(spec.wants))]
    frame = pick((*FRAMES, "there is " if nouns[0].startswith(("a ", "one ")) else "there are "), rng)
    if len(nouns) == 2 and rng.random() < 0.2:
        return f"{frame}{nouns[0]} with {nouns[1]}"
    return frame + " and ".join([", ".join(nouns[:-1]), nouns[-1]] if len(nouns) > 1 else nouns)


def _related(spec: Spec, relation: Relation, rng: np.random.Generator) -> str:
    subject, kind, object_ = spec.wants[relation.subject_index], relation.kind, spec.wants[relation.object_index]
    if rng.random() < 0.5:
        subject, kind, object_ = object_, INVERSE[kind], subject
    first, second = _noun(subject, rng), _noun(object_, rng)
    frame = pick((*FRAMES, "there is "), rng)
    form = rng.random()
    if form < 0.25:
        return f"{frame}{second} with {first} {ASIDES[kind]}"
    if form < 0.35:
        return f"{first} is {pick(PHRASES[kind], rng)} {second}"
    return f"{frame}{first} {pick(PHRASES[kind], rng)} {second}"


def phrase(spec: Spec, rng: np.random.Generator) -> str:
    """One wording of the spec, lower case, without a full stop."""
    return _list(spec, rng) if spec.relation is None else _related(spec, spec.relation, rng)


# --- GenEval's metadata


def to_metadata(spec: Spec, text: str | None = None) -> dict[str, Any]:
    """The spec in GenEval's layout; ``prompt`` is the text, or a plain wording where none is given."""
    include: list[dict[str, Any]] = []
    for want in spec.wants:
        entry: dict[str, Any] = {"class": want.shape, "count": want.count}
        if want.colour is not None:
            entry["color"] = want.colour
        if want.size is not None:
            entry["size"] = want.size
        include.append(entry)
    if spec.relation is not None:
        include[spec.relation.subject_index]["position"] = [spec.relation.kind, spec.relation.object_index]
    return {"tag": spec.category, "include": include, "prompt": text or phrase(spec, np.random.default_rng(0))}


def from_metadata(metadata: dict[str, Any]) -> Spec:
    """The spec of a GenEval metadata entry; a ValueError names the field that is wrong."""
    include = metadata.get("include")
    if not isinstance(include, list) or not include:
        raise ValueError(f"include is {include!r}; expected a list of at least one thing")
    relations = [
        _read_relation(index, entry["position"])
        for index, entry in enumerate(include)
        if isinstance(entry, dict) and "position" in entry
    ]
    if len(relations) > 1:
        raise ValueError(f"include: at most one thing may have a position, got {relations}")
    wants = tuple(_read_want(index, entry) for index, entry in enumerate(include))
    try:
        return Spec(wants, str(metadata.get("tag")), relations[0] if relations else None)
    except ValueError as error:
        raise ValueError(f"metadata (tag, include): {error}") from None


def is_checkable(metadata: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Whether the exact checker can say if an image of (H, W) pixels is what the metadata asks for. GenEval's own files
    have the same layout, and ask for things of another world."""
    try:
        from_metadata(dict(metadata))
    except ValueError:
        return False
    return size == (IMAGE_SIZE, IMAGE_SIZE)


def _read_want(index: int, entry: object) -> Want:
    where = f"include[{index}]"
    if not isinstance(entry, dict) or "class" not in entry:
        raise ValueError(f"{where} is {entry!r}; expected a mapping with 'class'")
    if unknown := set(entry) - {"class", "count", "color", "size", "position"}:
        raise ValueError(f"{where} has unknown fields {sorted(unknown)}")
    count = entry.get("count", 1)
    if not isinstance(count, int) or isinstance(count, bool):
        raise ValueError(f"{where}.count is {count!r}; expected a whole number")
    try:
        return Want(entry["class"], entry.get("color"), entry.get("size"), count)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} (class, color, size, count): {error}") from None


def _read_relation(index: int, position: object) -> Relation:
    where = f"include[{index}].position"
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise ValueError(f"{where} is {position!r}; expected [relation, index]")
    kind, other = position
    if kind not in RELATIONS or not isinstance(other, int):
        raise ValueError(f"{where} is {position!r}; expected one of {RELATIONS} and the index of another thing")
    return Relation(index, kind, other)


# --- the splits


def split_of(spec: Spec, text: str) -> str:
    """The one split that a prompt belongs to; it never changes, whatever is drawn, and when."""
    if mentions_held_out(spec):
        return "compositional"
    key = text if spec.category in FEW_SPECS else canonical(spec)
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "train" if place < 0.55 else "development" if place < 0.7 else "held_out"


def sample_prompt(rng: np.random.Generator, split: str = "train", category: str | None = None) -> tuple[Spec, str]:
    """A spec and a wording of it that belong to the split: what a training corpus draws from."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {SPLITS}")
    while True:
        spec = sample_spec(rng, category, compositional=split == "compositional")
        text = phrase(spec, rng)
        if split_of(spec, text) == split:
            return spec, text


def prompt_set(name: str, n: int, seed: int = 0) -> list[Prompt]:
    """The first ``n`` prompts of a split: "train", "development", "held_out" or "compositional".

    Sets are disjoint in their specs for counting, position, color_attr and size, where there are enough of them, and
    in their texts for single_object, two_object and colors, which have only 4, 6 and 24 specs. Only compositional
    prompts name a held-out pair of shape and colour. Texts are unique within and across sets. Categories take turns;
    one that has run out of texts leaves its turn to the others. A shorter set is the beginning of a longer one.
    Raises PromptError where there are not so many.
    """
    rng = np.random.default_rng([seed, SPLITS.index(name) if name in SPLITS else _unknown_split(name)])
    turns = list(COLOURED if name == "compositional" else CATEGORIES)
    texts: set[str] = set()
    prompts: list[Prompt] = []
    while turns and len(prompts) < n:
        for category in tuple(turns):
            found = _new_prompt(rng, name, category, texts)
            if found is None:
                turns.remove(category)
            elif len(prompts) < n:
                spec, text = found
                texts.add(text)
                prompts.append(Prompt(id=f"{name}-{len(prompts):04d}", text=text, metadata=to_metadata(spec, text)))
    if len(prompts) < n:
        raise PromptError(f"the {name} split has no more than {len(prompts)} prompts, {n} were asked for")
    return prompts


def _new_prompt(rng: np.random.Generator, split: str, category: str, texts: set[str]) -> tuple[Spec, str] | None:
    """A prompt whose text is not among the texts, or None once it seems that there is none left."""
    for _ in range(PATIENCE):
        spec, text = sample_prompt(rng, split, category)
        if text not in texts:
            return spec, text
    return None


def _unknown_split(name: str) -> int:
    raise ValueError(f"split is {name!r}; expected one of {SPLITS}")
