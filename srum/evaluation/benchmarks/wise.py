"""WISE: prompts that need knowledge of the world, by a judge who is told it. Two versions under one name."""

from __future__ import annotations

import re

from PIL import Image

from srum.evaluation.benchmark import BAGEL, SRUM, Item, JudgedBenchmark, Unreadable, Values, equally, hashed
from srum.evaluation.data import Origin, Template
from srum.exchange.chat import Message, system, user

FILES = ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json")
COLUMNS = ("culture", "time", "space", "biology", "physics", "chemistry")
LAST = {"legacy": (400, 567, 700, 800, 900, 1000), "verified": (400, 520, 640, 760, 880, 1000)}  # id of each column
WEIGHTS = {"legacy": (0.4, 0.167, 0.133, 0.1, 0.1, 0.1), "verified": (0.4, 0.12, 0.12, 0.12, 0.12, 0.12)}
SCORERS = {"legacy": "WISE_legacy/gpt_eval.py", "verified": "vllm_eval.py"}
PARTS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
FOLDERS = {"legacy": "WISE_legacy/data", "verified": "data"}


class Wise(JudgedBenchmark):
    """Of 1: consistency with what the prompt means, and for the legacy version realism and beauty."""

    name = "wise"
    about = "what a prompt means to those who know: culture, time, space, biology, physics, chemistry"
    watch = "two versions share names and ids; papers on BAGEL print the plain mean, others the weighted; both are here"
    licence = "none is stated: read from a checkout"
    origin = Origin("PKU-YuanGroup/WISE", "eb51174")
    variants = ("legacy", "verified")
    presets = {"bagel": SRUM, "srum": SRUM, "whole": BAGEL}  # noqa: RUF012 (facts); BAGEL's script has [0.4, 1] here
    max_tokens = 2000
    digits = 3

    def items(self, samples: int) -> list[Item]:
        rows = [row for file in FILES for row in self.data.json(f"{FOLDERS[self.variant]}/{file}")]
        self.data.require(len(rows), 1000, "prompts")
        self.question: Template = self.data.template(
            SCORERS[self.variant],
            "EXPLANATION",
            {"prompt_data['Prompt']": "prompt", "prompt_data['Explanation']": "explanation"},
        )
        self.system = self.data.template(SCORERS[self.variant], "audit expert", {}).text
        return [
            Item(
                f"{row['prompt_id']}" + (f"-{k}" if k else ""),
                row["Prompt"],
                f"{row['prompt_id']}{f'_{k}' if k else ''}.png",
                self.column(row["prompt_id"]),
                str(row["prompt_id"]),
                facts=row,
            )
            for row in rows
            for k in range(samples)
        ]

    def column(self, number: int) -> str:
        """The category of an id."""
        return next(name for name, last in zip(COLUMNS, LAST[self.variant], strict=True) if number <= last)

    @property
    def template_hash(self) -> str:
        return hashed(self.system, self.question.text)

    def messages(self, item: Item, image: Image.Image) -> list[Message]:
        text = self.question.fill(prompt=item.prompt, explanation=item.facts["Explanation"])
        return [system(self.system), user(text, image)]

    def read(self, item: Item, reply: str) -> Values:
        """As the original, but a colon may stand inside bold letters, and a number has nothing after it but ``/2``."""
        scores = scores_of(reply) if self.variant == "legacy" else verified_score(reply)
        return {item.category: [self._value(scores)]}

    def read_officially(self, item: Item, reply: str) -> Values:
        return {item.category: [self._value(official_scores(self.variant, reply))]}

    def _value(self, scores: dict[str, float]) -> float:
        if self.variant == "verified":
            if "score" not in scores:
                raise Unreadable("no score of 0 or 1")
            return scores["score"]
        if scores.keys() != PARTS.keys():
            raise Unreadable(f"scores for {', '.join(scores) or 'nothing'}")
        return sum(weight * scores[name] for name, weight in PARTS.items()) / 2

    def figures(self) -> dict[str, dict[str, float]]:
        weights = dict(zip(COLUMNS, WEIGHTS[self.variant], strict=True))
        return {"weighted mean": weights, "plain mean": equally(COLUMNS)}

    @property
    def published(self) -> str:
        return f"wise_{self.variant}"


def official_scores(variant: str, reply: str) -> dict[str, float]:
    """The scores as the original finds them, in any number."""
    if variant == "legacy":
        pattern = r"\*{0,2}(Consistency|Realism|Aesthetic Quality)\*{0,2}\s*[:\uff1a]?\s*(\d)"
        pairs = re.findall(pattern, reply, re.IGNORECASE)
        return {name.lower().replace(" ", "_"): float(digit) for name, digit in pairs}
    match = re.search(r"\*{0,2}Score\*{0,2}\s*[:\uff1a]?\s*([01])\b", reply, re.IGNORECASE)
    match = match or re.fullmatch(r"\s*([01])\s*", reply)
    return {"score": float(match[1])} if match else {}


def scores_of(reply: str) -> dict[str, float]:
    """Consistency, realism, aesthetic quality, each once, of 0 to 2. Raises Unreadable for one that is no integer."""
    pattern = r"(Consistency|Realism|Aesthetic Quality)(?:\s*\(0-2\))?[\s*:\uff1a]*(\d[\d.]*)(?:\s*/\s*(\d+))?"
    scores: dict[str, float] = {}
    for name, number, scale in re.findall(pattern, reply, re.IGNORECASE):
        if number.rstrip(".") not in ("0", "1", "2") or scale not in ("", "2"):
            raise Unreadable(f"{name}: {number}")
        key = name.lower().replace(" ", "_")
        if scores.setdefault(key, float(number.rstrip("."))) != float(number.rstrip(".")):
            raise Unreadable(f"two scores for {name}")
    return scores


def verified_score(reply: str) -> dict[str, float]:
    """The one score of 0 or 1."""
    pattern = r"\bScore[\s*:\uff1a]*(\d[\d.]*)"
    numbers = {number.rstrip(".") for number in re.findall(pattern, reply, re.IGNORECASE)} or {reply.strip()}
    return {"score": float(numbers.pop())} if len(numbers) == 1 and numbers <= {"0", "1"} else {}
