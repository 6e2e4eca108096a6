"""Draw the picture of the README from a run: ``python docs/make_pictures.py runs/demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.numpy import load_file

from srum.plots import reward_map_figure
from srum.records import Candidate, RewardMap
from srum.run_dir import open_image, read_records

OUT = Path(__file__).parent / "images" / "reward_map.png"


def draw(round_folder: Path, candidate_id: str | None = None, out: Path = OUT) -> str:
    """Write ``out``: a candidate beside its reward map. Returns which; by default the one whose map varies most."""
    rewards = {reward.candidate_id: reward for reward in read_records(round_folder / "rewards.jsonl", RewardMap)}
    candidates = {c.id: c for c in read_records(round_folder / "candidates.jsonl", Candidate)}
    maps = {name: load_file(round_folder / reward.values)["reward"] for name, reward in rewards.items()}
    chosen = candidate_id or max(maps, key=lambda name: float(maps[name].std()))
    image = open_image(round_folder / candidates[chosen].image)
    figure = reward_map_figure(image, maps[chosen], rewards[chosen].mapping, grid=True)
    figure.suptitle(candidates[chosen].prompt, fontsize=9, parse_math=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    return chosen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--round", type=int, default=0)
    parser.add_argument("--candidate", help="id of the candidate (default: the one whose map varies most)")
    arguments = parser.parse_args()
    chosen = draw(arguments.run / f"round-{arguments.round:03d}", arguments.candidate)
    print(f"{OUT}: candidate {chosen}")
