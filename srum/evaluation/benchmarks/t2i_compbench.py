"""T2I-CompBench, the official layout: ten images per prompt for scorers that run elsewhere."""

from __future__ import annotations

from srum.evaluation.benchmark import Benchmark, Item
from srum.evaluation.data import Origin

CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")


class T2ICompBench(Benchmark):
    """Images alone: BLIP-VQA, UniDet and CLIP of the original score them."""

    name = "t2i_compbench"
    about = "the official layout of T2I-CompBench, for its own scorers"
    watch = (
        "the complex scorer takes ten images per prompt, in the order of the list; 150 px thresholds depend on the size"
    )
    licence = "MIT"
    origin = Origin("Karine-Huang/T2I-CompBench", "1b70949")
    evaluators = ("none",)
    samples = 10

    def items(self, samples: int) -> list[Item]:
        items = []
        for category in CATEGORIES:
            prompts = [
                line for line in self.data.text(f"examples/dataset/{category}_val.txt").split("\n") if line.strip()
            ]
            self.data.require(len(prompts), 300, f"prompts of {category}")
            for line, prompt in enumerate(map(str.strip, prompts)):
                for k in range(samples):
                    number = samples * line + k
                    path = f"{category}/samples/{prompt}_{number:06d}.png"
                    items.append(Item(f"{category}-{number:06d}", prompt, path, category, f"{category}-{line:03d}"))
        return items

    def figures(self) -> dict[str, dict[str, float]]:
        return {}
