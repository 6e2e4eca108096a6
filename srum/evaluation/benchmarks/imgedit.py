"""ImgEdit-Bench, basic: nine types of edits of photographs, by a judge who sees both."""

from __future__ import annotations

import re
from typing import ClassVar

from PIL import Image

from srum.evaluation.benchmark import BAGEL, Item, JudgedBenchmark, Unreadable, Values, equally, hashed
from srum.evaluation.data import DataError, Origin
from srum.exchange.chat import Message, user
from srum.images import open_image
from srum.models.base import Sampling

EDITS, TEMPLATES = "Benchmark/Basic/basic_edit.json", "Benchmark/Basic/prompts.json"
TYPES = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")
SLOT = "<edit_prompt>"
EDITING = Sampling(guidance_interval=(0.0, 1.0), image_guidance=1.5, renorm="text_channel")  # BAGEL's script


class ImgEdit(JudgedBenchmark):
    """1 to 5: the mean of three scores; overall once as the mean of types, once as that of all edits."""

    name = "imgedit"
    about = "edits: add, adjust, extract, replace, remove, background, style, compose, action"
    watch = "printed overalls are sometimes the mean of types, sometimes of edits, sometimes neither; both are here"
    licence = "none is stated: read from a checkout that holds the data set's images"
    origin = Origin("PKU-YuanGroup/ImgEdit", "547185d")
    presets: ClassVar[dict[str, Sampling]] = {"bagel": EDITING, "text": BAGEL}
    max_tokens = 1024
    official_tries = 1

    def items(self, samples: int) -> list[Item]:
        edits, self.templates = self.data.json(EDITS), self.data.json(TEMPLATES)
        self.data.require(len(edits), 737, "edits")
        if lacking := {edit["edit_type"] for edit in edits.values()} - self.templates.keys():
            raise DataError(f"{TEMPLATES} has no template for {', '.join(sorted(lacking))}")
        return [
            Item(f"{key}-{k}", edit["prompt"], f"{key}{f'_{k}' if k else ''}.png", edit["edit_type"], key, facts=edit)
            for key, edit in edits.items()
            for k in range(samples)
        ]

    def source(self, item: Item) -> Image.Image:
        return open_image(self.data.path(f"singleturn/{item.facts['id']}"))

    @property
    def template_hash(self) -> str:
        return hashed(*(f"{name}{text}" for name, text in sorted(self.templates.items())))

    def messages(self, item: Item, image: Image.Image) -> list[Message]:
        text = self.templates[item.category].replace(SLOT, item.prompt)
        return [user(text, self.source(item), image)]

    def read(self, item: Item, reply: str) -> Values:
        """Three named scores of 1 to 5, in bold or of 5 or not."""
        pattern = r"^[\s*#>-]*([A-Z][\w &/-]+?)[\s*]*:[\s*]*([1-5])(?:\s*/\s*5|\.0)?[\s*.]*$"
        scores = re.findall(pattern, reply, re.MULTILINE)
        if len(scores) != 3 or len({name for name, _ in scores}) != 3:
            raise Unreadable(f"{len(scores)} scores of 1 to 5, not three")
        return self._values(item, round(sum(int(score) for _, score in scores) / 3, 2))

    def read_officially(self, item: Item, reply: str) -> Values:
        score = official_score(reply)
        if score is None:
            raise Unreadable("no line with a score")
        return self._values(item, score)

    def _values(self, item: Item, score: float) -> Values:
        return {item.category: [score], "all edits": [score]}

    def figures(self) -> dict[str, dict[str, float]]:
        return {"mean of types": equally(TYPES), "mean of edits": {"all edits": 1.0}}


def official_score(reply: str) -> float | None:
    """The mean of what stands after a colon in all lines with digits alone there, rounded."""
    parts = [line.strip().split(": ") for line in reply.split("\n")]
    scores = [int(pair[1]) for pair in parts if len(pair) == 2 and pair[1].isdigit()]
    return round(sum(scores) / len(scores), 2) if scores else None
