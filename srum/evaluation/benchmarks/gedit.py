"""GEdit-Bench: edits that people asked for, by VIEScore (Step1X-Edit)."""

from __future__ import annotations

import io
import json
import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from srum.evaluation.benchmark import Benchmark, Item, Judge, Unreadable, Values, Verdict, asked, equally, hashed
from srum.evaluation.data import DataError, Origin
from srum.exchange.chat import user
from srum.images import to_rgb
from srum.models.base import Sampling

GROUPS = (
    *("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change", "subject-add"),
    *("subject-remove", "subject-replace", "text_change", "tone_transfer"),
)
TEMPLATES = "viescore/vie_prompts.py"
EDITING = Sampling(guidance_interval=(0.4, 1.0), image_guidance=1.5, renorm="text_channel")  # BAGEL's script
SLOT = "<instruction>"


class Gedit(Benchmark):
    """0 to 10: semantic consistency, quality, and the root of their product; means of eleven groups."""

    name = "gedit"
    about = "edits that people asked for: success, overediting, naturalness, artifacts"
    watch = "the original gives a reply without JSON a random score; one judge's name has stood for rows 0.4 apart"
    licence = "MIT (data set, VIEScore), Apache-2.0 (Step1X-Edit)"
    origin = Origin("stepfun-ai/Step1X-Edit", "570eba6")
    variants = ("en", "cn")
    presets: ClassVar[dict[str, Sampling]] = {"bagel": EDITING}
    max_tokens = 1400

    def items(self, samples: int) -> list[Item]:
        context = self.data.assigned(TEMPLATES, "_context_no_delimit")
        rules = [self.data.assigned(TEMPLATES, f"_prompts_0shot_{name}") for name in RULES]
        self.semantic, self.quality = "\n".join([context, *rules[:2]]), "\n".join([context, rules[2]])
        rows = [row for row in self._rows if row["instruction_language"] == self.variant]
        if not rows:
            raise DataError(f"{self.data.checkout} has no instructions in {self.variant}")
        return [self._item(row, k) for row in rows for k in range(samples)]

    def _item(self, row: dict[str, Any], k: int) -> Item:
        path = f"fullset/{row['task_type']}/{self.variant}/{row['key']}{f'_{k}' if k else ''}.png"
        name = f"{row['key']}-{self.variant}"
        return Item(f"{name}-{k}", row["instruction"], path, row["task_type"], name, facts={"key": row["key"]})

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        """The rows of the data set's parquet files, images as bytes."""
        import pyarrow.parquet

        files = sorted((self.data.checkout or Path()).rglob("*.parquet"))
        if not files:
            raise DataError(f"{self.data.checkout} has no parquet file: put stepfun-ai/GEdit-Bench of the hub there")
        self.data.used |= {path.name: str(path.stat().st_size) for path in files}
        return [row for path in files for row in pyarrow.parquet.read_table(path).to_pylist()]

    @cached_property
    def _sources(self) -> dict[str, bytes]:
        return {row["key"]: row["input_image"]["bytes"] for row in self._rows}

    def source(self, item: Item) -> Image.Image:
        return to_rgb(Image.open(io.BytesIO(self._sources[item.facts["key"]])))

    def source_path(self, item: Item) -> str:
        return str(Path(item.path).with_name(f"{item.facts['key']}_SRCIMG.png"))

    @property
    def template_hash(self) -> str:
        return hashed(self.semantic, self.quality)

    def score(self, item: Item, image: Image.Image, evaluator: Judge) -> Verdict:
        source = self.source(item)
        edited = image.resize(source.size)
        questions = [user(self.semantic.replace(SLOT, item.prompt), source, edited), user(self.quality, edited)]
        lowest, theirs, raw = [], [], []
        for question in questions:
            score, failure, replies = asked(evaluator, [question], self.max_tokens, 5, lowest_score)
            raw += replies
            if failure is not None:
                return self.verdict(item, evaluator, failure=failure, raw=raw)
            lowest.append(score)
            theirs.append(official_lowest(replies[0]))
        official = {} if None in theirs else self._values(item, *theirs)  # type: ignore[arg-type]
        return self.verdict(item, evaluator, values=self._values(item, *lowest), official=official, raw=raw)

    def _values(self, item: Item, semantic: float, quality: float) -> Values:
        group = item.category
        return {
            f"{group}/SC": [semantic],
            f"{group}/PQ": [quality],
            group: [math.sqrt(semantic * quality)],
        }

    def figures(self) -> dict[str, dict[str, float]]:
        return {
            "semantic": equally([f"{group}/SC" for group in GROUPS]),
            "quality": equally([f"{group}/PQ" for group in GROUPS]),
            "overall": equally(GROUPS),
        }

    @property
    def published(self) -> str:
        return f"gedit_{self.variant}"


RULES = ("two_image_edit_rule", "tie_rule_SC", "rule_PQ")


def official_reading(reply: str) -> Any:
    """What VIEScore makes of a reply: an object, an object around a bare list, or False, upon which it asks again."""
    marked = reply.split("||V^=^V||")
    text = marked[1] if len(marked) >= 3 else reply
    begin, end = text.find("{"), text.rfind("}")
    if begin == -1:
        begin, end = text.find("["), text.rfind("]")
    try:
        values = json.loads(text[begin : end + 1])
    except (ValueError, RecursionError):
        return False
    return (
        {"score": values, "reasoning": "System: output is simply a list of scores"}
        if isinstance(values, list)
        else values
    )


def official_lowest(reply: str) -> float | None:
    """The lowest of the original's scores; None where it would ask again, or fail."""
    values = official_reading(reply)
    scores = values.get("score") if isinstance(values, dict) else None
    return min(scores) if isinstance(scores, list) and scores and not any(isinstance(s, str) for s in scores) else None


def lowest_score(reply: str) -> float:
    """The lowest of the scores of 0 to 10, also written as strings, whatever the reasoning holds. Raises Unreadable."""
    lists = re.findall(r'"score"\s*:\s*\[([^\[\]]*)\]', reply) or re.findall(r"^\s*\[([^\[\]]*)\]\s*$", reply)
    numbers = [number.strip().strip("\"'") for number in lists[0].split(",")] if len(lists) == 1 else []
    if not numbers or not all(re.fullmatch(r"\d+(?:\.\d+)?", number) and float(number) <= 10 for number in numbers):
        raise Unreadable("no scores of 0 to 10")
    return min(map(float, numbers))
