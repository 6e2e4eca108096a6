"""Chains of strokes: exact ones are right, layouts have what they say, and a step of each is learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL.Image import fromarray

from srum.config import ConfigError, config_of, load_config
from srum.drawing.strokes import Drawing, Stage
from srum.evaluation.accuracy import drawn as drawn_once
from srum.models.base import Generated, Written
from srum.run import Run, find_method
from srum.run_dir import RunError
from srum.shapes.checker import check, parse
from srum.shapes.edits import Edit
from srum.shapes.hard_negatives import perturb
from srum.shapes.matching import completable
from srum.shapes.prompts import from_metadata, sample_prompt, to_metadata
from srum.shapes.render import render
from srum.shapes.scenes import Scene, Spec, Thing, Want, sample_scene
from srum.shapes.strokes import Plan, parse_inspection, parse_plan
from srum.shapes.wording import placed
from srum.stages.rollout import choose_prompts
from srum.train.examples import Example
from srum.train.feed import Mix
from srum.train.inspected import inspected
from srum.train.interleaved import SHORT, Turn, exact_chain, long_segments, read_chains, write_chains
from srum.train.metrics import keep_rows
from srum.train.tasks.base import recognised
from srum.train.trainer import train
from tests.fakes import FakeModel
from tests.train.test_flow_grpo import tiny

RED, STAR = Thing("circle", "red", "small", 0, 0), Thing("star", "blue", "small", 2, 2)
SEEDS = st.integers(0, 2**31)
SMALL = ("method=process", "samples=4", "train.batch_size=4", "train.steps=1", "train.precision=fp32", "device=cpu")


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_a_chain_ends_in_an_image_that_is_right_and_says_so(seed: int) -> None:
    """The prompt's spec is drawn first, so the same generator tells what was asked for."""
    prompt, turns = exact_chain(np.random.default_rng(seed))
    spec, text = sample_prompt(np.random.default_rng(seed))
    images = [turn.image for turn in turns if turn.image is not None]
    assert text == prompt and check(np.asarray(images[-1]), to_metadata(spec, text)).correct
    assert parse_inspection(turns[-1].text or "").verdict == "done"
    learned = [turn for turn in turns if turn.image is not None and turn.loss]
    plans = [parse_plan(t.text) for t in turns if t.text is not None and not _is_inspection(t.text)]
    assert len(learned) == len(plans)  # of each stroke the one that shows its plan
    for plan, turn in zip(plans, learned, strict=True):
        assert completable(plan.things, spec)
        shown = sorted(map(placed, recognised(np.asarray(turn.image)).things))
        assert shown == sorted(map(placed, plan.things))


def _is_inspection(text: str) -> bool:
    return text.count(" | ") == 2


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_every_subset_of_a_right_scene_can_be_completed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec, _ = sample_prompt(rng)
    things = sample_scene(spec, rng).things
    for bits in range(2 ** len(things)):
        assert completable([thing for i, thing in enumerate(things) if bits >> i & 1], spec)
    other = perturb(sample_scene(spec, rng), spec, rng).things
    assert len(other) <= spec.total or not completable(other, spec)  # one too many cannot be


def test_a_rejected_draft_is_seen_and_not_learned() -> None:
    prompt, turns = exact_chain(np.random.default_rng(3), mistaken=1.0)
    segments = long_segments(tiny(), prompt, turns)
    kinds = "".join({"text": "t", "noisy": "N", "clean": "c", "seen": "s"}[s.kind] for s in segments)
    assert kinds.startswith("ttcstNcst")  # prompt, plan, rejected, inspection, corrected, shown, inspection
    assert [s.loss for s in segments[:6]] == [False, True, False, False, True, True]


@pytest.mark.parametrize("layout", ["short", "long"])
def test_a_step_of_both_layouts(layout: str, tmp_path: Path) -> None:
    config = load_config(None, [*SMALL, f"layout={layout}"])
    method, model = find_method("process"), tiny()
    mix = method.examples(Run(tmp_path, config), 0, config)
    train(model, mix, method.objective(config), config.train, tmp_path, seed=1, progress=False)
    (row,) = keep_rows(tmp_path / "metrics.jsonl", 1)
    assert row["parts"]["error"] > 0 and row["parts"]["cross_entropy"] > 0


def test_chains_are_written_and_read_again(tmp_path: Path) -> None:
    prompt, turns = exact_chain(np.random.default_rng(1))
    turns.append(Turn("a\u2028b"))
    write_chains([("one", prompt, turns)], tmp_path / "chains.jsonl")
    ((name, asked, read),) = read_chains(tmp_path / "chains.jsonl")
    assert (name, asked, [t.text for t in read]) == ("one", prompt, [t.text for t in turns])
    pairs = [(a.image, b.image) for a, b in zip(read, turns, strict=True) if a.image is not None]
    assert pairs and all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
    assert parse(np.asarray(pairs[-1][0]))
    (tmp_path / "bad.jsonl").write_text('{"id": "x", "prompt": "p", "turns": [{"text": "a", "image": "b"}]}\n')
    with pytest.raises(RunError, match=r"bad\.jsonl:1"):
        read_chains(tmp_path / "bad.jsonl")
    line = (tmp_path / "chains.jsonl").read_bytes()
    for second, message in ((line, "the id 'one' is taken"), (line.replace(b'"one"', b'"\xff"'), "no chain")):
        (tmp_path / "bad.jsonl").write_bytes(line + b"\n" + second)
        with pytest.raises(RunError, match=rf"bad\.jsonl:3: {message}"):
            read_chains(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("chains=x.jsonl", "layout=long"),
        ("train.batch_size=6", "no multiple of 4"),
        ("train.trainable=generation", "texts"),
    ],
)
def test_contradictions(wrong: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*SMALL, wrong])


def test_the_defaults_make_a_batch_and_learn_texts() -> None:
    config = load_config(None, ["method=process"])
    kinds = {kind: [Example(id=kind, segments=[])] for kind in SHORT}
    mix = Mix.of_shares(kinds, dict(zip(SHORT, config.shares, strict=True)), config.train.batch_size)  # type: ignore[attr-defined]
    assert [part.per_step for part in mix.parts] == [16, 16, 32] and config.train.trainable == "all"
    assert config_of("process", load_config(None, ["train.trainable=all", "train.batch_size=8"])).train.batch_size == 8


def test_a_prompt_without_a_readable_plan_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two pens cannot be read: the image of its prompt is that of the bare evaluation."""
    model, config = FakeModel(), load_config(None, ["method=process", "max_strokes=1", "eval.plan=true"])
    prompts = {prompt.id: prompt for prompt in choose_prompts("development", 2, 0)}
    _, silent = prompts.values()

    def write(contexts, decoding, seeds):  # type: ignore[no-untyped-def]
        plans = [
            "no plan" if context[0].text == silent.text else str(Plan((Edit(None, RED),), (RED,)))
            for context in contexts
        ]
        return [Written(plan, [], torch.zeros(1), ended=True) for plan in plans]

    monkeypatch.setattr(model, "write", write)
    read, unread = find_method("process").draw(model, config, 3)(prompts)  # type: ignore[misc, arg-type]
    (bare,) = drawn_once(model, {silent.id: silent}, config.eval.model_copy(update={"plan": False}), 3)  # type: ignore[arg-type]
    assert read.shots[0].said and [shot.said for shot in unread.shots] == [None]
    assert np.array_equal(np.asarray(unread.image), np.asarray(bare.image))


def drawn(plan: str, *things: Thing) -> Drawing:
    """A drawing of one stroke, with what it shows."""
    made = Generated(fromarray(render(Scene(things))), torch.zeros(1))
    return Drawing("a", stages=[Stage("draft", 1, made=made, asked=plan)])


@pytest.mark.parametrize(
    ("plan", "shown", "said"),
    [
        ("add a small red circle r1 c1 | small red circle r1 c1", (RED,), "fits | fits | continue"),
        (
            "add a small red circle r1 c1 | small red circle r1 c1",
            (RED, STAR),
            "fits | extra small blue star r3 c3 | remove the small blue star r3 c3",
        ),
        (
            "add a small green circle r1 c1 | small green circle r1 c1",
            (replace(RED, colour="green"),),
            "conflict, small green circle r1 c1 should be red | fits | make the small green circle r1 c1 red",
        ),
    ],
)
def test_own_strokes_are_inspected_as_the_truth_has_it(plan: str, shown: tuple[Thing, ...], said: str) -> None:
    """Of a red circle and a blue square: right but not done, one thing too many, and the wrong colour as planned."""
    spec = Spec((Want("circle", "red"), Want("square", "blue")), "color_attr")
    ((context, reply),) = inspected(drawn(plan, *shown), spec)
    assert str(reply) == said and [s.text for s in context[:2]] == ["a", plan] and context[2].kind == "seen"
    assert list(inspected(drawn("no plan at all", RED), spec)) == []


def test_own_drawings_are_learned_beside_exact_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four drawings, one of which shows something else: it and one of the others, texts drawn at temperature 1."""

    def draw(model, prompts, names, settings, seed):  # type: ignore[no-untyped-def]
        assert settings.decoding.temperature == 1 and settings.max_refinements == 0 and len(prompts) == 4
        specs = [from_metadata(prompt.metadata) for prompt in choose_prompts("train", 4, seed_of_prompts)]
        scenes = [sample_scene(spec, np.random.default_rng(n)).things for n, spec in enumerate(specs)]
        return [drawn(str(Plan((Edit(None, s[0]),), s)), *(s[1:] if n == 2 else s)) for n, s in enumerate(scenes)]

    monkeypatch.setattr("srum.train.inspected.draw_in_strokes", draw)
    config = load_config(None, [*SMALL, "own=4"])
    run = Run(tmp_path, config)
    seed_of_prompts = run.seed(0, "process", "prompts") % 2**31
    mix = find_method("process").examples(run, 0, config)
    assert isinstance(mix, Mix)
    kinds = dict(zip(SHORT, mix.parts, strict=True))
    own = [example for example in kinds["inspect"].examples if example.id.startswith("own")]
    said = [[s.text for s in example.segments if s.loss] for example in own]
    assert len(own) == 2 and "missing" in said[0][0] and said[1] == ["fits | fits | done"]  # type: ignore[operator]
    with pytest.raises(ConfigError, match="own"):
        load_config(None, [*SMALL, "own=4", "layout=long"])
