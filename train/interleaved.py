"""Chains of texts and images as examples: from exact scenes of the embedded world, or from a file of JSON lines.

A line of such a file is {"id", "prompt", "turns": [{"text" or "image": a path beside the file, "loss": bool}, ...]}. In
the ``long`` layout a chain is one example: what is learned of an image is its noisy copy, which nothing else sees;
after it the image stands as latent and as seen, unless it is the last turn. An image without a loss, such as a draft
that was rejected, only stands there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image, fromarray
from torch import Tensor

from srum.models.base import Segment, UnifiedModel
from srum.run_dir import RunError, inside, open_image
from srum.shapes.edits import apply, difference
from srum.shapes.hard_negatives import perturb
from srum.shapes.prompts import sample_prompt
from srum.shapes.render import render
from srum.shapes.scenes import Scene, Spec, sample_scene
from srum.shapes.strokes import Plan, inspect, strokes
from srum.train.examples import Example
from srum.train.tasks.base import Sample
from srum.train.tasks.editing import MOST_EDITS
from srum.train.tasks.process import stroke_draft, stroke_inspect, stroke_plan

MISTAKEN = 0.3  # share of the drafts of a chain that do not show their plan, and are corrected

SHORT: dict[str, Callable[[np.random.Generator], Sample]] = {
    "plan": stroke_plan,
    "draft": stroke_draft,
    "inspect": stroke_inspect,
}


@dataclass(frozen=True)
class Turn:
    """A text or an image of a chain, and whether it is learned."""

    text: str | None = None
    image: Image | None = None
    loss: bool = True


def long_segments(model: UnifiedModel, prompt: str, turns: Sequence[Turn]) -> list[Segment]:
    """The whole chain as one example's segments."""
    segments = [Segment("text", text=prompt)]
    last = max(number for number, turn in enumerate(turns) if turn.image is not None)
    for number, turn in enumerate(turns):
        if turn.image is None:
            segments.append(Segment("text", text=turn.text, loss=turn.loss))
            continue
        picture = model.resized(turn.image)
        latent = model.encode([picture])[0]
        if turn.loss:
            segments.append(Segment("noisy", latent=latent, loss=True))
        if number < last or number + 1 < len(turns):
            segments += [Segment("clean", latent=latent), Segment("seen", image=picture)]
    return segments


def read_chains(path: Path) -> list[tuple[str, str, list[Turn]]]:
    """(id, prompt, turns) of the lines of a file; blank ones are passed over. Raises RunError, naming the line, and
    ImageError."""
    chains = dict[str, tuple[str, str, list[Turn]]]()
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8"))
            turns = [_turn(path.parent, turn) for turn in values["turns"]]
            name, prompt = str(values["id"]), str(values["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}:{number}: no chain of id, prompt and turns: {error!r}") from None
        if name in chains:
            raise RunError(f"{path}:{number}: the id {name!r} is taken by an earlier line")
        if not any(turn.image is not None for turn in turns):
            raise RunError(f"{path}:{number}: a chain without an image")
        chains[name] = (name, prompt, turns)
    return list(chains.values())


def _turn(folder: Path, values: dict[str, Any]) -> Turn:
    if ("text" in values) == ("image" in values):
        raise ValueError("a turn has a text or an image")
    image = open_image(inside(folder, values["image"])) if "image" in values else None
    return Turn(values.get("text"), image, bool(values.get("loss", True)))


def write_chains(chains: Sequence[tuple[str, str, Sequence[Turn]]], path: Path) -> None:
    """The file that ``read_chains`` reads, its images beside it in images/."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for name, prompt, turns in chains:
        written: list[dict[str, Any]] = []
        for number, turn in enumerate(turns):
            if turn.image is None:
                written.append({"text": turn.text, "loss": turn.loss})
                continue
            file = f"images/{name}-{number}.png"
            turn.image.save(path.parent / file)
            written.append({"image": file, "loss": turn.loss})
        lines.append(json.dumps({"id": name, "prompt": prompt, "turns": written}, ensure_ascii=False))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


# --- exact chains


def exact_chain(rng: np.random.Generator, mistaken: float = MISTAKEN) -> tuple[str, list[Turn]]:
    """A prompt of the training split and a chain that ends in a scene that meets it: plan, draft, inspection of each
    stroke; a ``mistaken`` draft is not learned, but its inspection and the corrected image are."""
    spec, prompt = sample_prompt(rng)
    turns = list[Turn]()
    for plan in strokes(sample_scene(spec, rng), spec, rng):
        turns.append(Turn(str(plan)))
        if rng.random() < mistaken and (shown := _other(plan, spec, rng)) is not None:
            turns.append(Turn(image=_drawn(shown), loss=False))
            turns.append(Turn(str(inspect(plan.things, shown.things, plan.things, spec))))
        turns.append(Turn(image=_drawn(Scene(plan.things))))
        turns.append(Turn(str(inspect(plan.things, plan.things, plan.things, spec))))
    return prompt, turns


def _other(plan: Plan, spec: Spec, rng: np.random.Generator) -> Scene | None:
    """A scene that is not what was planned, and that a few edits make so; None where one try gave none."""
    shown = perturb(Scene(plan.things), spec, rng)
    edits = difference(shown.things, plan.things)
    return shown if 1 <= len(edits) <= MOST_EDITS and apply(shown, edits) else None


def _drawn(scene: Scene) -> Image:
    return fromarray(render(scene))


def short_example(model: UnifiedModel, kind: str, name: str, rng: np.random.Generator) -> Example:
    """One stage of an exact chain, after what it needs of it."""

    def latent(image: np.ndarray) -> Tensor:
        return model.encode([fromarray(image)])[0]

    segments = []
    for part in SHORT[kind](rng):
        flags: dict[str, Any] = {
            "loss": part.loss,
            "droppable": part.droppable,
            "branch": part.branch,
            "dropped": part.dropped,
        }
        if part.drawn is not None:
            segments.append(Segment("noisy", latent=latent(part.drawn), **flags))
        elif part.clean is not None:
            segments.append(Segment("clean", latent=latent(part.clean), **flags))
        elif part.seen is not None:
            segments.append(Segment("seen", image=fromarray(part.seen), **flags))
        else:
            segments.append(Segment("text", text=part.text, **flags))
    return Example(id=name, segments=segments)
