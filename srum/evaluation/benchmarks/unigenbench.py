"""UniGenBench++: 27 test points in ten dimensions, each met or not (CodeGoat24)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from srum.evaluation.benchmark import Item, JudgedBenchmark, Unreadable, Values, equally, hashed
from srum.evaluation.data import DataError, Origin, Template
from srum.exchange.chat import Message, user

SCORER = "eval/qwenvl_72b_en_eval.py"
DIMENSIONS = (
    *("style", "world_knowledge", "attribute", "action", "relationship", "logical_reasoning", "grammar", "compound"),
    *("layout", "text"),
)
SHORT = {"entity_layout": "layout", "text_generation": "text"}  # what papers call them


class UniGenBench(JudgedBenchmark):
    """Percent of test points that are met; overall is the plain mean of ten dimensions."""

    name = "unigenbench"
    top = 100.0
    about = "test points of each prompt, met or not, in ten dimensions"
    watch = "text is a tenth of the overall, and 0 for BAGEL; rows of the leaderboard move with the judge's release"
    licence = "CC BY 4.0"
    origin = Origin("CodeGoat24/UniGenBench", "49d0bce")
    variants = ("en", "en_long")
    samples = 4
    max_tokens = 4096
    tries = official_tries = 11

    def items(self, samples: int) -> list[Item]:
        rows = self.data.table(f"data/test_prompts_{self.variant}.csv")
        self.data.require(len(rows), 600, "prompts")
        slots = ("prompt", "testpoint", "explanation", "test_explanation")
        self.template: Template = self.data.template(SCORER, "<checkpoint>", dict(zip(slots, slots, strict=True)))
        self.explanations: dict[str, str] = self.data.assigned(SCORER, "explanation_dict")
        return [
            Item(
                f"{row['index']}_{k}",
                row["prompt_en"],
                f"{row['index']}_{k}.png",
                "prompts",
                row["index"],
                facts=_points(row),
            )
            for row in rows
            for k in range(samples)
        ]

    @property
    def template_hash(self) -> str:
        return hashed(self.template.text)

    def messages(self, item: Item, image: Image.Image) -> list[Message]:
        points, told = item.facts["Testpoints"], item.facts["Testpoint Description"]
        meaning = [f"\n{point}: {self.explanations[point]}" for point in points]
        here = [f"\n{point}: {text}" for point, text in zip(points, told, strict=True)]
        text = self.template.fill(
            prompt=item.prompt,
            testpoint=str(points),
            explanation="Checkpoints Defination:\u300c" + "".join(meaning) + "\n\u300d",
            test_explanation="Checkpoints Description:\u300c" + "".join(here) + "\n\u300d",
        )
        return [user(image, text)]

    def read(self, item: Item, reply: str) -> Values:
        """The scores alone: an apostrophe in the analysis, on which the original fails, costs nothing."""
        return self._values(item, scores_of(reply, item.facts["Testpoints"]))

    def read_officially(self, item: Item, reply: str) -> Values:
        read = official_reading(reply, item.facts["Testpoints"])
        if read is None:
            raise Unreadable("no two lists of the right length")
        return self._values(item, read[1])

    def _values(self, item: Item, scores: Sequence[Any]) -> Values:
        values: Values = {}
        for point, score in zip(item.facts["Testpoints"], scores, strict=True):
            values.setdefault(dimension(point), []).append(100.0 * (score == 1))
        return values

    def figures(self) -> dict[str, dict[str, float]]:
        return {"overall": equally(DIMENSIONS)}

    @property
    def published(self) -> str:
        return f"unigenbench_{self.variant}"


def dimension(point: str) -> str:
    """The dimension of a test point."""
    name = point.split(" - ")[0].strip().lower().replace(" ", "_")
    return SHORT.get(name, name)


def official_reading(reply: str | None, points: Sequence[str]) -> tuple[list[Any], list[Any]] | None:
    """Analysis and scores as the original reads them, as Python literals of the right length; None: it asks again."""
    try:
        analysis, scores = (
            ast.literal_eval(re.search(rf"<{tag}>(.*?)</{tag}>", reply or "", re.DOTALL)[1].strip())  # type: ignore[index]
            for tag in ("analysis", "score")
        )
        return (analysis, scores) if len(analysis) == len(scores) == len(points) else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def scores_of(reply: str, points: Sequence[str]) -> list[int]:
    """A 0 or 1 for each test point. Raises Unreadable."""
    blocks = re.findall(r"<score>(.*?)</score>", reply, re.DOTALL)
    if len(blocks) != 1 or not re.fullmatch(r"\s*\[?\s*[01](?:\.0)?(?:\s*,\s*[01](?:\.0)?)*\s*,?\s*\]?\s*", blocks[0]):
        raise Unreadable("no list of 0 and 1")
    scores = [int(float(number)) for number in re.findall(r"[01](?:\.0)?", blocks[0])]
    if len(scores) != len(points):
        raise Unreadable(f"{len(scores)} scores for {len(points)} test points")
    return scores


def _points(row: dict[str, str]) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(row["sub_dims_en"])
    except ValueError as error:
        raise DataError(
            f"row {row['index']} of the prompts: sub_dims_en is not JSON ({error}); mend it there"
        ) from None
    return facts
