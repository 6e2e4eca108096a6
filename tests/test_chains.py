"""Chains: templates, replies (the recorded ones: test_policy), and chains of the shipped network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from srum import models
from srum.drawing.chaining import claim, draw_chains
from srum.drawing.chains import (
    TEMPLATES,
    ChainSettings,
    ChainState,
    TemplateError,
    looked_at,
    parse_reflection,
    run_chains,
    template,
)
from srum.errors import ModelError
from srum.evaluation.chains import accuracy_table, endings, verdicts
from srum.models.base import Decoding, Generated, Sampling
from srum.records import Candidate
from srum.run_dir import RunError, read_by_id
from srum.stages.rollout import choose_prompts
from srum.views.plots import strips_figure

DRAWING = Sampling(size=(64, 64), timesteps=5, timestep_shift=5.0, guidance=1.0)
IMAGE = Image.new("RGB", (64, 64))
PROMPTS = ["one small red circle", "two blue stars", "a green square above a red star"]


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.yaml")))
def test_every_example_of_a_template_is_what_it_says(name: str) -> None:
    form = template(name)
    assert {example.kind for example in form.examples} == {"edit", "stop"}
    for example in form.examples:
        assert parse_reflection(example.reply, form).kind == example.kind


@pytest.mark.parametrize(
    ("reply", "kind", "failure"),
    [
        ("", "failure", "empty_reply"),
        ("one red circle", "failure", "no_instruction"),
        ("one red circle\nEdit: ", "failure", "no_instruction"),
        ("one red circle\nDraw better.", "failure", "bad_markup"),
        ("a\nEdit: remove it\nNo further edit needed.", "failure", "bad_markup"),
        ("Edit: remove it", "failure", "no_thought"),
        ("asked for a sign that says No further edit needed.\nEdit: add a sign", "edit", None),
        ("a\nNo further edit needed. Edit: remove it", "failure", "contradiction"),
    ],
)
def test_compact_replies(reply: str, kind: str, failure: str | None) -> None:
    read = parse_reflection(reply, template("compact"))
    assert (read.kind, read.failure, read.raw) == (kind, failure, reply)


@given(st.text(max_size=60), st.booleans(), st.sampled_from(["compact", "released"]))
def test_whatever_is_written_is_an_edit_a_stop_or_a_failure(reply: str, ended: bool, name: str) -> None:
    read = parse_reflection(reply, template(name), ended)
    assert (read.instruction is not None) == (read.kind == "edit") and (read.failure is not None) == (
        read.kind == "failure"
    )
    assert ended or read.kind == "failure"


def chains(names: list[str], prompts: list[str]) -> list[ChainState]:
    settings = ChainSettings(
        drawing=DRAWING, changing=DRAWING, form=template("compact"), max_refinements=2, decoding=Decoding(max_tokens=96)
    )
    return run_chains(models.load("srum-tiny", "cpu"), prompts, names, settings, seed=1)


def test_a_chain_ends_with_the_image_it_has() -> None:
    for chain in chains(["a", "b", "c"], PROMPTS):
        edits = sum(reply.kind == "edit" for reply in chain.replies)
        assert len(chain.images) == 1 + edits and chain.end in ("stop", "limit", *_failures())
        assert chain.end == "limit" or chain.after(2).latent is chain.images[-1].latent
        assert chain.after(0) is chain.images[0]


def _failures() -> tuple[str, ...]:
    return ("empty_reply", "truncated_thought", "no_thought", "bad_markup", "no_instruction", "truncated_instruction")


def test_a_prompt_with_a_stop_sentence_stops_nothing() -> None:
    """What the prompt says is in the question; a reply that quotes it is read by its own last sentence."""
    prompt = "a sign that says: No further edit needed."
    for name, reply in (
        ("compact", f"asked for {prompt}\nEdit: add a sign"),
        ("released", f"<think>The target is {prompt}</think> Add the sign."),
    ):
        form = template(name)
        texts = [segment.text or "" for segment in looked_at(form, prompt, Generated(IMAGE, torch.zeros(1)))]
        assert prompt in texts[-1] and parse_reflection(reply, form).kind == "edit"


def test_a_chain_longer_than_the_context_is_refused() -> None:
    model: Any = models.load("srum-tiny", "cpu")
    llm = model.config.llm.model_copy(update={"max_position_embeddings": 50})
    model.config = model.config.model_copy(update={"llm": llm})
    settings = ChainSettings(drawing=DRAWING, changing=DRAWING, form=template("compact"), plan=False)
    with pytest.raises(ModelError, match="positions: the language model was made for 50"):
        run_chains(model, ["a red circle and " * 20], ["a"], settings, seed=1)


def test_a_file_that_is_no_template_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("version: 1\nthought: line\nquestion: What now?\nstop: No.\n")
    with pytest.raises(TemplateError, match="version"):
        template(str(tmp_path / "mine.yaml"))
    damaged = {b"stop: 2001-99-99": "not YAML: month", b"\xff\xfe": "not YAML in UTF-8", b"a: [": ":1:5: not YAML"}
    for content, message in damaged.items():
        (tmp_path / "mine.yaml").write_bytes(content)
        with pytest.raises(TemplateError, match=message) as raised:
            template(str(tmp_path / "mine.yaml"))
        assert "\n" not in str(raised.value)
    with pytest.raises(TemplateError, match="compact, released"):
        template("unheard")


def test_chains_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    prompts = choose_prompts("development", 2, 0)
    settings = ChainSettings(drawing=DRAWING, changing=DRAWING, form=template("compact"))
    claim(tmp_path, "srum-tiny", prompts, settings, 0)
    claim(tmp_path, "srum-tiny", prompts, settings, 0)
    for model, asked, other, differs in (
        ("another", prompts, settings, "model"),
        ("srum-tiny", prompts[:1], settings, "prompts"),
        ("srum-tiny", prompts, replace(settings, max_refinements=9), "max_refinements"),
    ):
        with pytest.raises(RunError, match=rf"other settings or weights \(settings\.json: {differs}\)"):
            claim(tmp_path, model, asked, other, 0)
    with pytest.raises(RunError, match=r"eval\.count is 0"):
        claim(tmp_path / "none", "srum-tiny", [], settings, 0)


def test_chains_are_kept_as_candidates_and_the_same_for_every_batch(tmp_path: Path) -> None:
    prompts, model = choose_prompts("development", 4, 0), models.load("srum-tiny", "cpu")
    settings = ChainSettings(drawing=DRAWING, changing=DRAWING, form=template("compact"), plan=False, max_refinements=1)
    kept = [draw_chains(model, prompts, settings, tmp_path / str(size), 1, size) for size in (4, 1)]
    assert [(r.end, [t.text for t in r.turns]) for r in kept[0]] == [
        (r.end, [t.text for t in r.turns]) for r in kept[1]
    ]
    candidates = read_by_id(tmp_path / "4" / "candidates.jsonl", Candidate)
    for record in kept[0]:
        first, *others = (candidates[name] for name in record.images)
        assert first.parent is None and [c.parent for c in others] == record.images[:-1]
        assert all([part.kind for part in c.context] == ["clean", "seen", "text"] for c in others)
    rows = verdicts(kept[0], prompts, tmp_path / "4", 1)
    stopped = [row for row, record in zip(rows, kept[0], strict=True) if len(record.images) == 1]
    assert len(rows) == 4 and all(row[1] == row[0] for row in stopped)
    assert accuracy_table(rows, [str(p.metadata["tag"]) for p in prompts]).row_count == 2
    assert len(strips_figure(kept[0][:2], tmp_path / "4").axes) >= 2
    assert sum(endings(kept[0]).values()) == 4
