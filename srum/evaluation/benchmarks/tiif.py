"""TIIF-Bench: how well a model follows instructions, short and long, by yes/no questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from srum.evaluation.benchmark import Item, JudgedBenchmark, Unreadable, Values, equally, hashed
from srum.evaluation.data import DataError, Origin
from srum.exchange.chat import Message, system, user

SCORER = "eval/eval_with_vlm.py"
SETS = {
    "testmini": ("data/testmini_prompts", "data/testmini_eval_prompts", 277),
    "full": ("data/test_prompts", "data/test_eval_prompts", 2538),
}  # prompts, questions, how many
SLOT = "##YNQuestions##"
MODEL = "srum"  # the name of the model's folder in the layout
REASONING = ("numeracy", "comparison", "differentiation", "negation")
GROUPS = {
    "attribute": ("shape+color", "color+texture", "texture+color", "shape+texture"),
    "relation": ("2d_spatial_relation", "3d_spatial_relation", "action+2d", "action+3d"),
    "reasoning": REASONING,
    "attribute+relation": (
        *("action+color", "action+texture"),
        *(f"{attribute}+{space}" for attribute in ("color", "shape", "texture") for space in ("2d", "3d")),
    ),
    "attribute+reasoning": tuple(f"{kind}+{attribute}" for kind in REASONING for attribute in ("color", "texture")),
    "relation+reasoning": tuple(f"{kind}+{space}" for kind in REASONING for space in ("2d", "3d")),
} | {name: (name,) for name in ("text", "style", "real_world")}  # the 39 types


class Tiif(JudgedBenchmark):
    """Percent of questions answered as they should be; overall is the mean of nine groups, for each length."""

    name = "tiif"
    top = 100.0
    about = "39 types of instructions, by yes/no questions; testmini, or all prompts"
    watch = "the original asks at temperature 1 in one of three wordings; ours asks at 0 in the first"
    licence = "none is stated: read from a checkout"
    origin = Origin("A113N-W3I/TIIF-Bench", "3aae750")
    variants = ("short", "long", "full_short", "full_long")
    max_tokens = 1024
    official_tries = 5

    def items(self, samples: int) -> list[Item]:
        self.template = self.data.assigned(SCORER, "raw_prompt")
        prompts, questions, count = SETS[self._set]
        items: list[Item] = []
        questions_of = self._by_type(questions)
        for name, lines in self._by_type(prompts).items():
            asked_for = questions_of.get(name, [])
            if len(asked_for) != len(lines):
                raise DataError(f"{name}: {len(lines)} prompts, but questions about {len(asked_for)}")
            for number, (line, facts) in enumerate(zip(lines, asked_for, strict=True)):
                items += [self._item(name, number, line, facts, k) for k in range(samples)]
        self.data.require(len(items), count * samples, "prompts")
        return items

    @property
    def _set(self) -> str:
        return "full" if self.variant.startswith("full") else "testmini"

    def _by_type(self, folder: str) -> dict[str, list[dict[str, str]]]:
        """The lines of a folder's files, by their type."""
        place = (self.data.checkout or Path()) / folder
        files = sorted(place.glob("*.jsonl"))
        if not files:
            raise DataError(f"{place} has no .jsonl files: they are of {self.origin}")
        lines = [self.data.lines(f"{folder}/{file.name}") for file in files]
        return {own[0]["type"]: own for own in lines}

    def _item(self, name: str, number: int, line: dict[str, str], facts: dict[str, str], k: int) -> Item:
        length = f"{self.variant.removeprefix('full_')}_description"
        path = f"{name}/{MODEL}/{length}/{number}{f'_{k}' if k else ''}.png"
        key = re.sub(r"[^\w.-]+", "_", name)
        return Item(f"{key}-{number}-{k}", line[length], path, name, f"{key}-{number}", facts=facts)

    @property
    def template_hash(self) -> str:
        return hashed(self.template)

    def messages(self, item: Item, image: Image.Image) -> list[Message]:
        questions = "\n".join(question.strip() for question in item.facts["yn_question_list"])
        return [system("You are a professional image critic."), user(self.template.replace(SLOT, questions), image)]

    def read(self, item: Item, reply: str) -> Values:
        return self._values(item, answers_of(reply, len(item.facts["yn_question_list"])))

    def read_officially(self, item: Item, reply: str) -> Values:
        return self._values(item, official_answers(reply, len(item.facts["yn_question_list"])))

    def _values(self, item: Item, answers: Sequence[str]) -> Values:
        right = [
            answer == wanted.strip().lower()
            for answer, wanted in zip(answers, item.facts["yn_answer_list"], strict=True)
        ]
        return {item.category: [100.0 * one for one in right]}

    def figures(self) -> dict[str, dict[str, float]]:
        groups = {f"{name} (group)": equally(types) for name, types in GROUPS.items()}
        return groups | {"overall": equally(list(groups))}

    @property
    def published(self) -> str:
        return f"tiif_{self._set}"


def official_answers(reply: str, count: int) -> list[str]:
    """The words of the lines that begin with yes or no. Raises Unreadable for another number of them."""
    answers = [
        m[1].lower() for line in reply.split("\n") if (m := re.match(r"(yes|no)\b", line.strip(), re.IGNORECASE))
    ]
    if len(answers) != count:
        raise Unreadable(f"{len(answers)} answers to {count} questions")
    return answers


def answers_of(reply: str, count: int) -> list[str]:
    """The same, where lines may be numbered or bold."""
    plain = [re.sub(r"^[\s*#>-]*(?:\(?\d+[.):])?[\s*]*", "", line) for line in reply.split("\n")]
    return official_answers("\n".join(plain), count)
