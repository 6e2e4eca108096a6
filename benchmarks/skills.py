"""What ``srum-tiny`` can do: drawing, judging, editing, reflecting, reconstructing, regenerating.

    python benchmarks/skills.py [--model srum-tiny] [--device cuda] [--count 256] [--out skills.json]

Prompts are of the development split, text to image also of the held-out one; the exact checker tells what is right.
"Own" images are those that the model has drawn for the development prompts, half of them planned. Shares in percent
with their 95% Wilson intervals; AUROC times 100, of soft scores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image, fromarray
from rich.console import Console
from rich.table import Table

from srum import models
from srum.drawing import draw_prompts
from srum.evaluation.judge_quality import auroc
from srum.evaluation.statistics import wilson
from srum.judging.self_judge import SelfJudge
from srum.models.base import Decoding, Sampling, Segment, UnifiedModel, to_edit
from srum.records import Region
from srum.shapes.checker import is_right, parse
from srum.shapes.edits import Edit, apply, format_edits, parse_reflection, same_things
from srum.shapes.hard_negatives import perturb
from srum.shapes.matching import completable
from srum.shapes.prompts import from_metadata, prompt_set, sample_prompt, to_metadata
from srum.shapes.render import render
from srum.shapes.scenes import Scene, Spec, Thing, random_scene, sample_scene
from srum.shapes.strokes import parse_plan
from srum.shapes.truth import found_layout_truth, found_region_truth
from srum.shapes.wording import (
    EDIT_MARK,
    RECONSTRUCT_TEMPLATES,
    REFINE_SYSTEM,
    REFINE_USER,
    REFLECT_QUESTION,
    placed,
)
from srum.train.tasks.base import recognised
from srum.train.tasks.editing import repaired
from srum.train.tasks.generation import meets

BATCH = 256
DRAWING = Sampling(size=(64, 64), timesteps=16, timestep_shift=5.0, guidance=2.5)
CHANGING = replace(DRAWING, guidance=1.5, guidance_interval=(0.0, 1.0))
REPLY = Decoding(max_tokens=128)


@dataclass(frozen=True)
class Skill:
    """A share of ``n``, or an AUROC over ``n``, in percent, and its interval where there is one."""

    name: str
    value: float
    n: int
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Case:
    """A prompt, by its spec and text, and an image for it."""

    spec: Spec
    prompt: str
    image: Image

    @property
    def metadata(self) -> dict[str, Any]:
        return to_metadata(self.spec, self.prompt)

    @property
    def right(self) -> bool:
        return is_right(self.image, self.metadata)


def share(name: str, correct: Sequence[bool]) -> Skill:
    """The share that is true."""
    if not correct:
        return Skill(name, float("nan"), 0)
    estimate = wilson(correct)
    return Skill(name, estimate.value, len(correct), estimate.interval)


def measure(model: UnifiedModel, count: int, seed: int = 0) -> list[Skill]:
    """All skills, each on about ``count`` cases."""
    held_out = drawn_cases(model, "held_out", count, seed)
    own = drawn_cases(model, "development", count, seed)
    skills = [share(f"text to image, {name}, held-out", [c.right for c in cases]) for name, cases in held_out.items()]
    skills += [share(f"text to image, {name}, development", [c.right for c in cases]) for name, cases in own.items()]
    mixed = own["bare"][::2] + own["planned"][1::2]
    skills += judging(model, mixed)
    skills += editing(model, count, seed)
    skills += reflecting(model, "rendered", rendered_cases(count, seed))
    skills += reflecting(model, "own", mixed)
    skills += [reconstruction(model, count, seed)]
    skills += regeneration(model, own["bare"], seed)
    return [*skills, stroke_plans(model, count)]


# --- text to image


def drawn_cases(model: UnifiedModel, split: str, count: int, seed: int) -> dict[str, list[Case]]:
    """Images of the first prompts of the split, drawn bare and planned."""
    prompts = prompt_set(split, count)
    asked = [(from_metadata(prompt.metadata or {}), prompt.text) for prompt in prompts]
    seeds = [1_000_003 * seed + number for number in range(count)]
    cases = {}
    for name, plan in (("bare", False), ("planned", True)):
        images = [
            one.image
            for some in batches(count)
            for one in draw_prompts(
                model, [text for _, text in asked[some]], DRAWING, seeds[some], seeds[some] if plan else None
            )
        ]
        cases[name] = [Case(*its, image) for its, image in zip(asked, images, strict=True)]
    return cases


def batches(count: int) -> Iterator[slice]:
    """Slices of at most ``BATCH``."""
    return (slice(first, first + BATCH) for first in range(0, count, BATCH))


def rendered_cases(count: int, seed: int) -> list[Case]:
    """Scenes of development prompts, half of them with an error that three edits can mend."""
    rng, cases = np.random.default_rng((seed, 1)), list[Case]()
    while len(cases) < count:
        spec, text = sample_prompt(rng, "development")
        scene = sample_scene(spec, rng)
        if len(cases) % 2:
            scene = perturb(scene, spec, rng)
            if not repaired(scene.things, spec):
                continue
        cases.append(Case(spec, text, fromarray(render(scene))))
    return cases


# --- judging


def judging(model: UnifiedModel, cases: Sequence[Case]) -> list[Skill]:
    """AUROC of soft scores of things, of the background and of the layout."""
    judge = SelfJudge(model)
    kinds: dict[str, list[tuple[float, bool]]] = {"region": [], "background": [], "layout": []}
    for some in batches(len(cases)):
        asked = [(case, proposed(case.image)) for case in cases[some]]
        images, prompts = [case.image for case, _ in asked], [case.prompt for case, _ in asked]
        for (case, regions), (judged, layout) in zip(
            asked, judge.judge(images, prompts, [regions for _, regions in asked]), strict=True
        ):
            pixels = np.asarray(case.image)
            for region, judgement in zip(regions, judged, strict=True):
                box = region.box if region.id else None
                if judgement.score is not None:
                    right = found_region_truth(box, pixels, case.metadata)
                    kinds["region" if region.id else "background"].append((judgement.score, right))
            if layout.score is not None:
                kinds["layout"].append((layout.score, found_layout_truth(pixels, case.metadata)))
    return [_auroc(f"judge, {name}, AUROC on own images", judged) for name, judged in kinds.items()]


def proposed(image: Image) -> list[Region]:
    """The boxes of the things that the checker finds, and the background."""
    found = [thing for thing in parse(np.asarray(image)) if not thing.stray]
    boxes = [Region(id=i, box=thing.box, area=max(thing.area, 1.0), source="truth") for i, thing in enumerate(found, 1)]
    return [*boxes, Region(id=0, box=(0, 0, 64, 64), area=4096.0, source="truth")]


def _auroc(name: str, judged: Sequence[tuple[float, bool]]) -> Skill:
    scores, right = [score for score, _ in judged], [right for _, right in judged]
    both = any(right) and not all(right)
    return Skill(name, 100 * auroc(scores, right) if both else float("nan"), len(judged))


# --- drawing on what is there


def shown(model: UnifiedModel, images: Sequence[Image]) -> list[list[Segment]]:
    """Images as a context begins with them that are to be changed: as latents and as seen."""
    return [to_edit(model, image)[0] for image in images]


def drawn_after(
    model: UnifiedModel,
    begun: Sequence[Sequence[Segment]],
    texts: Sequence[str],
    sampling: Sampling,
    seeds: Sequence[int],
) -> list[Image]:
    """Images of contexts that end with these texts, which guidance leaves out."""
    contexts = [
        [*context, Segment("text", text=text, droppable=True)] for context, text in zip(begun, texts, strict=True)
    ]
    return [made.image for made in model.draw(contexts, sampling, seeds)]


def editing(model: UnifiedModel, count: int, seed: int) -> list[Skill]:
    """True edits of rendered attempts: those carried out, untouched things kept, and the whole scene."""
    rng, cases = np.random.default_rng((seed, 2)), list[tuple[Scene, tuple[Edit, ...]]]()
    while len(cases) < count:
        spec, _ = sample_prompt(rng, "development")
        scene = perturb(sample_scene(spec, rng), spec, rng)
        if edits := repaired(scene.things, spec):
            cases.append((scene, edits))
    done, kept, whole = list[bool](), list[bool](), list[bool]()
    for some in batches(count):
        chosen = cases[some]
        images = [fromarray(render(scene)) for scene, _ in chosen]
        texts = [EDIT_MARK + format_edits(edits) for _, edits in chosen]
        changed = drawn_after(model, shown(model, images), texts, CHANGING, range(len(chosen)))
        for (scene, edits), image in zip(chosen, changed, strict=True):
            after = recognised(np.asarray(image)).things
            wanted = apply(scene, edits).things
            untouched = set(map(placed, scene.things)) & set(map(placed, wanted))
            there = set(map(placed, after))
            done += [carried_out(edit, there) for edit in edits]
            kept += [thing in there for thing in untouched]
            whole.append(same_things(after, wanted))
    return [
        share("edits carried out", done),
        share("untouched things kept", kept),
        share("edited scene exactly right", whole),
    ]


def carried_out(edit: Edit, there: set[str]) -> bool:
    """Whether, of the things ``there`` (labels and cells), what was before is gone and what comes after is one."""
    gone = edit.before is None or edit.before == edit.after or placed(edit.before) not in there
    return gone and (edit.after is None or placed(edit.after) in there)


def reconstruction(model: UnifiedModel, count: int, seed: int) -> Skill:
    """Scenes seen and drawn again: the same things in the same cells."""
    rng, same = np.random.default_rng((seed, 3)), list[bool]()
    scenes = [random_scene(int(rng.integers(1, 6)), rng) for _ in range(count)]
    for some in batches(count):
        images = [fromarray(render(scene)) for scene in scenes[some]]
        texts = [RECONSTRUCT_TEMPLATES[0]] * len(images)
        seen = [[Segment("seen", image=image)] for image in images]
        drawn = drawn_after(model, seen, texts, CHANGING, range(len(images)))
        pairs = zip(scenes[some], drawn, strict=True)
        same += [same_things(recognised(np.asarray(image)).things, scene.things) for scene, image in pairs]
    return share("scenes reconstructed", same)


def regeneration(model: UnifiedModel, cases: Sequence[Case], seed: int) -> list[Skill]:
    """Bare drawings that miss their prompt: drawn again after they were seen, and from the prompt alone."""
    wrong = [case for case in cases if not case.right]
    seen, alone = list[bool](), list[bool]()
    for some in batches(len(wrong)):
        chosen, n = wrong[some], len(wrong[some])
        seeds = [2_000_003 * (seed + 1) + number for number in range(n)]
        system = Segment("text", text=REFINE_SYSTEM)
        begun = [[system, Segment("seen", image=case.image)] for case in chosen]
        again = drawn_after(model, begun, [REFINE_USER.format(prompt=case.prompt) for case in chosen], DRAWING, seeds)
        once = draw_prompts(model, [case.prompt for case in chosen], DRAWING, seeds)
        seen += [replace(case, image=image).right for case, image in zip(chosen, again, strict=True)]
        alone += [replace(case, image=one.image).right for case, one in zip(chosen, once, strict=True)]
    return [share("regenerated after a wrong image", seen), share("the same prompts drawn once more", alone)]


# --- texts


def reflecting(model: UnifiedModel, kind: str, cases: Sequence[Case]) -> list[Skill]:
    """Right images stopped, wrong ones given edits that mend them; replies that can be read."""
    readable, stopped, mended = list[bool](), list[bool](), list[bool]()
    for some in batches(len(cases)):
        chosen = cases[some]
        contexts = [
            [Segment("seen", image=case.image), Segment("text", text=REFLECT_QUESTION.format(prompt=case.prompt))]
            for case in chosen
        ]
        for case, reply in zip(chosen, model.write(contexts, REPLY, [0] * len(chosen)), strict=True):
            edits = _read(reply.text)
            readable.append(edits is not None)
            if case.right:
                stopped.append(edits == ())
            else:
                things = recognised(np.asarray(case.image)).things
                mended.append(bool(edits) and _mends(things, edits or (), case.spec))
    return [
        share(f"reflection on {kind} images, readable", readable),
        share(f"reflection on {kind} images, right ones stopped", stopped),
        share(f"reflection on {kind} images, wrong ones told what mends them", mended),
    ]


def _read(reply: str) -> tuple[Edit, ...] | None:
    try:
        return parse_reflection(reply)[1]
    except ValueError:
        return None


def _mends(things: Sequence[Thing], edits: Sequence[Edit], spec: Spec) -> bool:
    try:
        return meets(apply(Scene(tuple(things)), edits), spec)
    except ValueError:  # an edit of what is not there, or two things in a cell
        return False


def stroke_plans(model: UnifiedModel, count: int) -> Skill:
    """First strokes of development prompts that can be read and be completed."""
    prompts, good = prompt_set("development", count), list[bool]()
    for some in batches(count):
        contexts = [[Segment("text", text=prompt.text)] for prompt in prompts[some]]
        plans = model.write(contexts, REPLY, [0] * len(contexts))
        good += [
            _completable(plan.text, from_metadata(p.metadata or {}))
            for plan, p in zip(plans, prompts[some], strict=True)
        ]
    return share("first strokes planned that can be completed", good)


def _completable(plan: str, spec: Spec) -> bool:
    try:
        return completable(parse_plan(plan).things, spec)
    except ValueError:
        return False


def table(skills: Sequence[Skill]) -> Table:
    """The skills with n and interval."""
    shown = Table("skill", "value", "95% interval", "n")
    for skill in skills:
        interval = "" if skill.interval is None else f"{skill.interval[0]:.1f} to {skill.interval[1]:.1f}"
        shown.add_row(skill.name, f"{skill.value:.1f}", interval, str(skill.n))
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="srum-tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    model = models.load(options.model, options.device)
    skills = measure(model, options.count, options.seed)
    Console(width=110).print(table(skills))
    if options.out:
        options.out.write_text(json.dumps([asdict(skill) for skill in skills], indent=2) + "\n")


if __name__ == "__main__":
    main()
