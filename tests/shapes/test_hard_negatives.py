"""Errors are real, varied and never show a held-out pair."""

from __future__ import annotations

import numpy as np
import pytest

from srum.shapes.hard_negatives import corrupt_spec, perturb
from srum.shapes.prompts import sample_spec
from srum.shapes.scenes import CATEGORIES, canonical, mentions_held_out, sample_scene, separated, shows_held_out
from srum.shapes.truth import layout_truth, region_truth


@pytest.mark.parametrize("category", CATEGORIES)
def test_most_perturbed_scenes_are_wrong(category: str) -> None:
    rng = np.random.default_rng(0)
    wrong, counts = [], set()
    for _ in range(400):
        spec = sample_spec(rng, category)
        scene = sample_scene(spec, rng)
        broken = perturb(scene, spec, rng)
        assert broken != scene and separated(broken.things) and not shows_held_out(broken.things)
        truths = [region_truth(thing, broken.things, spec, False) for thing in (None, *broken.things)]
        wrong.append(min(truth.score for truth in (*truths, layout_truth(broken.things, spec))) < 0)
        counts.add(len(broken.things))
    assert np.mean(wrong) > (0.75 if category in ("two_object", "counting") else 0.9)
    assert counts == set(range(8))


def test_half_of_the_perturbed_positions_are_flipped() -> None:
    """A flipped scene shows all that is asked for, in each other's place."""
    rng = np.random.default_rng(0)
    flipped = []
    for _ in range(400):
        spec = sample_spec(rng, "position")
        broken = perturb(sample_scene(spec, rng), spec, rng)
        right = all(region_truth(thing, broken.things, spec, False).score > 0 for thing in (None, *broken.things))
        flipped.append(right and layout_truth(broken.things, spec).score < 0)
    assert 0.45 < np.mean(flipped) < 0.75


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_corrupt_caption_states_something_else(category: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        spec = sample_spec(rng, category)
        wrong = corrupt_spec(spec, rng)
        assert canonical(wrong) != canonical(spec)
        assert len(wrong.wants) == len(spec.wants) and wrong.category == category
        assert not mentions_held_out(wrong)
        changed = sum(a != b for a, b in zip(spec.wants, wrong.wants, strict=True)) + (spec.relation != wrong.relation)
        assert changed == 1


def test_compositional_scenes_and_captions_can_be_corrupted_too() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        spec = sample_spec(rng, compositional=True)
        scene = sample_scene(spec, rng)
        assert perturb(scene, spec, rng) != scene
        assert canonical(corrupt_spec(spec, rng)) != canonical(spec)
