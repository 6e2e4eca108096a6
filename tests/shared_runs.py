"""What two processes do together for ``test_processes``: runs on the fake model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from srum import models
from srum.config import RunConfig, load_config
from srum.loop import perform, run_loop
from srum.models.base import Generated, Written
from srum.processes import LostProcess, Processes
from srum.records import Prompt
from srum.run import Run
from srum.run_dir import run_stage
from tests.fakes import FakeModel

BEFORE_TRAINING = ("rollout", "ground", "judge", "rasterize")
ITEMS = {f"p{number}": number for number in range(11)}


def small() -> RunConfig:
    """A round of 14 candidates in batches of 4, and 7 prompts to evaluate in batches of 3."""
    batches = [f"{stage}.batch_size=4" for stage in ("rollout", "ground", "judge", "train")]
    counts = ["rounds=1", "prompt_count=7", "candidates_per_prompt=2", "eval.count=7", "eval.batch_size=3"]
    return load_config(None, [*batches, *counts, "train.steps=2", "compare=[]", "reward.on_failure=keep"])


class Drawing(FakeModel):
    """Remembers for how many images it was asked, in all its copies."""

    drawn = 0

    def draw(self, contexts: Any, *rest: Any, **named: Any) -> list[Generated]:
        Drawing.drawn += len(contexts)
        return super().draw(contexts, *rest, **named)


class Stumbling(FakeModel):
    """Fails at the third question about a batch of images, in the last process."""

    asked = 0

    def write(self, *arguments: Any) -> list[Written]:
        Stumbling.asked += 1
        here = Processes.here()
        if here.rank == here.count - 1 and Stumbling.asked > 2:
            raise ValueError(f"process {here.rank} stumbles")
        return super().write(*arguments)


def whole_runs(folder: Path) -> None:
    """``folder / two``: a run of two processes; ``folder / from one``: what they make of one's interrupted round.

    ``folder / drawn-RANK.txt``, ``printed-RANK.txt``: for how many images each process was asked in the first, and what
    it printed. ``folder / left``: see ``one_leaves``.
    """
    rank = Processes.here().rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", Drawing.load)
        with (folder / f"printed-{rank}.txt").open("w") as printed, redirect_stdout(printed):
            run_loop(small(), folder / "two")
        (folder / f"drawn-{rank}.txt").write_text(str(Drawing.drawn))
        stages_before_training(folder / "from one")
    one_leaves(folder / "left")


def stages_before_training(folder: Path) -> None:
    """The round up to its reward maps."""
    for name in BEFORE_TRAINING:
        perform(Run(folder, small()), name, 0)


def interrupted(folder: Path) -> None:
    """The round up to its reward maps, by a model that fails in judging."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", Stumbling.load)
        stages_before_training(folder)


def one_leaves(folder: Path) -> None:
    """Process 1 ends without a word, as if killed, where process 0 waits for it; ``lost.txt``: what 0 says of that."""

    def work(batch: Mapping[str, int]) -> list[Prompt]:
        if Processes.here().rank == 1:
            os._exit(0)
        return [Prompt(id=name, text="done") for name in batch]

    try:
        run_stage(folder, "things", Prompt, ITEMS, 2, work)
    except LostProcess as error:
        (folder / "lost.txt").write_text(str(error))
    os._exit(0)  # nothing is left to be said to the other
