"""GenEval: objects, counts, colours and positions, decided by a detector (Ghosh et al., 2023)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from srum.evaluation.benchmark import Benchmark, Item, Verdict, equally
from srum.evaluation.data import Origin
from srum.evaluation.detection import Detection, Named, by_name
from srum.records import Box

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
PROMPTS = {"short": "prompts/evaluation_metadata.jsonl", "rewritten": "prompts/evaluation_metadata_long.jsonl"}
NAMES = "evaluation/object_names.txt"
THRESHOLD, COUNTING_THRESHOLD, MOST = 0.3, 0.9, 16  # scores above these, and at most so many of a class
APART = 0.1  # of both sizes together: centres nearer than this are on no side of one another


class Geneval(Benchmark):
    """Share of images that show what their prompt asks for; overall is the mean of six categories."""

    name = "geneval"
    about = "one or two objects, counts, colours, positions"
    watch = (
        "short and rewritten prompts (0.82 and 0.88 for BAGEL) look alike in tables; its wording is in training sets"
    )
    licence = "MIT"
    origin = Origin(
        "djghosh13/geneval",
        "af4902f",
        {
            PROMPTS["short"]: "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            NAMES: "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd",
        },
    )
    variants = ("short", "rewritten")  # rewritten: of a checkout of BAGEL, eval/gen/geneval
    evaluators = ("detector",)
    samples = 4
    digits = 3

    def items(self, samples: int) -> list[Item]:
        prompts = self.data.lines(PROMPTS[self.variant])
        self.data.require(len(prompts), 553, "prompts")
        self.names = self.data.text(NAMES).split("\n")[:80]
        return [
            Item(
                f"{line:05d}-{k}",
                facts["prompt"],
                f"{line:05d}/samples/{k:05d}.png",
                facts["tag"],
                f"{line:05d}",
                facts=facts,
            )
            for line, facts in enumerate(prompts)
            for k in range(samples)
        ]

    def side_files(self, items: Sequence[Item]) -> dict[str, str]:
        return {f"{item.group}/metadata.jsonl": json.dumps(item.facts) for item in items}

    def score(self, item: Item, image: Image.Image, evaluator: Any) -> Verdict:
        objects = selected(by_name(evaluator.detect(image), self.names), item.category)

        def colours(name: str, things: Sequence[Detection]) -> list[str]:
            told: list[str] = evaluator.colours(image, things, name)
            return told

        reasons = faults(item.facts, objects, colours)
        values = {item.category: [float(not reasons)]}
        return self.verdict(item, evaluator, values=values, official=values, raw=reasons)

    def figures(self) -> dict[str, dict[str, float]]:
        return {"overall": equally(TAGS)}


def selected(objects: Named, tag: str) -> dict[str, list[Detection]]:
    """Those of each class that count, best first: surer ones where the tag is counting."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    return {name: [thing for thing in things if thing.score > threshold][:MOST] for name, things in objects.items()}


def faults(facts: Any, objects: Named, colours: Callable[[str, Sequence[Detection]], Sequence[str]]) -> list[str]:
    """Why an image with these ``objects`` (by class, best first) is not what ``facts`` ask for; empty: it is.

    ``colours`` tells those of objects of a class, and is asked only where the facts name one.
    """
    reasons: list[str] = []
    clauses: list[list[Detection] | None] = []
    for clause in facts.get("include", ()):
        things = list(objects.get(clause["class"], ())[: clause["count"]])
        if fault := _fault(clause, things, clauses, colours):
            reasons.append(fault)
        clauses.append(None if fault else things)
    for clause in facts.get("exclude", ()):
        if (count := len(objects.get(clause["class"], ()))) >= clause["count"]:
            reasons.append(f"{count} {clause['class']}, fewer than {clause['count']} were asked for")
    return reasons


def _fault(clause: Any, things: list[Detection], earlier: Sequence[list[Detection] | None], colours: Any) -> str:
    """Why these objects are not what the clause asks for; empty: they are."""
    name, count = clause["class"], clause["count"]
    if len(things) < count:
        return f"{len(things)} {name}, {count} were asked for"
    if "color" in clause:
        told = list(colours(name, things))
        if told.count(clause["color"]) < count:
            return f"{name} is {', '.join(told)}, {clause['color']} was asked for"
    if "position" in clause:
        relation, index = clause["position"]
        targets = earlier[index]
        if targets is None:
            return f"nothing for {name} to be {relation}"
        for thing in things:
            for target in targets:
                if relation not in (true := relations(thing.box, target.box)):
                    return f"{name} is {' and '.join(sorted(true)) or 'beside'}, {relation} was asked for"
    return ""


def relations(a: Box, b: Box) -> set[str]:
    """Where ``a`` lies as seen from ``b``: one side, two, or none."""
    first, second = (np.array(box).reshape(2, 2) for box in (a, b))
    offset = first.mean(axis=0) - second.mean(axis=0)
    sizes = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    beyond = np.maximum(np.abs(offset) - APART * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    sides = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {side for side, holds in sides.items() if holds}
