"""What a task is made of: parts of a sample before encoding, pictures, and prompts of the training split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from srum.records import Box
from srum.shapes.checker import parse
from srum.shapes.hard_negatives import corrupt_prompt, flip_relation, perturb
from srum.shapes.prompts import sample_prompt
from srum.shapes.render import render, render_distorted
from srum.shapes.scenes import Scene, Spec, Thing, pick, sample_scene

Asked = tuple[Spec, str]  # a spec and the prompt that states it
COMPOSED = ("two_object", "counting", "position", "color_attr", "size")


@dataclass(frozen=True)
class Part:
    """One segment before encoding: a text, an image to understand (``seen``), one given as its latent (``clean``), or
    one to generate (``drawn``); images are uint8 (64, 64, 3).

    ``asks``: the prompt that a text states or contains. ``dropped``: an image left out, whose position stays. The rest
    is as in ``Segment``.
    """

    text: str = ""
    seen: np.ndarray | None = None
    clean: np.ndarray | None = None
    drawn: np.ndarray | None = None
    loss: bool = False
    droppable: bool = False
    branch: int = 0
    asks: Asked | None = None
    dropped: bool = False

    @property
    def image(self) -> np.ndarray | None:
        """The image, of whatever kind; None for a text."""
        return next((x for x in (self.seen, self.clean, self.drawn) if x is not None), None)


Sample = list[Part]


@dataclass(frozen=True)
class Drawing:
    """An image that the model itself has drawn for a prompt."""

    image: np.ndarray
    asked: Asked


@dataclass(frozen=True)
class Task:
    """A kind of sample and how often it is drawn, relative to the others; one about the model's ``own`` drawings is
    given one of them."""

    name: str
    weight: float
    draw: Callable[[np.random.Generator], Sample] | None = field(default=None, repr=False)
    own: Callable[[np.random.Generator, Drawing], Sample] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Picture:
    """An image, what it shows, and what is badly drawn in it: things by index, and the boxes of stray blobs."""

    image: np.ndarray
    things: tuple[Thing, ...]
    damaged: frozenset[int] = frozenset()
    blobs: tuple[Box, ...] = ()


def prompt_part(asked: Asked, droppable: bool = True) -> Part:
    """The prompt as a segment of its own."""
    return Part(text=asked[1], droppable=droppable, asks=asked)


def source_parts(image: np.ndarray) -> Sample:
    """An image that is to be changed: its latent, and what is seen of it."""
    return [Part(clean=image, droppable=True), Part(seen=image, droppable=True)]


def pictured(scene: Scene, rng: np.random.Generator, distorted: float = 0.25) -> Picture:
    """The scene drawn, in a share ``distorted`` of the cases badly."""
    if rng.random() >= distorted:
        return Picture(render(scene), scene.things)
    drawn = render_distorted(scene, rng)
    return Picture(drawn.image, scene.things, frozenset(drawn.damage), drawn.blobs)


def recognised(image: np.ndarray) -> Picture:
    """What the exact checker finds in an image, things in the cells of their centres."""
    found = parse(image)
    things = [thing for thing in found if not thing.stray]
    damaged = frozenset(i for i, thing in enumerate(things) if not thing.well_formed)
    blobs = tuple(thing.box for thing in found if thing.stray)
    return Picture(image, tuple(thing.placed for thing in things), damaged, blobs)


def attempt(rng: np.random.Generator) -> tuple[Asked, Scene]:
    """A prompt and a scene that meets it or, more often, misses it as a generator would.

    Half of the prompts ask for a relation, and half of their scenes have it the wrong way round: a judge that
    sees that rarely learns to accept every relation (docs/specs/srum.md, section 7). Half of the others, and some of
    these, are scenes of another prompt, which differs in one fact: without them the judge learns to accept whatever is
    well drawn (docs/lab-notes.md, 8).
    """
    spec, prompt = sample_prompt(rng, category="position" if rng.random() < 0.45 else None)
    scene = sample_scene(spec, rng)
    flipped = spec.relation is not None and rng.random() < 0.5
    if rng.random() < (0.5 if spec.relation is None else 0.3):
        spec, prompt = corrupt_prompt(spec, rng)
    if flipped:
        scene = flip_relation(scene, spec)
    for _ in range(rng.choice(3, p=[0.5, 0.4, 0.1] if spec.relation is None else [0.75, 0.25, 0.0])):
        scene = perturb(scene, spec, rng)
    return (spec, prompt), scene


def asked_questions(image: np.ndarray, questions: Sequence[tuple[str, str]], asks: Asked | None = None) -> Sample:
    """An image and (question, reply) pairs about it, none of which sees another."""
    sample = [Part(seen=image)]
    for branch, (question, reply) in enumerate(questions, 1):
        sample += [Part(text=question, branch=branch, asks=asks), Part(text=reply, loss=True, branch=branch)]
    return sample


def composed_prompt(rng: np.random.Generator) -> Asked:
    """A training prompt of a category that binds several facts together: those are learned last."""
    return sample_prompt(rng, category=pick(COMPOSED, rng))
