"""T2I-CompBench's prompts scored by a vision-language model, as the SRUM paper does (its Table 1)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from PIL import Image

from srum.evaluation.benchmark import Item, JudgedBenchmark, Unreadable, Values, equally, hashed
from srum.evaluation.data import Origin, Template
from srum.exchange.chat import Message, user

PROMPTS, SCORER = "val_comp.json", "CompBench_eval/qwen_eval.py"
COLUMNS = ("3d_spatial", "color", "non_spatial", "numeracy", "shape", "spatial", "texture")
COMPLEX = ("complex", "complex_action", "complex_spatial")  # the list, and two parts of it, which so count twice


class CompBench(JudgedBenchmark):
    """How well an image fits its prompt, 0 to 100; overall is the mean of eight categories."""

    name = "compbench"
    top = 100.0
    about = "attributes, positions, counts and actions by a judge's score of 0 to 100"
    watch = (
        "smaller judges are milder: BAGEL has 82.2 by 72B, 86.7 by 32B; SRUM trains on the other part of these lists"
    )
    licence = "Apache-2.0 (SRUM), MIT (T2I-CompBench)"
    origin = Origin("WayneJin0918/SRUM", "a53ba18")
    printed: ClassVar[Mapping[str, str]] = {"complex": "Complex"}
    variants = ("no_think", "think")  # what the folders are called
    max_tokens = 512
    official_tries = 1

    def items(self, samples: int) -> list[Item]:
        rows = self.data.json(PROMPTS)
        self.data.require(len(rows), 2670, "prompts")
        slots = {"prompt_name": "prompt"}
        self.template: Template = self.data.template(SCORER, "{prompt_name}", slots)
        return [
            Item(
                f"{row['Question_id']}" + (f"-{k}" if k else ""),
                row["Question"],
                f"{_folder(row['Category'], self.variant)}/{row['Question_id']}{f'-{k}' if k else ''}.png",
                row["Category"].replace("-", "_"),
                str(row["Question_id"]),
                facts={"folder": row["Category"]},
            )
            for row in rows
            for k in range(samples)
        ]

    def side_files(self, items: Sequence[Item]) -> dict[str, str]:
        files: dict[str, str] = {}
        for item in items:
            folder, _, name = item.path.partition("/")
            line = json.dumps({"image_file": name, "original_prompt": item.prompt}, ensure_ascii=False)
            path = f"{folder}/output.jsonl"
            files[path] = files.get(path, "") + line + "\n"
        return files

    @property
    def template_hash(self) -> str:
        return hashed(self.template.text)

    def messages(self, item: Item, image: Image.Image) -> list[Message]:
        return [user(image, self.template.fill(prompt=item.prompt))]

    def read(self, item: Item, reply: str) -> Values:
        """The one score of 0 to 100, also with a fraction, which the original cuts off."""
        scores = {float(number) for number in re.findall(r'"score"\s*:\s*"?(-?\d+(?:\.\d+)?)"?(?![\d.])', reply)}
        if len(scores) != 1 or not 0 <= max(scores) <= 100:
            raise Unreadable("no score of 0 to 100")
        return {item.category: [scores.pop()]}

    def read_officially(self, item: Item, reply: str) -> Values:
        match = re.search(r'"score":\s*"?(\d+)"?', reply)
        return {item.category: [float(match[1]) if match else -1.0]}

    def official_failure(self, item: Item) -> Values:
        return {item.category: [-1.0]}

    def figures(self) -> dict[str, dict[str, float]]:
        return {
            "Complex": equally(COMPLEX),
            "overall": equally([*COLUMNS, "Complex"]),
            "mean of ten (RecA)": dict.fromkeys(COLUMNS, 0.1) | {"Complex": 0.3},  # its two parts once more
        }

    @property
    def published(self) -> str:
        return "compbench_srum"


def _folder(category: str, mode: str) -> str:
    return f"{category}_50_{mode}"
