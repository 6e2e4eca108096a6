"""R3 on the shipped network: cycles of reasoning and refining, whole chains, and what becomes of bad replies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL.Image import Image

from srum.config import FREE, ConfigError, load_config
from srum.drawing.chains import Failure, parse_reflection, template
from srum.errors import TrainingError
from srum.loop import require_abilities
from srum.models.base import Generated, MissingAbility, Written
from srum.records import Prompt
from srum.run import Run, find_method
from srum.train.metrics import keep_rows
from srum.train.online import OnlineSource
from srum.train.reason import source_of
from srum.train.reflect import Refined, State, Trajectories, Tree, chain_figures
from srum.train.rewards import Value
from srum.train.trainer import train
from tests.fakes import FakeModel
from tests.train.test_flow_grpo import PROMPTS, brightness, tiny

SMALL = (
    "method=r3",
    "candidates_per_prompt=2",
    "train.batch_size=4",
    "rollout.timesteps=5",
    "rollout.plan=true",
    "refine_timesteps=5",
    "text_limit=24",
    "train.precision=fp32",
    "train.steps=2",
)


@pytest.mark.parametrize(
    ("kind", "images_by"), [(Tree, "steps"), (Trajectories, "steps"), (Tree, "forward"), (Trajectories, "forward")]
)
def test_before_the_first_update_every_turn_has_the_ratio_one(kind: type, images_by: str, tmp_path: Path) -> None:
    """lr is next to nothing, so that the second step, which refines what the first drew, has the first's weights. Texts
    have it, too, before images that are noised: nothing before them is dropped."""
    dropping = ("train.text_dropout=1", "train.image_dropout=1")
    config = load_config(None, [*SMALL, *dropping, "train.lr=1e-12", f"tree={kind is Tree}", f"images_by={images_by}"])
    model = tiny()
    source = OnlineSource(lambda m: kind(m, brightness, PROMPTS, config, 3), PROMPTS, "")
    train(model, source, find_method("r3").objective(config), config.train, tmp_path, seed=5, progress=False)
    rows = keep_rows(tmp_path / "metrics.jsonl", 2)
    assert all(row["text_log_ratio"] < 1e-4 and row.get("image_log_ratio", 0) < 1e-5 for row in rows)
    assert all(row["parts"].get("trust", 0) < 1e-9 for row in rows)  # old and present weights are the same
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


@pytest.mark.parametrize("name", ["compact", "released"])
def test_a_reply_that_failed_is_typed_counted_and_no_reward(name: str) -> None:
    """Of every kind, about a right image and about a wrong one: no image, the text's reward exactly 0."""
    replies = {
        "empty_reply": " ",
        "no_thought": "Edit: remove it" if name == "compact" else "remove it",
        "bad_markup": "a\nwhatever" if name == "compact" else "<think>a</think><think>b</think> remove it",
        "no_instruction": "a\nEdit:" if name == "compact" else "<think>a</think> !",
        "contradiction": ("a\n" if name == "compact" else "<think>a</think> ")
        + "No further edit needed. Edit: remove it",
    }
    cut = {
        "truncated_thought": "a" if name == "compact" else "<think>a",
        "truncated_instruction": "a\nEdit: rem" if name == "compact" else "<think>a</think> rem",
    }
    form, kinds = template(name), [*replies, *cut]
    parsed = [parse_reflection(text, form) for text in replies.values()]
    parsed += [parse_reflection(text, form, ended=False) for text in cut.values()]
    assert [reply.failure for reply in parsed] == kinds == sorted(get_args(Failure), key=kinds.index)
    made = Generated(None, torch.zeros(1))  # type: ignore[arg-type]
    for value in (0.2, 1.0):
        states = [State(PROMPTS[0], made, value, 0) for _ in parsed]
        written = [Written(reply.raw, [1], torch.zeros(2), True) for reply in parsed]
        failed = Refined(states, [[]] * len(parsed), written, parsed, {}, {})
        told = chain_figures(failed)
        assert told["formed"] == 0 and told["stops"] == 0 and "right_stops" not in told
        assert all(told[f"reply_{kind}"] == pytest.approx(1 / len(kinds)) for kind in kinds)
        config = load_config(None, [*SMALL, "candidates_per_prompt=7", "train.batch_size=7"])
        player = Tree(tiny(), brightness, PROMPTS, config, 3)  # type: ignore[arg-type]
        played = player.rewarded(1, failed)
        assert played.facts["zero_spread_groups"] == 1  # all are worth 0
        assert [float(credit.abs().max()) for example in played.examples for credit in example.credit] == [0.0] * 7


def test_judgements_that_all_fail_teach_nothing(tmp_path: Path) -> None:
    """No image has a value: the step that would refine draws anew, and no weight moves."""

    def silent(images: Sequence[Image], prompts: Sequence[Prompt]) -> list[Value]:
        return [Value(None, failure="no_reply") for _ in images]

    config = load_config(None, [*SMALL, "kl=0", "rollout.plan=false"])
    source = OnlineSource(lambda m: Tree(m, silent, PROMPTS, config, 3), PROMPTS, "")  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="changed no weight"):
        train(tiny(), source, find_method("r3").objective(config), config.train, tmp_path, seed=5, progress=False)
    rows = keep_rows(tmp_path / "metrics.jsonl", 2)
    assert all(row["failed_no_reply"] == 1 and row["zero_spread_groups"] == 1 for row in rows)


def test_a_step_whose_replies_ask_for_no_image_draws_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are not trained, so that nothing of its own could be learned."""
    model, settings = FakeModel(), ["images_by=forward", "rollout.plan=false", "train.trainable=generation"]
    config = load_config(None, [*SMALL, *settings])
    player = Tree(model, brightness, PROMPTS, config, 3)  # type: ignore[arg-type]
    player.play(0)
    stop = parse_reflection("a\nNo further edit needed.", template("compact"))
    monkeypatch.setattr("srum.train.reflect.parse_reflection", lambda *_: stop)
    played = player.play(1)
    assert [example.segments[-1].kind for example in played.examples] == ["noisy"] * 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("refinements=2 train.checkpoint_every=4", "multiple of 3"),
        ("random_steps=3 refine_range=[0,1]", "random_range: .* has 2 of the steps"),
        ("random_range=[0.5,0.5]", "random_range: .* has 0 of the steps"),
        ("random_steps=2 refine_range=[0.5,0.75]", "refine_range: .* has 1 of the steps"),
    ],
)
def test_contradictions(wrong: str, message: str) -> None:
    """Four steps to an image, in the first half of which two can be random."""
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*SMALL, *wrong.split()])
    load_config(None, [*SMALL, "random_steps=2"])
    load_config(None, [*SMALL, "random_steps=3", "images_by=forward"])  # there are none


def test_without_random_steps_a_model_need_not_explore(tmp_path: Path) -> None:
    model, drawn = tiny(), load_config(None, [*SMALL, "images_by=forward"])
    model.abilities = model.abilities - {"explore"}  # type: ignore[operator]
    require_abilities(drawn, model)
    source_of(Run(tmp_path, drawn), 0, drawn, Tree).make(model).play(0)  # type: ignore[arg-type]
    with pytest.raises(MissingAbility, match="explore"):
        require_abilities(load_config(None, list(SMALL)), model)


def test_what_may_change_on_resuming_leaves_the_digest_alone(tmp_path: Path) -> None:
    def digest(*overrides: str) -> str:
        config = load_config(None, [*SMALL, *overrides])
        return source_of(Run(tmp_path, config), 0, config, Tree).digest()  # type: ignore[arg-type]

    changes = {"device": "cuda:1", "processes": 2, "compile": "true", "train.keep_checkpoints": "true", "rounds": 9}
    assert changes.keys() == {*FREE, "rounds"}
    assert digest() == digest(*(f"{name}={value}" for name, value in changes.items())) != digest("kl=0.5")


@pytest.mark.parametrize("missing", ["edit", "explore"])
def test_a_model_that_cannot_edit_or_tell_its_steps_is_refused(missing: str, tmp_path: Path) -> None:
    model, config = tiny(), load_config(None, list(SMALL))
    model.abilities = model.abilities - {missing}  # type: ignore[operator]
    source = source_of(Run(tmp_path, config), 0, config, Tree)  # type: ignore[arg-type]
    with pytest.raises(MissingAbility, match=missing):
        source.make(model)
