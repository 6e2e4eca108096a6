"""The embedded world as a benchmark: coloured shapes, and an exact checker that decides from pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from srum.config import EvalConfig
from srum.evaluation.benchmark import Benchmark, Evaluator, Failure, Item, Verdict
from srum.models.base import Sampling
from srum.records import Prompt
from srum.seeding import seed_for
from srum.shapes.checker import check
from srum.shapes.prompts import prompt_set


class Shapes(Benchmark):
    """Percent of images that show exactly what is asked for. It is the evaluation of a run, its prompts, images and
    verdicts (``srum.evaluation.accuracy``), for any weights."""

    name = "shapes"
    top = 100.0
    about = "counts, colours, sizes and positions of coloured shapes, as an exact checker sees them"
    watch = "one training has no spread that an interval over prompts could cover"
    licence = "Apache-2.0, of this project"
    variants = ("held_out", "development", "compositional")
    evaluators = ("checker",)
    presets: ClassVar[Mapping[str, Sampling]] = {"tiny": Sampling(**EvalConfig().sampling())}
    digits = 1

    def items(self, samples: int) -> list[Item]:
        prompts = prompt_set(self.variant, EvalConfig().count)
        return [_item(prompt, f"{prompt.id}-{k}" if k else prompt.id) for prompt in prompts for k in range(samples)]

    def seed(self, seed: int, item: Item, *purpose: str | int) -> int:
        return seed_for(seed, item.id, *purpose)

    def score(self, item: Item, image: Image.Image, evaluator: Evaluator) -> Verdict:
        try:
            verdict = check(np.asarray(image), dict(item.facts))
        except ValueError as error:  # of another size
            return self.verdict(item, evaluator, failure=Failure.NO_IMAGE, raw=[str(error)])
        values: Any = {item.category: [100.0 * verdict.correct], "all": [100.0 * verdict.correct]}
        return self.verdict(item, evaluator, values=values, official=values, raw=verdict.reasons)

    def figures(self) -> dict[str, dict[str, float]]:
        return {"accuracy": {"all": 1.0}}


def _item(prompt: Prompt, name: str) -> Item:
    return Item(name, prompt.text, f"{name}.png", prompt.metadata["tag"], prompt.id, facts=prompt.metadata)
