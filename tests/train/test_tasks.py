"""The tasks of pretraining: no prompt of another split, no held-out pair; edits, replies and strokes that are true."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from srum.shapes.checker import check
from srum.shapes.edits import apply, parse_edits, parse_reflection, same_things
from srum.shapes.matching import completable
from srum.shapes.prompts import from_metadata, sample_prompt, split_of, to_metadata
from srum.shapes.render import render, render_distorted
from srum.shapes.scenes import HELD_OUT_PAIRS, Scene, mentions_held_out, sample_scene, shows_held_out
from srum.shapes.strokes import parse_inspection, parse_plan
from srum.shapes.wording import EDIT_MARK, STOP, listed
from srum.train import tasks
from srum.train.tasks import TASKS, WRONG_REPLIES, Drawing, base, editing, generation, process, understanding

HELD_OUT_WORDS = re.compile("|".join(f"{colour} {shape}s?" for shape, colour in sorted(HELD_OUT_PAIRS)))
DRAWS = 40_000


def drawings(rng: np.random.Generator, n: int) -> list[Drawing]:
    asked = [sample_prompt(rng) for _ in range(n)]
    return [Drawing(render(sample_scene(spec, rng)), (spec, text)) for spec, text in asked]


def draw(name: str, rng: np.random.Generator, drawn: list[Drawing]) -> tasks.Sample:
    task = next(task for task in TASKS if task.name == name)
    if task.draw is not None:
        return task.draw(rng)
    assert task.own is not None
    return task.own(rng, drawn[int(rng.integers(len(drawn)))])


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> list[Scene]:
    """Every scene that a task draws from now on; clean images stay empty, which saves time."""
    drawn: list[Scene] = []
    blank = np.zeros((64, 64, 3), np.uint8)

    def recorded(scene: Scene) -> np.ndarray:
        drawn.append(scene)
        return blank

    def distorted(scene: Scene, rng: np.random.Generator) -> Any:
        drawn.append(scene)
        return render_distorted(scene, rng)

    for module in (base, editing, generation, process, understanding):
        monkeypatch.setattr(module, "render", recorded)
    monkeypatch.setattr(base, "render_distorted", distorted)
    return drawn


@pytest.fixture
def undamaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is badly drawn, so that the checker sees what the task knows."""
    for module in (editing, process):
        monkeypatch.setattr(module, "pictured", lambda scene, rng, distorted=0.0: base.pictured(scene, rng, 0.0))


def test_no_draw_leaves_the_training_split_and_none_shows_a_held_out_pair(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(11)
    drawn = drawings(rng, 100)
    asked = Counter[str]()
    for number in range(DRAWS):
        task = TASKS[number % len(TASKS)]
        sample = draw(task.name, rng, drawn)
        for part in sample:
            assert not HELD_OUT_WORDS.search(part.text), (task.name, part.text)
            if part.asks is not None:
                spec, prompt = part.asks
                assert split_of(spec, prompt) == "train" and not mentions_held_out(spec), (task.name, prompt)
                assert prompt in part.text
                asked[task.name] += 1
        assert not any(shows_held_out(scene.things) for scene in scenes), task.name
        scenes.clear()
    assert len(asked) >= len(TASKS) - 5


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_has_a_target(task: Any) -> None:
    drawn = drawings(np.random.default_rng(0), 4)
    for seed in range(20):
        sample = draw(task.name, np.random.default_rng(seed), drawn)
        assert any(part.loss for part in sample)
        assert all((part.image is not None) + bool(part.text) == 1 for part in sample)


def test_the_instruction_of_an_edit_leads_from_the_image_given_to_the_target(scenes: list[Scene]) -> None:
    for seed in range(400):
        sample = editing.edit(np.random.default_rng(seed))
        after, before = scenes[-2:]  # the target is drawn first
        edits = parse_edits(sample[2].text.removeprefix(EDIT_MARK))
        assert 1 <= len(edits) <= editing.MOST_EDITS
        assert sample[2].text.startswith(EDIT_MARK) and apply(before, edits) == after


def test_repairs_end_in_what_the_checker_calls_correct() -> None:
    for seed in range(150):
        rng = np.random.default_rng(seed)
        (spec, _), scene, edits = editing.missed_attempt(rng)
        repaired = apply(scene, edits)
        assert check(render(repaired), to_metadata(spec)).correct
        assert not check(render(scene), to_metadata(spec)).correct
        assert editing.repaired(repaired.things, spec) == ()


def test_reflections_parse_and_a_stated_share_is_wrong(undamaged: None) -> None:
    drawn = drawings(np.random.default_rng(1), 50)
    wrong = stopped = 0
    for seed in range(600):
        rng = np.random.default_rng(seed)
        sample = draw(("reflect", "reflect_own")[seed % 2], rng, drawn)
        assert sample[1].asks is not None
        spec, image, reply = sample[1].asks[0], sample[0].seen, sample[2].text
        assert image is not None
        seen, edits = parse_reflection(reply)
        assert "; asked for " in seen
        stopped += reply.endswith(STOP)
        mended = apply(Scene(base.recognised(image).things), edits)
        wrong += not check(render(mended), to_metadata(spec)).correct
    assert wrong / 600 == pytest.approx(WRONG_REPLIES, abs=0.05)
    assert 0.3 < stopped / 600 < 0.65


def test_regenerating_shows_what_misses_the_prompt_and_asks_for_what_meets_it() -> None:
    for seed in range(60):
        sample = generation.regenerate(np.random.default_rng(seed))
        assert sample[2].asks is not None and sample[1].seen is not None and sample[3].drawn is not None
        metadata = to_metadata(sample[2].asks[0])
        assert check(sample[3].drawn, metadata).correct and not check(sample[1].seen, metadata).correct


def test_drafts_show_the_scene_that_their_plan_describes() -> None:
    for seed in range(100):
        sample = process.stroke_draft(np.random.default_rng(seed))
        plan, image = parse_plan(sample[2].text), sample[3].drawn
        assert image is not None
        assert same_things(base.recognised(image).things, plan.things)


def test_plans_of_strokes_are_completable() -> None:
    for seed in range(400):
        sample = process.stroke_plan(np.random.default_rng(seed))
        asked = next(part.asks for part in sample if part.asks)
        plan = parse_plan(next(part.text for part in sample if part.loss and part.text))
        assert completable(plan.things, asked[0])
        if len(sample) == 5:
            before = parse_plan(f"{plan!s}".split(" | ")[0] + " | " + sample[3].text).things
            assert same_things(apply(Scene(before), plan.edits).things, plan.things)


def test_inspections_are_true(undamaged: None) -> None:
    verdicts = Counter[str]()
    for seed in range(600):
        sample = process.stroke_inspect(np.random.default_rng(seed))
        assert sample[0].asks is not None and sample[2].seen is not None
        spec, plan, inspection = sample[0].asks[0], parse_plan(sample[1].text), parse_inspection(sample[3].text)
        assert bool(inspection.plan_fault) != completable(plan.things, spec)
        shown = base.recognised(sample[2].seen)
        assert bool(inspection.image_fault) != same_things(shown.things, plan.things)
        if isinstance(inspection.verdict, tuple):
            verdicts["refine"] += 1
            assert completable(apply(Scene(shown.things), inspection.verdict).things, spec)
        else:
            verdicts[inspection.verdict] += 1
            assert (inspection.verdict == "done") == (len(plan.things) == spec.total)
    assert min(verdicts["done"], verdicts["continue"]) > 60 and verdicts["refine"] > 200


def test_what_the_checker_recognises_is_the_scene() -> None:
    for seed in range(100):
        rng = np.random.default_rng(seed)
        spec, text = sample_prompt(rng)
        scene = sample_scene(from_metadata(to_metadata(spec, text)), rng)
        picture = base.recognised(render(scene))
        assert listed(picture.things) == listed(scene.things) and not picture.damaged and not picture.blobs
