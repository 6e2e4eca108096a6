"""Chains: plan and draw, look and say what must change, draw that; until nothing must change (docs/r3.md, R3).

    Reason    [instruction, prompt]                            -> plan;  [instruction, prompt, plan]       -> image
    Reflect   [system, seen image, question]                   -> reflection, then an edit or the stop sentence
    Refine    [clean image, seen image, edit]                  -> image

A turn's context is its own: nothing is carried on but the prompt and the newest image, whose latent is the sampler's.
Each turn runs for all chains that are still open; what is drawn has a seed of its chain, its number and its kind, so
that no result depends on the batch. A reply that cannot be read ends its chain; it is no decision to stop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator

from srum.errors import SrumError
from srum.models.base import Decoding, Generated, Sampling, Segment, UnifiedModel, Written, require
from srum.seeding import seed_for
from srum.yaml_files import load_named

TEMPLATES = Path(__file__).parent / "templates"
ENDS = re.compile(r"[.!?\n]+")
STOP = re.compile(
    r"no (?:further|more) (?:edits?|editing)(?: operations?)?(?: (?:is|are))? (?:needed|required|necessary)",
    re.IGNORECASE,
)
MARKS = " \t\r\n\"'*_`#>\u201c\u201d\u2018\u2019"  # quotes and markdown around a sentence

Kind = Literal["edit", "stop", "failure"]
Failure = Literal[
    "empty_reply",
    "truncated_thought",
    "no_thought",
    "bad_markup",
    "no_instruction",
    "truncated_instruction",
    "contradiction",
]


class TemplateError(SrumError, ValueError):
    """A template of chains that is not there or is none."""


class Example(BaseModel):
    """A reply as the template wants it, and what it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reply: str
    kind: Literal["edit", "stop"]


class Template(BaseModel):
    """The words of a chain: ``system`` text and ``question`` (with {prompt}) of Reflect, and how its reply is built.

    ``thought``: between the marks <think> </think>, or the first of two lines. ``edit_mark`` begins the verdict of a
    reply of two lines, and stays a part of the instruction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    thought: Literal["think", "line"]
    system: str | None = None
    question: str
    edit_mark: str = ""
    stop: str
    examples: tuple[Example, ...] = ()

    @field_validator("question")
    @classmethod
    def _asks_about_the_prompt(cls, text: str) -> str:
        names = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
        if names != {"prompt"}:
            raise ValueError("expected the placeholder {prompt} and no other; double other braces")
        return text

    def plan_is_formed(self, text: str, ended: bool = True) -> bool:
        """Whether a planning text is one thought, not blank, with nothing behind it."""
        if self.thought == "line":
            return ended and bool(text.strip())
        thought = re.fullmatch(r"\s*<think>(.*)</think>\s*", text, re.DOTALL)
        return ended and thought is not None and bool(thought[1].strip()) and text.count("think>") == 2


@cache
def template(name: str) -> Template:
    """A shipped template, ``compact`` or ``released``, or the one of a .yaml file. Raises TemplateError."""
    return load_named(Template, name, TEMPLATES, TemplateError)


# --- replies


@dataclass(frozen=True)
class Reflection:
    """What a reply of Reflect says, never guessed: an edit with its ``instruction``, to stop, or why it is neither."""

    kind: Kind
    reflection: str | None = None
    instruction: str | None = None
    failure: Failure | None = None
    raw: str = ""


def parse_reflection(reply: str, form: Template, ended: bool = True) -> Reflection:
    """The reply, read by the rules of its template; not ``ended``: the limit cut it off."""

    def failed(failure: Failure, thought: str | None = None) -> Reflection:
        return Reflection("failure", thought, None, failure, reply)

    if not reply.strip():
        return failed("empty_reply")
    split = _marked(reply) if form.thought == "think" else _lines(reply, form.edit_mark, ended)
    if isinstance(split, str):
        return failed(split)
    thought, verdict = split
    if not verdict.removeprefix(form.edit_mark.strip()).strip(MARKS + ".!?,;:-"):
        return failed("no_instruction", thought)
    if not ended:
        return failed("truncated_instruction", thought)
    stops = [STOP.fullmatch(s) is not None for part in ENDS.split(verdict) if (s := part.strip(MARKS))]
    if stops == [True] or (stops[-1] and not any(stops[:-1])):
        return Reflection("stop", thought, raw=reply)
    if any(stops):
        return failed("contradiction", thought)
    return Reflection("edit", thought, verdict, raw=reply)


def _marked(reply: str) -> tuple[str, str] | Failure:
    """The thought between its marks, and what is behind it."""
    before, _, rest = reply.partition("<think>")
    if "</think>" not in reply:
        return "truncated_thought" if "<think>" in reply else "no_thought"
    if reply.count("<think>") != 1 or reply.count("</think>") != 1 or before.strip() or "</think>" not in rest:
        return "bad_markup"
    thought, _, verdict = rest.partition("</think>")
    return (thought.strip(), verdict.strip()) if thought.strip() else "no_thought"


def _lines(reply: str, edit_mark: str, ended: bool) -> tuple[str, str] | Failure:
    """The first line, and the second, which is an edit or the stop sentence."""
    thought, separator, verdict = reply.strip("\n").partition("\n")
    if not separator and not ended:
        return "truncated_thought"
    if not thought.strip() or thought.startswith(edit_mark):
        return "no_thought"
    begun = verdict.startswith(edit_mark.strip()) or STOP.match(verdict.strip(MARKS)) or not ended or not verdict
    return (thought.strip(), verdict.strip()) if begun and "\n" not in verdict else "bad_markup"


# --- contexts


def asked(model: UnifiedModel, prompt: str) -> list[Segment]:
    """What a plan is written after."""
    return [Segment("text", text=model.plan_instruction), Segment("text", text=prompt, droppable=True)]


def planned(model: UnifiedModel, prompt: str, plan: Written | None) -> list[Segment]:
    """What the first image is drawn after; the plan as it was sampled, token by token."""
    if plan is None:
        return [Segment("text", text=prompt, droppable=True)]
    return [*asked(model, prompt), Segment("text", ids=plan.ids, droppable=True, written=True)]


def looked_at(form: Template, prompt: str, made: Generated) -> list[Segment]:
    """What a reflection is written after."""
    system = [] if form.system is None else [Segment("text", text=form.system)]
    return [*system, Segment("seen", image=made.image), Segment("text", text=form.question.format(prompt=prompt))]


def to_change(made: Generated, instruction: str) -> list[Segment]:
    """What a refined image is drawn after."""
    shown = [
        Segment("clean", latent=made.latent, droppable=True),
        Segment("seen", image=made.image, droppable=True),
    ]
    return [*shown, Segment("text", text=instruction, droppable=True)]


# --- chains


@dataclass(frozen=True, kw_only=True)
class ChainSettings:
    """How chains are drawn. ``drawing`` and ``changing`` are the samplers of Reason and Refine."""

    drawing: Sampling
    changing: Sampling
    form: Template
    plan: bool = True
    max_refinements: int = 4
    decoding: Decoding = Decoding()  # noqa: RUF009 (frozen)


@dataclass
class ChainState:
    """A chain on its way: ``images`` and the ``replies`` between them; ``end`` is None while it is open, then "stop",
    "limit", or how its last reply failed."""

    prompt: str
    plan: Written | None = None
    images: list[Generated] = field(default_factory=list)
    replies: list[Reflection] = field(default_factory=list)
    end: str | None = None

    def after(self, refinements: int) -> Generated:
        """The image after so many refinements: that of a chain that ended before is the one it has."""
        return self.images[min(refinements, len(self.images) - 1)]


def run_chains(
    model: UnifiedModel,
    prompts: Sequence[str],
    names: Sequence[str],
    settings: ChainSettings,
    seed: int,
    firsts: Sequence[Generated] = (),
) -> list[ChainState]:
    """A chain of each prompt; ``names`` seed them. ``firsts``: their first images, where they have them.

    Raises MissingAbility where the model cannot do what it takes.
    """
    require(model, {"edit", "seen"} | ({"plan"} if settings.plan else set()), "drawing with a chain")
    chains = [ChainState(prompt) for prompt in prompts]

    def seeds(those: Sequence[int], turn: int, kind: str) -> list[int]:
        return [seed_for(seed, names[i], turn, kind) for i in those]

    everyone = range(len(chains))
    if firsts:
        for chain, made in zip(chains, firsts, strict=True):
            chain.images.append(made)
    else:
        _reason(model, chains, settings, seeds(everyone, 0, "reason"), seeds(everyone, 0, "draw"))
    for turn in range(1, settings.max_refinements + 1):
        open_ = [i for i in everyone if chains[i].end is None]
        if not open_:
            break
        _reflect(model, [chains[i] for i in open_], settings, seeds(open_, turn, "reflect"))
        going = [i for i in open_ if chains[i].end is None]
        _refine(model, [chains[i] for i in going], settings, seeds(going, turn, "refine"))
    for chain in chains:
        chain.end = chain.end or "limit"
    return chains


def _reason(
    model: UnifiedModel,
    chains: Sequence[ChainState],
    settings: ChainSettings,
    seeds: Sequence[int],
    noise: Sequence[int],
) -> None:
    if settings.plan:
        plans = model.write([asked(model, chain.prompt) for chain in chains], settings.decoding, seeds)
        for chain, plan in zip(chains, plans, strict=True):
            chain.plan = plan
    contexts = [planned(model, chain.prompt, chain.plan) for chain in chains]
    for chain, made in zip(chains, model.draw(contexts, settings.drawing, noise), strict=True):
        chain.images.append(made)


def _reflect(model: UnifiedModel, chains: Sequence[ChainState], settings: ChainSettings, seeds: Sequence[int]) -> None:
    contexts = [looked_at(settings.form, chain.prompt, chain.images[-1]) for chain in chains]
    for chain, reply in zip(chains, model.write(contexts, settings.decoding, seeds), strict=True):
        chain.replies.append(parse_reflection(reply.text, settings.form, reply.ended))
        if chain.replies[-1].kind != "edit":
            chain.end = chain.replies[-1].failure or "stop"


def _refine(model: UnifiedModel, chains: Sequence[ChainState], settings: ChainSettings, seeds: Sequence[int]) -> None:
    if not chains:
        return
    contexts = [to_change(chain.images[-1], chain.replies[-1].instruction or "") for chain in chains]
    sizes = [(chain.images[-1].image.height, chain.images[-1].image.width) for chain in chains]
    for chain, made in zip(chains, model.draw(contexts, settings.changing, seeds, sizes=sizes), strict=True):
        chain.images.append(made)
