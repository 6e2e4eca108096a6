"""R3 on the shipped network: cycles of reasoning and refining, whole chains, and what becomes of bad replies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srum.chains import parse_reflection, template
from srum.config import ConfigError, load_config
from srum.models.base import Generated, MissingAbility
from srum.run import find_method
from srum.train.metrics import keep_rows
from srum.train.online import OnlineSource
from srum.train.reflect import Refined, State, Trajectories, Tree, chain_figures
from srum.train.rewards import Value
from srum.train.trainer import train
from tests.train.test_flow_grpo import PROMPTS, brightness, tiny

SMALL = (
    "method=r3",
    "candidates_per_prompt=2",
    "train.batch_size=4",
    "rollout.timesteps=5",
    "refine_timesteps=5",
    "text_limit=24",
    "train.precision=fp32",
    "train.steps=2",
)


@pytest.mark.parametrize("kind", [Tree, Trajectories])
def test_before_the_first_update_every_turn_has_the_ratio_one(kind: type, tmp_path: Path) -> None:
    """lr is next to nothing, so that the second step, which refines what the first drew, has the first's weights."""
    config = load_config(None, [*SMALL, "train.lr=1e-12", f"tree={kind is Tree}"])
    model = tiny()
    source = OnlineSource(lambda m: kind(m, brightness, PROMPTS, config, 3), PROMPTS, "")
    train(model, source, find_method("r3").objective(config), config.train, tmp_path, seed=5, progress=False)
    rows = keep_rows(tmp_path / "metrics.jsonl", 2)
    assert all(row["text_log_ratio"] < 1e-4 and row.get("image_log_ratio", 0) < 1e-5 for row in rows)
    assert "stops" in rows[1] and ("stops" in rows[0]) == (kind is Trajectories)


def refined(replies: list[str], before: list[float], after: list[float]) -> Refined:
    """Two groups of two, each about an image of a value; edits leave images of these values."""
    made = Generated(None, torch.zeros(1))  # type: ignore[arg-type]
    states = [State(PROMPTS[0], made, value, 0) for value in before]
    parsed = [parse_reflection(reply, template("compact")) for reply in replies]
    edits = [i for i, reply in enumerate(parsed) if reply.kind == "edit"]
    values = {i: Value(after[i]) for i in edits}
    return Refined(states, [], [], parsed, dict.fromkeys(edits, made), values)


def test_stops_edits_and_bad_replies_are_counted_apart() -> None:
    stop, edit, bad = "a\nNo further edit needed.", "a\nEdit: remove it", "a\nwhatever"
    figures = chain_figures(refined([stop, edit, bad, edit], [1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]))
    assert figures["formed"] == 0.75 and figures["stops"] == 0.25 and figures["right_stops"] == 1.0
    assert figures["right_stopped"] == pytest.approx(1 / 3)  # three were right, one was stopped; a bad reply is no stop
    assert figures["mended"] == 1.0 and figures["broken"] == 1.0


def test_a_cycle_is_resumed_whole() -> None:
    with pytest.raises(ConfigError, match="multiple of 3"):
        load_config(None, [*SMALL, "refinements=2", "train.checkpoint_every=4"])


def test_a_model_that_cannot_edit_is_refused() -> None:
    model, config = tiny(), load_config(None, list(SMALL))
    model.abilities = model.abilities - {"edit"}
    with pytest.raises(MissingAbility, match="edit"):
        Tree(model, brightness, PROMPTS, config, 3)  # type: ignore[arg-type]
