"""T2I-ReasonBench: idioms, text, entities and science, by questions about a description of the image."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image

from srum.evaluation.benchmark import (
    Benchmark,
    Failure,
    Item,
    Judge,
    Unreadable,
    Values,
    Verdict,
    asked,
    equally,
    hashed,
)
from srum.evaluation.data import Origin, Template
from srum.exchange.chat import Message, NoReply, assistant, user

DIMENSIONS = {
    "idiom": ("idiom_interpretation", "evaluation_idiom", "eval_idiom", {"reason_evaluation": 1.0}),
    "textual": ("textual_image_design", "evaluation_textual_image", "eval_textual_image", {"reason_evaluation": 1.0}),
    "entity": (
        *("entity_reasoning", "evaluation_entity", "eval_entity"),
        {"entity_evaluation": 0.7, "other_details_evaluation": 0.3},
    ),
    "scientific": (
        *("scientific_reasoning", "evaluation_scientific", "eval_scientific"),
        {"scientific_evaluation": 0.7, "other_details_evaluation": 0.3},
    ),
}  # column -> prompts and folder of images, questions, scorer, weights of its blocks
QUALITY = "quality_evaluation"
DESCRIBE = "Describe this image."
README = "{} (SRUM's README)"  # accuracy and quality in one number


class ReasonBench(Benchmark):
    """Percent of criteria that are met, accuracy and quality apart; overall is the mean of four dimensions."""

    name = "reasonbench"
    top = 100.0
    about = "what a prompt means but does not say: idioms, layout of text, entities, science"
    watch = "draw from prompts/: the questions' own prompt field differs in 11 items and tells one answer"
    licence = "none is stated: read from a checkout"
    origin = Origin("KaiyueSun98/T2I-ReasonBench", "efc1d20")
    printed: ClassVar[Mapping[str, str]] = {name: README.format(name) for name in DIMENSIONS}
    max_tokens = 1000
    tries = 5

    def items(self, samples: int) -> list[Item]:
        items = []
        self.templates: dict[str, Template] = {}
        for name, (prompts, questions, scorer, blocks) in DIMENSIONS.items():
            rows = self.data.json(f"prompts/{prompts}.json")
            asked_for = {row["id"]: row for row in self.data.json(f"deepseek_evaluation_qs/{questions}.json")}
            self.data.require(len(rows), 200, f"prompts of {prompts}")
            self.templates[name] = self._template(f"evaluation/Qwen2.5-VL/{scorer}.py")
            for row in rows:
                facts = {block: asked_for[row["id"]][block] for block in (*blocks, QUALITY)}
                items += [self._item(name, prompts, row, facts, k) for k in range(samples)]
        return items

    def _template(self, scorer: str) -> Template:
        """The question for the block of criteria: the same words for each, with another variable."""
        text = self.data.template(scorer, "questions and criteria", {}).text
        slot = re.search(r"\{(\w+_question_criteria)\}", text)
        return Template(text, {slot[1] if slot else "questions": "questions"})

    def _item(self, name: str, folder: str, row: Any, facts: Any, k: int) -> Item:
        number = f"{row['id']:04d}"
        path = f"{folder}/{number}{f'_{k}' if k else ''}.png"
        return Item(f"{name}-{number}-{k}", row["prompt"], path, name, f"{name}-{number}", facts=facts)

    @property
    def template_hash(self) -> str:
        return hashed(DESCRIBE, *(template.text for template in self.templates.values()))

    def score(self, item: Item, image: Image.Image, evaluator: Judge) -> Verdict:
        described = evaluator.ask([user(image, DESCRIBE)], self.max_tokens)
        if isinstance(described, NoReply):
            return self.verdict(item, evaluator, failure=Failure.NO_REPLY, raw=[described.why])
        begun = [user(image, DESCRIBE), assistant(described.text)]
        raw, ours, theirs = [described.text], {}, {}
        first_failure: Failure | None = None
        for block, questions in item.facts.items():
            count = sum(key.startswith("q") for key in questions)
            turns = [*begun, user(self.templates[item.category].fill(questions=str(questions)))]
            scores, failure, replies = self._asked(evaluator, turns, count)
            raw += replies
            ours[block], theirs[block] = scores, _or_none(official_scores, replies[0])
            first_failure = first_failure or failure
        values = {} if first_failure else self._values(item, ours)
        official = {} if None in theirs.values() else self._values(item, theirs)
        return self.verdict(item, evaluator, values=values, official=official, failure=first_failure, raw=raw)

    def _asked(self, judge: Judge, turns: Sequence[Message], count: int) -> Any:
        return asked(judge, turns, self.max_tokens, self.tries, lambda reply: scores_of(reply, count))

    def _values(self, item: Item, scores: dict[str, Any]) -> Values:
        mean = {block: 100 * sum(numbers) / len(numbers) for block, numbers in scores.items()}
        accuracy = sum(weight * mean[block] for block, weight in DIMENSIONS[item.category][3].items())
        return {f"{item.category}_acc": [accuracy], f"{item.category}_qual": [mean[QUALITY]]}

    def figures(self) -> dict[str, dict[str, float]]:
        shares = {"idiom": 0.1, "textual": 0.1, "entity": 0.25, "scientific": 0.25}  # of quality
        composites = {
            README.format(name): {f"{name}_acc": 1 - share, f"{name}_qual": share} for name, share in shares.items()
        }
        return {
            "accuracy": equally([f"{name}_acc" for name in DIMENSIONS]),
            "quality": equally([f"{name}_qual" for name in DIMENSIONS]),
            **composites,
            README.format("mean"): equally(list(composites)),
        }


def official_json(reply: str) -> Any:
    """The first braces without braces in them, as JSON; ValueError where the original's run ends."""
    match = re.search(r"\{.*?\}", reply, re.DOTALL)
    return json.loads(match[0] if match else "")


def official_scores(reply: str) -> list[float]:
    """The list of scores as the original takes it, of any length. Raises Unreadable where its run ends."""
    try:
        scores = [float(score) for score in official_json(reply)["score"]]
    except (ValueError, TypeError, LookupError) as error:
        raise Unreadable(str(error)) from None
    if not scores:
        raise Unreadable("no scores")
    return scores


def scores_of(reply: str, count: int) -> list[float]:
    """As many scores of 0, 0.5 or 1 as there are questions, whatever stands in the reasons. Raises Unreadable."""
    lists = re.findall(r'"score"\s*:\s*\[([^\[\]]*)\]', reply)
    numbers = [number.strip().strip("\"'") for number in lists[-1].split(",")] if len(lists) == 1 else []
    if len(numbers) != count or not set(numbers) <= {"0", "0.0", "0.5", "1", "1.0"}:
        raise Unreadable(f"no {count} scores of 0, 0.5 or 1")
    return [float(number) for number in numbers]


def _or_none(read: Any, reply: str) -> Any:
    try:
        return read(reply)
    except Unreadable:
        return None
