"""Drawing in strokes: the grammar of both forms, and drawings of the shipped network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srum import models
from srum.drawing.chaining import draw_strokes
from srum.drawing.strokes import (
    Drawing,
    Inspection,
    Plan,
    StrokeSettings,
    corrected,
    draw_in_strokes,
    parse_inspection,
    parse_plan,
)
from srum.evaluation.strokes import looks, strokes_table
from srum.models.base import Decoding, Sampling
from srum.shapes.prompts import from_metadata, sample_prompt
from srum.shapes.scenes import sample_scene
from srum.shapes.strokes import inspect, strokes
from srum.stages.rollout import choose_prompts

DRAWING = Sampling(size=(64, 64), timesteps=5, timestep_shift=5.0, guidance=1.0)


@pytest.mark.parametrize(
    ("text", "ended", "failure"),
    [
        ("", True, "empty_reply"),
        ("<ins>add a cat</ins><des>a cat", False, "truncated"),
        ("<des>a cat</des>", True, "missing_ins"),
        ("<ins>add a cat</ins>", True, "missing_des"),
        ("<ins>a</ins><ins>b</ins><des>c</des>", True, "missing_ins"),
        ("<ins>add a cat</ins><des>a cat</des>", True, None),
    ],
)
def test_plans_in_tags(text: str, ended: bool, failure: str | None) -> None:
    plan = parse_plan(text, "tags", ended)
    assert plan.failure == failure and (plan.description == "a cat") == (failure is None)


@pytest.mark.parametrize(
    ("text", "verdict", "failure"),
    [
        ("plan: fits\nimage: fits\ncontinue", "continue", None),
        ("plan: fits\nimage: fits\ndone", "done", None),
        ("plan: conflict, two cats\nimage: fits\n<refine>remove one</refine><des>a cat</des>", "refine", None),
        ("plan: fits\nimage: mismatch, no cat\ndone", None, "contradiction"),
        ("plan: fits\nimage: fits\n<refine>remove one</refine><des>a cat</des>", None, "contradiction"),
        ("plan: fits\nimage: mismatch, no cat\n<refine>add one</refine>", None, "no_verdict"),
        ("plan: fits\nimage: fits", None, "no_verdict"),
        ("plan: lovely\nimage: fits\ndone", None, "no_verdict"),
        ("  ", None, "empty_reply"),
    ],
)
def test_inspections_in_tags(text: str, verdict: str | None, failure: str | None) -> None:
    read = parse_inspection(text, "tags")
    assert (read.verdict, read.failure) == (verdict, failure)


@given(st.integers(0, 2**31))
def test_what_the_exact_chains_say_is_read_as_it_was_meant(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec, _ = sample_prompt(rng)
    scene = sample_scene(spec, rng)
    for plan in strokes(scene, spec, rng):
        read = parse_plan(str(plan), "compact")
        assert read.failure is None and f"{read.instruction} | {read.description}" == str(plan)
        truth = inspect(plan.things, scene.things[:1], plan.things, spec)
        said = parse_inspection(str(truth), "compact")
        assert said.failure is None and (said.plan_fault, said.image_fault) == (truth.plan_fault, truth.image_fault)
        assert (said.verdict == "refine") == isinstance(truth.verdict, tuple)


@given(st.text(max_size=50), st.booleans(), st.sampled_from(["compact", "tags"]))
def test_whatever_is_written_is_read_or_fails(text: str, ended: bool, form: str) -> None:
    read = parse_inspection(text, form, ended)  # type: ignore[arg-type]
    assert (read.verdict is None) == (read.failure is not None) and read.raw == text


def test_a_correction_of_the_plan_changes_the_described_scene() -> None:
    plan = Plan("add a small red circle r1 c1", "small red circle r1 c1, small blue star r2 c2")
    objected = Inspection("one too many", "", "refine", "remove the small blue star r2 c2")
    assert corrected(plan, objected, "compact").description == "small red circle r1 c1"
    shown_wrong = Inspection("", "extra small blue star r3 c3", "refine", "remove the small blue star r3 c3")
    assert corrected(plan, shown_wrong, "compact").description == plan.description


def test_drawings_do_not_depend_on_their_batch_and_are_measured(tmp_path: Path) -> None:
    prompts, model = choose_prompts("development", 3, 0), models.load("srum-tiny", "cpu")
    settings = StrokeSettings(drawing=DRAWING, changing=DRAWING, max_strokes=2, budget=3)
    kept = [draw_strokes(model, prompts, settings, tmp_path / str(size), 1, size) for size in (3, 1)]
    assert kept[0] == kept[1] and all(record.end in ("done", "limit") for record in kept[0])
    assert all(1 <= len(record.images) <= 3 for record in kept[0])
    spec = from_metadata(prompts[0].metadata)
    inspections = sum(turn.kind == "inspect" for turn in kept[0][0].turns)
    assert len(list(looks(kept[0][0], spec, tmp_path / "3"))) <= inspections
    assert strokes_table(kept[0], prompts, tmp_path / "3").row_count >= 3
    at_once = draw_strokes(model, prompts[:1], replace(settings, budget=1), tmp_path / "once", 1, 1)
    assert [turn.kind for turn in at_once[0].turns] == ["draft"]


def test_a_long_chain_goes_on_from_its_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is seen once, no matter how long the chain; texts are the same, and images to rounding."""
    prompts, model = ["two small red circles", "one blue star"], models.load("srum-tiny", "cpu")
    few = replace(DRAWING, timesteps=3)
    settings = StrokeSettings(drawing=few, changing=few, layout="long", max_strokes=2, decoding=Decoding(max_tokens=24))
    seen = list[int]()
    encoder: Any = model.network.get_submodule("vit_model.vision_model")
    hook = encoder.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))

    def drawn() -> tuple[list[Drawing], int]:
        seen.clear()
        return draw_in_strokes(model, prompts, ["a", "b"], settings, 1), sum(seen)

    kept, once = drawn()
    with monkeypatch.context() as patch:
        patch.setattr(model, "abilities", model.abilities - {"remember"})
        plain, again = drawn()
    hook.remove()
    assert once == sum(len(drawing.images) for drawing in kept) < again
    for one, other in zip(kept, plain, strict=True):
        kinds = [segment.kind for segment in one.history]
        assert kinds[:5] == ["text", "text", "clean", "seen", "text"] and kinds == [s.kind for s in other.history]
        assert [stage.read for stage in one.stages] == [stage.read for stage in other.stages]
        for ours, theirs in zip(one.images, other.images, strict=True):
            torch.testing.assert_close(ours.latent, theirs.latent, atol=1e-3, rtol=1e-3)
