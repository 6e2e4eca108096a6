"""Edits and strokes: what is written is read back, and does what it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srum.shapes.checker import check
from srum.shapes.edits import Edit, apply, difference, format_edits, parse_edits, parse_reflection, repair, same_things
from srum.shapes.hard_negatives import perturb
from srum.shapes.matching import completable
from srum.shapes.prompts import sample_spec, to_metadata
from srum.shapes.render import render
from srum.shapes.scenes import Scene, Thing, random_scene, sample_scene
from srum.shapes.strokes import Inspection, conflict, inspect, parse_inspection, parse_plan, strokes
from srum.shapes.wording import EDIT_MARK, STOP, listed, parse_things, placed

RED = Thing("circle", "red", "small", 0, 0)


def scenes(seed: int) -> tuple[Scene, Scene]:
    rng = np.random.default_rng(seed)
    return random_scene(int(rng.integers(0, 7)), rng), random_scene(int(rng.integers(0, 7)), rng)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (Edit(None, RED), "add a small red circle r1 c1"),
        (Edit(RED, None), "remove the small red circle r1 c1"),
        (Edit(RED, replace(RED, size="large")), "make the small red circle r1 c1 large"),
        (Edit(RED, replace(RED, colour="blue")), "make the small red circle r1 c1 blue"),
        (Edit(RED, replace(RED, size="large", colour="blue")), "make the small red circle r1 c1 large blue"),
        (Edit(RED, replace(RED, shape="star", size="large")), "turn the small red circle r1 c1 into a large red star"),
        (Edit(RED, RED), "turn the small red circle r1 c1 into a small red circle"),
        (Edit(RED, replace(RED, row=2, column=3)), "move the small red circle r1 c1 to r3 c4"),
    ],
)
def test_every_kind_of_edit_has_its_wording(edit: Edit, text: str) -> None:
    assert str(edit) == text and parse_edits(text) == (edit,)
    assert edit.kind == text.split()[0]


@given(st.integers(0, 2**32))
def test_the_difference_of_two_scenes_leads_from_one_to_the_other(seed: int) -> None:
    before, after = scenes(seed)
    edits = difference(before.things, after.things)
    assert same_things(apply(before, edits).things, after.things)
    if edits:
        assert parse_edits(format_edits(edits)) == edits
    assert difference(before.things, before.things) == ()


@given(st.integers(0, 2**32))
def test_a_repaired_scene_is_correct_and_needs_no_repair(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = sample_spec(rng)
    scene = perturb(sample_scene(spec, rng), spec, rng)
    try:
        edits = repair(scene.things, spec)
    except ValueError:
        return
    after = apply(scene, edits)
    assert check(render(after), to_metadata(spec)).correct and repair(after.things, spec) == ()


@given(st.integers(0, 2**32))
def test_things_that_are_right_stay_as_they_are(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = sample_spec(rng)
    scene = sample_scene(spec, rng)
    assert repair(scene.things, spec) == ()
    damaged = repair(scene.things, spec, damaged={0})
    assert damaged == (Edit(scene.things[0], scene.things[0]),) and apply(scene, damaged) == scene


@pytest.mark.parametrize(
    "text",
    ["", "add a red circle r1 c1", "remove the small red circle", "make the small red circle r1 c1", "paint it red",
     "move the small red circle r1 c1 to r5 c1", "add a small red circle r1 c1;remove the small red circle r1 c1"],
)  # fmt: skip
def test_what_is_no_edit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no edit"):
        parse_edits(text)


def test_an_edit_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no small red circle r1 c1"):
        apply(Scene(()), (Edit(RED, None),))
    with pytest.raises(ValueError, match="share a cell"):
        apply(Scene((RED,)), (Edit(None, RED),))


def test_reflections() -> None:
    assert parse_reflection(f"nothing; asked for one circle\n{STOP}") == ("nothing; asked for one circle", ())
    seen, edits = parse_reflection(f"nothing; asked for one circle\n{EDIT_MARK}add a small red circle r1 c1")
    assert seen == "nothing; asked for one circle" and edits == (Edit(None, RED),)
    for text in ("", STOP, "a list\nperhaps", f"a list\n{EDIT_MARK}"):
        with pytest.raises(ValueError, match=r"second line|is no edit"):
            parse_reflection(text)


@given(st.integers(0, 2**32))
def test_lists_are_read_back(seed: int) -> None:
    scene, _ = scenes(seed)
    assert same_things(parse_things(listed(scene.things)), scene.things)


# --- strokes


@given(st.integers(0, 2**32))
def test_chains_grow_to_the_scene_through_scenes_that_can_be_completed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = sample_spec(rng)
    scene = sample_scene(spec, rng)
    drawn = Scene(())
    chain = strokes(scene, spec, rng)
    for plan in chain:
        drawn = apply(drawn, plan.edits)
        assert same_things(drawn.things, plan.things)
        assert completable(plan.things, spec) and conflict(plan.things, spec) == ""
        read = parse_plan(str(plan))
        assert read.edits == plan.edits and same_things(read.things, plan.things)
    assert same_things(drawn.things, scene.things)
    assert len(chain[0].things) == 1 and len(chain) <= max(1, len(scene.things))


@given(st.integers(0, 2**32))
def test_every_part_of_a_right_scene_is_completable_and_a_surplus_is_a_conflict(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = sample_spec(rng)
    things = sample_scene(spec, rng).things
    part = [thing for thing in things if rng.random() < 0.5]
    assert completable(part, spec) and completable([], spec)
    if len(things) < 7:
        more = random_scene(1, rng).things[0]
        assert not completable([*things, more], spec) and conflict([*things, more], spec)


def test_a_thing_without_room_beside_it_cannot_be_completed() -> None:
    spec = next(s for s in map(_position_spec, range(99)) if s.relation and s.relation.kind == "left of")
    subject = sample_scene(spec, np.random.default_rng(0)).things[0]
    assert completable([replace(subject, column=2)], spec)
    assert not completable([replace(subject, column=3)], spec)
    assert conflict([replace(subject, column=3)], spec) == f"no place is left for the {spec.wants[1].name}"


def _position_spec(seed: int):  # type: ignore[no-untyped-def]
    return sample_spec(np.random.default_rng(seed), "position")


@given(st.integers(0, 2**32))
def test_inspections_are_read_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = sample_spec(rng)
    scene = sample_scene(spec, rng)
    planned, shown = (perturb(scene, spec, rng) if rng.random() < 0.5 else scene for _ in range(2))
    inspection = inspect(planned.things, shown.things, scene.things, spec)
    if inspection.verdict != ():
        assert parse_inspection(str(inspection)) == inspection
    if isinstance(inspection.verdict, tuple):
        assert same_things(apply(shown, inspection.verdict).things, scene.things)


def test_contradictions_and_torn_inspections_are_refused() -> None:
    assert parse_inspection("fits | fits | done") == Inspection("", "", "done")
    extra = parse_inspection(f"fits | extra {placed(RED)} | remove the {placed(RED)}")
    assert extra == Inspection("", f"extra {placed(RED)}", (Edit(RED, None),))
    contradiction = f"fits | fits | remove the {placed(RED)}"
    for text in ("fits | fits", contradiction, "conflict, x | fits | done", "no | fits | done"):
        with pytest.raises(ValueError):
            parse_inspection(text)
