"""What two processes do together for ``test_policy_ranks``: R3 with LoRA on a small BAGEL."""

from __future__ import annotations

from pathlib import Path

from srum.config import parse_config
from srum.models.bagel import Bagel
from srum.records import Prompt
from srum.run import find_method
from srum.train.online import OnlineSource
from srum.train.reflect import Tree
from srum.train.trainer import train
from tests.train.ranks import CHECKPOINT, PROMPTS, interrupted
from tests.train.test_flow_grpo import brightness

ASKED = [Prompt(id=f"p{number}", text=text) for number, text in enumerate(PROMPTS)]
CONFIG = {
    "method": "r3",
    "candidates_per_prompt": 2,
    "text_limit": 6,
    "reply_limit": 6,
    "refine_timesteps": 4,
    "rollout": {"size": [32, 32], "timesteps": 4, "plan": True},
    "train": {
        "steps": 4,
        "batch_size": 4,
        "lr": 1e-4,
        "eps": 1e-6,
        "precision": "fp32",
        "checkpoint_every": 2,
        "lora": {"rank": 3},
    },
}


def run(folder: Path) -> None:
    """Two cycles of R3."""
    config = parse_config(CONFIG)
    source = OnlineSource(lambda model: Tree(model, brightness, ASKED, config, 3), ASKED, "")
    objective = find_method("r3").objective(config)
    train(Bagel.load(CHECKPOINT, empty=True), source, objective, config.train, folder, seed=5, progress=False)


def work(folder: Path) -> None:
    """``whole``, and ``resumed``, which is killed before the last step."""
    run(folder / "whole")
    with interrupted(at=3):
        run(folder / "resumed")
    run(folder / "resumed")
