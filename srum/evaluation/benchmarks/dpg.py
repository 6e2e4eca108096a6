"""DPG-Bench: dense prompts as graphs of yes/no questions (ELLA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from srum.evaluation.benchmark import Benchmark, Item, Unreadable, Values, Verdict, asked, hashed
from srum.evaluation.data import Origin
from srum.exchange.chat import user

QUESTIONS = "dpg_bench/dpg_bench.csv"
SUFFIX = " Answer yes or no."
LEVEL_1 = ("entity", "attribute", "relation", "global", "other")


class Dpg(Benchmark):
    """Percent of questions that hold; a question whose parent does not hold does not either."""

    name = "dpg"
    top = 100.0
    about = "long prompts, question by question"
    watch = "published rows are by mPLUG-large alone; another evaluator is another benchmark; an image is a grid of 4"
    licence = "Apache-2.0"
    origin = Origin("TencentQQGYLab/ELLA", "3c228f1")
    variants = ("grid", "single")  # one square of four images per prompt, or one image
    evaluators = ("chat", "vqa")

    def items(self, samples: int) -> list[Item]:
        rows = self.data.table(QUESTIONS)
        prompts: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            prompts.setdefault(row["item_id"], []).append(row)
        self.data.require(len(prompts), 1065, "prompts")
        self.first = rows[0]["item_id"]
        tiles = 4 if self.variant == "grid" else 1
        return [
            Item(name, own[0]["text"], f"{name}.png", "prompts", name, tiles, {"questions": own})
            for name, own in prompts.items()
        ]

    @property
    def template_hash(self) -> str:
        return hashed(SUFFIX)

    def score(self, item: Item, image: Image.Image, evaluator: Any) -> Verdict:
        questions, tiles = item.facts["questions"], _tiles(image, item.tiles)
        answers, raw = [], []
        for tile in tiles:
            answer, failure, replies = _answers(evaluator, tile, questions)
            raw += replies
            if answer is None:
                return self.verdict(item, evaluator, failure=failure, raw=raw)
            answers.append(answer)
        dependencies = {int(q["proposition_id"]): _parents(q["dependency"]) for q in questions}
        values = _values([graph(dependencies, one) for one in answers], questions)
        return self.verdict(item, evaluator, values=values, official=self._official(item, answers), raw=raw)

    def _official(self, item: Item, answers: Sequence[Mapping[int, bool]]) -> Values:
        """The original loses the first row of its file, and with it perhaps the first prompt, and fills its table of
        categories from the last tile, before parents are looked at."""
        questions = item.facts["questions"]
        if item.id == self.first:
            questions = questions[1:]
        dependencies = {int(q["proposition_id"]): _parents(q["dependency"]) for q in questions}
        known = dependencies.keys() | {0}
        if not questions or any(set(parents) - known for parents in dependencies.values()):
            return {}
        kept = [{number: one[number] for number in dependencies} for one in answers]
        scored = _values([graph(dependencies, one) for one in kept], questions)
        return {"dpg": scored["dpg"]} | {
            name: numbers for name, numbers in _values([kept[-1]], questions).items() if name != "dpg"
        }

    def figures(self) -> dict[str, dict[str, float]]:
        return {"DPG": {"dpg": 1.0}}


def graph(dependencies: Mapping[int, Sequence[int]], answers: Mapping[int, bool]) -> dict[int, bool]:
    """Which questions hold, in the order of the file: one whose parent does not hold does not, nor do its children."""
    holds = dict(answers)
    for number, parents in dependencies.items():
        if any(parent and not holds[parent] for parent in parents):
            holds[number] = False
    return holds


def _values(tiles: Sequence[Mapping[int, bool]], questions: Sequence[Mapping[str, str]]) -> Values:
    """The image's score, the mean over its tiles, and every answer by the first level of its category."""
    values: Values = {"dpg": [100 * sum(sum(tile.values()) / len(tile) for tile in tiles) / len(tiles)]}
    for tile in tiles:
        for question in questions:
            level = question["tuple"].split("(")[0].split(" - ")[0].strip()
            values.setdefault(level, []).append(100.0 * tile[int(question["proposition_id"])])
    return values


def _answers(evaluator: Any, tile: Image.Image, questions: Sequence[Mapping[str, str]]) -> Any:
    """Question -> whether yes, or None with the failure; and the replies."""
    answers, raw = {}, []
    for question in questions:
        text = question["question_natural_language"]
        if not hasattr(evaluator, "ask"):
            answers[int(question["proposition_id"])] = evaluator.holds(tile, text)
            continue
        told, failure, replies = asked(evaluator, [user(tile, text + SUFFIX)], 16, 5, yes_or_no)
        raw += replies
        if failure is not None:
            return None, failure, raw
        answers[int(question["proposition_id"])] = told
    return answers, None, raw


def yes_or_no(reply: str) -> bool:
    """Whether a reply begins with yes rather than no. Raises Unreadable."""
    word = reply.strip(" \n\t*\"'.").split(maxsplit=1)[:1]
    first = word[0].strip("*.,:;!\"'").casefold() if word else ""
    if first not in ("yes", "no"):
        raise Unreadable("neither yes nor no")
    return first == "yes"


def _parents(dependency: str) -> list[int]:
    return [int(number) for number in dependency.split(",") if number.strip()]


def _tiles(image: Image.Image, count: int) -> list[Image.Image]:
    """The images of a square, in reading order."""
    side = round(count**0.5)
    width, height = image.width // side, image.height // side
    corners = [(k % side * width, k // side * height) for k in range(count)]
    return [image.crop((x, y, x + width, y + height)) for x, y in corners]
