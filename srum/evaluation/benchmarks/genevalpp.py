"""GenEval++: attributes, counts, regions and sizes together, by a judge that says right or wrong (Echo-4o)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from srum.evaluation.benchmark import Item, JudgedBenchmark, Unreadable, Values, equally, hashed
from srum.evaluation.data import Origin, Template
from srum.exchange.chat import Message, system, user

TAGS = (
    *("color_attr", "spatial_count_attr", "color_spatial_attr", "color_count_attr", "multi_object_count_attr"),
    *("size_spatial_attr", "counting"),
)
PROMPTS, SCORER = "geneval++/metadata.jsonl", "geneval++/evaluation.py"


class GenevalPlus(JudgedBenchmark):
    """Share of images that meet their whole checklist; overall is the mean of seven categories."""

    name = "genevalpp"
    about = "several attributes, counts, regions and sizes at once"
    watch = "the judge wants one photograph: stylized images lose; it is a moving target, so name its date"
    licence = "Apache-2.0"
    origin = Origin("yejy53/Echo-4o", "28f36d7")
    max_tokens = 200
    digits = 3

    def items(self, samples: int) -> list[Item]:
        rows = self.data.lines(PROMPTS)
        self.data.require(len(rows), 280, "prompts")
        slots = {"prompt": "prompt", "checklist": "checklist"}
        self.question: Template = self.data.template(SCORER, "Expectation checklist", slots)
        self.system = self.data.template(SCORER, "expert image evaluator", {}).text
        return [
            Item(f"{line}-{k}", row["prompt"], f"{line}{f'_{k}' if k else ''}.jpg", row["tag"], str(line), facts=row)
            for line, row in enumerate(rows, start=1)
            for k in range(samples)
        ]

    @property
    def template_hash(self) -> str:
        return hashed(self.system, self.question.text)

    def messages(self, item: Item, image: Image.Image) -> list[Message]:
        text = self.question.fill(prompt=item.prompt, checklist=checklist(item.facts))
        return [system(self.system), user(text, image)]

    def read(self, item: Item, reply: str) -> Values:
        return {item.category: [float(correct(reply))]}

    def official_failure(self, item: Item) -> Values:
        return {item.category: [0.0]}

    def figures(self) -> dict[str, dict[str, float]]:
        return {"overall": equally(TAGS)}


def checklist(facts: Mapping[str, Any]) -> str:
    """What a judge is to look for, in the original's words and grammar."""
    lines = ["This image should contain:"]
    for clause in facts.get("include", ()):
        colour = f"{clause['color']}-colored " if "color" in clause else ""
        size = f"{clause['size']} " if "size" in clause else ""
        name = clause["class"] + ("s" if clause["count"] > 1 else "")
        place = f"located in the {clause['region']} part of" if "region" in clause else "present in"
        lines.append(f"- {colour}{size}{clause['count']} {name} {place} the image.")
    for clause in facts.get("exclude", ()):
        lines.append(f"- No more than {clause['count'] - 1} {clause['class']}s should appear.")
    return "\n".join(lines)


def parsed(reply: str) -> Any:
    """The outermost braces as JSON. Raises Unreadable."""
    try:
        return json.loads(reply[reply.index("{") : reply.rindex("}") + 1])
    except (ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from None


def correct(reply: str) -> bool:
    """Whether the judge says right: ``correct`` is 1 or true. Raises Unreadable where it does not say."""
    values = parsed(reply)
    if not isinstance(values, dict) or "correct" not in values:
        raise Unreadable("no verdict")
    return bool(values["correct"] == 1)
