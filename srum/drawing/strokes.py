"""Drawing in strokes (docs/process.md): plan what changes now, draw it, inspect both, mend what is wrong; again.

    plan      what to change now, and the whole scene as it will then be (``description``)
    inspect   does the plan fit the prompt? does the image show the plan? then: continue, done, or what to change

    first     [prompt] -> plan            [prompt, plan] -> image
    later     [prompt, clean, seen, description] -> plan            [clean, seen, plan] -> image
    inspect   [prompt, plan, seen] -> inspection                    refine  [clean, seen, correction] -> image

A stage's context is the prompt, the newest description and image, and this stage's own texts (layout ``short``), or all
that was written and drawn before it (``long``, the paper's), of which keys and values are computed once where the model
can remember; latents are the sampler's. Two forms of the texts: ``compact``, parts between bars, of srum-tiny;
``tags``, of the paper.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

from srum.drawing.chains import planned
from srum.models.base import Decoding, Generated, Sampling, Segment, UnifiedModel, Written, remembering, require
from srum.seeding import seed_for
from srum.shapes.edits import apply, parse_edits
from srum.shapes.scenes import Scene
from srum.shapes.wording import listed, parse_things

Form = Literal["compact", "tags"]
Layout = Literal["short", "long"]
Verdict = Literal["continue", "done", "refine"]
FITS = {"compact": ("fits", "fits"), "tags": ("plan: fits", "image: fits")}
OBJECTS = {"compact": ("conflict, ", ""), "tags": ("plan: conflict, ", "image: mismatch, ")}
AGAIN = 0.7  # temperature of the second attempt at a plan


@dataclass(frozen=True)
class Plan:
    """A stroke, in words; or why what was written is none."""

    instruction: str = ""
    description: str = ""
    failure: Literal["empty_reply", "truncated", "missing_ins", "missing_des"] | None = None
    raw: str = ""


@dataclass(frozen=True)
class Inspection:
    """What is wrong with the plan and with the image ("" where nothing is) and what to do; or why it is none.

    ``description``: of the scene after the correction, where the form has one.
    """

    plan_fault: str = ""
    image_fault: str = ""
    verdict: Verdict | None = None
    instruction: str = ""
    description: str = ""
    failure: Literal["empty_reply", "truncated", "no_verdict", "contradiction"] | None = None
    raw: str = ""


def parse_plan(text: str, form: Form, ended: bool = True) -> Plan:
    """The plan that was written; not ``ended``: the limit cut it off."""
    if not text.strip():
        return Plan(failure="empty_reply", raw=text)
    if not ended:
        return Plan(failure="truncated", raw=text)
    if form == "compact":
        instruction, _, description = (part.strip() for part in text.partition(" | "))
    else:
        instruction, description = (_tagged(text, tag) for tag in ("ins", "des"))
    if not instruction:
        return Plan(failure="missing_ins", raw=text)
    if not description:
        return Plan(failure="missing_des", raw=text)
    return Plan(instruction, description, raw=text)


def parse_inspection(text: str, form: Form, ended: bool = True) -> Inspection:
    """The inspection that was written. A verdict that its two sides forbid is a contradiction."""
    if not text.strip():
        return Inspection(failure="empty_reply", raw=text)
    if not ended:
        return Inspection(failure="truncated", raw=text)
    parts = text.strip().split(" | " if form == "compact" else "\n", 2)
    faults = [_fault(part.strip(), side, form) for side, part in enumerate(parts[:2])]
    if len(parts) < 3 or None in faults:
        return Inspection(failure="no_verdict", raw=text)
    plan_fault, image_fault = (fault or "" for fault in faults)
    said = parts[2].strip()
    if said in ("continue", "done"):
        verdict: Verdict = "done" if said == "done" else "continue"
        instruction = description = ""
    else:
        verdict = "refine"
        instruction = said if form == "compact" else _tagged(said, "refine")
        description = "" if form == "compact" else _tagged(said, "des")
        if not instruction or (form == "tags" and not description):
            return Inspection(failure="no_verdict", raw=text)
    if (verdict == "refine") != bool(plan_fault or image_fault):
        return Inspection(failure="contradiction", raw=text)
    return Inspection(plan_fault, image_fault, verdict, instruction, description, raw=text)


def _tagged(text: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return str(found[0]).strip() if len(found) == 1 else ""


def _fault(part: str, side: int, form: Form) -> str | None:
    """What a side objects to, "" where nothing; None where it is no side."""
    if part == FITS[form][side]:
        return ""
    reason = part.removeprefix(OBJECTS[form][side])
    return reason if part.startswith(OBJECTS[form][side]) and reason else None


# --- the chain


@dataclass(frozen=True, kw_only=True)
class StrokeSettings:
    """How strokes are drawn: the first image by ``drawing``, others by ``changing``; at most ``max_strokes``, each
    refined at most ``max_refinements`` times, and ``budget`` images in all. A budget of one is the planning pass."""

    drawing: Sampling
    changing: Sampling
    form: Form = "compact"
    layout: Layout = "short"
    max_strokes: int = 5
    max_refinements: int = 1
    budget: int = 4
    decoding: Decoding = Decoding()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class Stage:
    """What a stage made: a text as it was read, or an image and the plan that it was ``asked`` to show."""

    kind: Literal["plan", "draft", "inspect", "refine"]
    stroke: int
    read: Plan | Inspection | None = None
    made: Generated | None = None
    asked: str = ""


@dataclass
class Drawing:
    """A prompt that is drawn in strokes: its ``stages`` so far; ``end`` is None while it is open, then "done", "limit"
    or how its last plan failed. ``history``: what the long layout has so far, texts as they were sampled."""

    prompt: str
    plan: Plan = field(default_factory=Plan)
    stages: list[Stage] = field(default_factory=list)
    end: str | None = None
    history: list[Segment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history.append(Segment("text", text=self.prompt))

    @property
    def images(self) -> list[Generated]:
        """All images, in order."""
        return [stage.made for stage in self.stages if stage.made is not None]

    @property
    def inspection(self) -> Inspection:
        """The newest."""
        return next(s.read for s in reversed(self.stages) if isinstance(s.read, Inspection))

    def shown(self, droppable: bool = True) -> list[Segment]:
        """The newest image, as a context has it that changes it."""
        made = self.images[-1]
        return [
            Segment("clean", latent=made.latent, droppable=droppable),
            Segment("seen", image=made.image, droppable=droppable),
        ]

    def to_plan(self, layout: Layout) -> list[Segment]:
        """What the next plan is written after."""
        if layout == "long":
            return self.history
        prompt = Segment("text", text=self.prompt)
        return [prompt, *self.shown(), Segment("text", text=self.plan.description)] if self.images else [prompt]

    def to_draw(self, layout: Layout) -> list[Segment]:
        """What the image of the newest plan, or of a correction, is drawn after."""
        if layout == "long":
            return [*self.history[:-1], replace(self.history[-1], droppable=True)]
        before = self.shown() if self.images else [Segment("text", text=self.prompt, droppable=True)]
        return [*before, Segment("text", text=self.plan.raw, droppable=True)]

    def to_inspect(self, layout: Layout) -> list[Segment]:
        """What the newest image is inspected after."""
        if layout == "long":
            return self.history
        texts = [Segment("text", text=self.prompt), Segment("text", text=self.plan.raw)]
        return [*texts, Segment("seen", image=self.images[-1].image)]

    def wrote(self, written: Written) -> None:
        """A text that was read, at the end of the history."""
        self.history.append(Segment("text", ids=written.ids))


def draw_in_strokes(
    model: UnifiedModel, prompts: Sequence[str], names: Sequence[str], settings: StrokeSettings, seed: int
) -> list[Drawing]:
    """Each prompt in strokes, all that are open side by side; ``names`` seed them, so that no result depends on the
    others. Raises MissingAbility where the model cannot do what it takes."""
    require(model, {"edit", "seen", "plan"}, "drawing in strokes")
    drawings = {name: Drawing(prompt) for name, prompt in zip(names, prompts, strict=True)}
    pen = _Pen(model, settings, seed)
    if settings.budget == 1:
        pen.draw_at_once(drawings)
        return list(drawings.values())
    with remembering(model) if settings.layout == "long" else nullcontext():
        for stroke in range(1, settings.max_strokes + 1):
            pen.stroke(stroke, drawings)
    return list(drawings.values())


class _Pen:
    """Performs one stage for many drawings."""

    def __init__(self, model: UnifiedModel, settings: StrokeSettings, seed: int) -> None:
        self.model, self.settings, self.seed = model, settings, seed

    def open(self, drawings: dict[str, Drawing]) -> dict[str, Drawing]:
        return {name: drawing for name, drawing in drawings.items() if drawing.end is None}

    def seeds(self, drawings: dict[str, Drawing], *stage: int | str) -> list[int]:
        return [seed_for(self.seed, name, *stage) for name in drawings]

    def stroke(self, number: int, drawings: dict[str, Drawing]) -> None:
        """Plan, draw, inspect and correct those that are open; and close what is done, or has no images left."""
        settings = self.settings
        self.plan(number, self.open(drawings))
        self.draft(number, self.open(drawings))
        self.inspect(number, 0, self.open(drawings))
        for again in range(1, settings.max_refinements + 1):
            wrong = {n: d for n, d in self.open(drawings).items() if d.inspection.verdict == "refine"}
            self.refine(number, again, {n: d for n, d in wrong.items() if len(d.images) < settings.budget})
            self.inspect(number, again, {n: d for n, d in wrong.items() if d.stages[-1].kind == "refine"})
        for drawing in self.open(drawings).values():
            if drawing.inspection.verdict == "done":
                drawing.end = "done"
            elif len(drawing.images) >= settings.budget or number == settings.max_strokes:
                drawing.end = "limit"

    def draw_at_once(self, drawings: dict[str, Drawing]) -> None:
        instruction = Segment("text", text=self.model.plan_instruction)
        asked = [[instruction, Segment("text", text=drawing.prompt)] for drawing in drawings.values()]
        plans = self.model.write(asked, self.settings.decoding, self.seeds(drawings, 1, "plan"))
        contexts = [planned(self.model, d.prompt, plan) for d, plan in zip(drawings.values(), plans, strict=True)]
        made = self.model.draw(contexts, self.settings.drawing, self.seeds(drawings, 1, "draft"))
        for drawing, image in zip(drawings.values(), made, strict=True):
            drawing.stages.append(Stage("draft", 1, made=image))
            drawing.end = "limit"

    def plan(self, stroke: int, drawings: dict[str, Drawing]) -> None:
        """What each does now; what cannot be read is sampled once more, then ends its drawing."""
        for attempt, decoding in enumerate(
            (self.settings.decoding, replace(self.settings.decoding, temperature=AGAIN))
        ):
            missing = {n: d for n, d in drawings.items() if attempt == 0 or d.plan.failure}
            if not missing:
                return
            contexts = [drawing.to_plan(self.settings.layout) for drawing in missing.values()]
            texts = self.model.write(contexts, decoding, self.seeds(missing, stroke, "plan", attempt))
            for drawing, text in zip(missing.values(), texts, strict=True):
                drawing.plan = parse_plan(text.text, self.settings.form, text.ended)
                drawing.stages.append(Stage("plan", stroke, drawing.plan))
                drawing.end = drawing.plan.failure if attempt else None
                if not drawing.plan.failure:
                    drawing.wrote(text)

    def draft(self, stroke: int, drawings: dict[str, Drawing]) -> None:
        """The image of each plan."""
        first = {name: drawing for name, drawing in drawings.items() if not drawing.images}
        later = {name: drawing for name, drawing in drawings.items() if drawing.images}
        self._draw("draft", stroke, 0, first, self.settings.drawing)
        self._draw("draft", stroke, 0, later, self.settings.changing)

    def inspect(self, stroke: int, again: int, drawings: dict[str, Drawing]) -> None:
        """What is wrong with each plan and its newest image. What cannot be read counts as continue."""
        if not drawings:
            return
        contexts = [drawing.to_inspect(self.settings.layout) for drawing in drawings.values()]
        texts = self.model.write(contexts, self.settings.decoding, self.seeds(drawings, stroke, "inspect", again))
        for drawing, text in zip(drawings.values(), texts, strict=True):
            read = parse_inspection(text.text, self.settings.form, text.ended)
            drawing.stages.append(Stage("inspect", stroke, read))
            drawing.wrote(text)

    def refine(self, stroke: int, again: int, drawings: dict[str, Drawing]) -> None:
        """The image of each correction; the plan is then that of the scene that it leads to."""
        for drawing in drawings.values():
            drawing.plan = corrected(drawing.plan, drawing.inspection, self.settings.form)
        self._draw("refine", stroke, again, drawings, self.settings.changing)

    def _draw(
        self,
        kind: Literal["draft", "refine"],
        stroke: int,
        again: int,
        drawings: dict[str, Drawing],
        sampling: Sampling,
    ) -> None:
        if not drawings:
            return
        contexts = [drawing.to_draw(self.settings.layout) for drawing in drawings.values()]
        made = self.model.draw(contexts, sampling, self.seeds(drawings, stroke, kind, again))
        for drawing, image in zip(drawings.values(), made, strict=True):
            drawing.stages.append(Stage(kind, stroke, made=image, asked=drawing.plan.raw))
            drawing.history += drawing.shown(droppable=False)


def corrected(plan: Plan, inspection: Inspection, form: Form) -> Plan:
    """The plan of a correction: what it changes, and the scene as it will then be.

    The compact form does not say the latter: it is the planned scene, changed by the edits where the plan was at fault.
    """
    description = inspection.description or plan.description
    if form == "tags":
        raw = f"<ins>{inspection.instruction}</ins><des>{description}</des>"
        return Plan(inspection.instruction, description, raw=raw)
    if inspection.plan_fault:
        description = _after(plan.description, inspection.instruction)
    return Plan(inspection.instruction, description, raw=f"{inspection.instruction} | {description}")


def _after(description: str, edits: str) -> str:
    """The described scene after the edits; as it is where they do not apply to it."""
    try:
        return listed(apply(Scene(tuple(parse_things(description))), parse_edits(edits)).things)
    except ValueError:
        return description
