"""Wordings are unambiguous, metadata go there and back, and the splits share nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srum.records import Prompt
from srum.shapes.prompts import (
    COLOURED,
    FEW_SPECS,
    SPLITS,
    from_metadata,
    phrase,
    prompt_set,
    sample_prompt,
    sample_spec,
    split_of,
    to_metadata,
)
from srum.shapes.scenes import CATEGORIES, Relation, Spec, Want, canonical, mentions_held_out

WANTED = {"train": 1600, "development": 320, "held_out": 720, "compositional": 240}


@pytest.fixture(scope="module")
def sets() -> dict[str, list[Prompt]]:
    return {name: prompt_set(name, n) for name, n in WANTED.items()}


# --- wordings


def test_no_text_means_two_things() -> None:
    rng = np.random.default_rng(0)
    meanings: dict[str, str] = {}
    for index in range(20_000):
        spec = sample_spec(rng, compositional=index % 4 == 0)
        assert meanings.setdefault(text := phrase(spec, rng), canonical(spec)) == canonical(spec), text


def test_a_text_is_lower_case_and_names_every_attribute() -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        spec = sample_spec(rng)
        text = phrase(spec, rng)
        assert text == text.lower().strip()
        assert all(want.name in text for want in spec.wants)


def test_every_wording_of_a_relation() -> None:
    spec = Spec((Want("circle", "red"), Want("square", "blue")), "position", Relation(0, "left of", 1))
    rng = np.random.default_rng(0)
    texts = {phrase(spec, rng) for _ in range(3000)}
    assert texts >= {
        "a red circle left of a blue square",
        "a picture of a red circle to the left of one blue square",
        "a blue square right of a red circle",
        "there is a blue square with a red circle to its left",
        "a red circle with a blue square to its right",
        "a red circle is on the left of a blue square",
    }
    assert not any("square left" in text or "square to the left" in text for text in texts)


def test_every_wording_of_a_list() -> None:
    spec = Spec((Want("circle", count=2), Want("star")), "counting")
    rng = np.random.default_rng(0)
    texts = {phrase(spec, rng) for _ in range(500)}
    assert texts >= {
        "two circles and a star",
        "there is a star and two circles",
        "there are two circles with one star",
        "an image of two circles and a star",
    }


def test_three_things_are_listed_with_a_comma() -> None:
    spec = Spec((Want("circle", "red"), Want("star", "blue"), Want("star", "black")), "color_attr")
    assert "a red circle, a blue star and a black star" in {phrase(spec, np.random.default_rng(n)) for n in range(300)}


@pytest.mark.parametrize("category", ["single_object", "two_object"])
def test_a_category_without_colours_is_not_compositional(category: str) -> None:
    with pytest.raises(ValueError, match=category):
        sample_spec(np.random.default_rng(0), category, compositional=True)


# --- metadata


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(CATEGORIES), st.integers(0, 2**32))
def test_metadata_go_there_and_back(category: str, seed: int) -> None:
    spec = sample_spec(np.random.default_rng(seed), category)
    assert from_metadata(to_metadata(spec)) == spec


def test_metadata_have_the_layout_of_geneval() -> None:
    spec = Spec((Want("square", "blue"), Want("circle", "red", "small")), "position", Relation(1, "left of", 0))
    assert to_metadata(spec, "the text") == {
        "tag": "position",
        "include": [
            {"class": "square", "count": 1, "color": "blue"},
            {"class": "circle", "count": 1, "color": "red", "size": "small", "position": ["left of", 0]},
        ],
        "prompt": "the text",
    }


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"tag": "colors"}, "include"),
        ({"tag": "colors", "include": []}, "include"),
        ({"tag": "colors", "include": ["circle"]}, r"include\[0\]"),
        ({"tag": "colors", "include": [{"class": "dog", "count": 1}]}, r"include\[0\].*dog"),
        ({"tag": "colors", "include": [{"class": "circle", "count": "2"}]}, r"include\[0\]\.count"),
        ({"tag": "colors", "include": [{"class": "circle", "count": 9}]}, r"include\[0\].*9"),
        ({"tag": "colors", "include": [{"class": "circle", "color": "pink"}]}, r"include\[0\].*pink"),
        ({"tag": "colors", "include": [{"class": "circle", "colour": "red"}]}, "colour"),
        ({"tag": "size", "include": [{"class": "circle", "size": "huge"}]}, "huge"),
        ({"tag": "poetry", "include": [{"class": "circle"}]}, "tag.*poetry"),
        ({"tag": "position", "include": [{"class": "star"}, {"class": "circle", "position": "left"}]}, "position"),
        ({"tag": "position", "include": [{"class": "star"}, {"class": "circle", "position": ["near", 0]}]}, "near"),
        ({"tag": "position", "include": [{"class": "star"}, {"class": "circle", "position": ["above", 5]}]}, "5"),
    ],
)
def test_malformed_metadata_name_the_field(metadata: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        from_metadata(metadata)


# --- splits


def test_sets_have_the_asked_size_unique_texts_and_ids(sets: dict[str, list[Prompt]]) -> None:
    assert {name: len(prompts) for name, prompts in sets.items()} == WANTED
    texts = [prompt.text for prompts in sets.values() for prompt in prompts]
    assert len(set(texts)) == len(texts)
    assert sets["held_out"][7].id == "held_out-0007"
    assert sets["held_out"][7].metadata["prompt"] == sets["held_out"][7].text


def test_splits_share_no_spec_where_there_are_enough(sets: dict[str, list[Prompt]]) -> None:
    owners: dict[str, set[str]] = {}
    for name, prompts in sets.items():
        for spec in (from_metadata(prompt.metadata) for prompt in prompts):
            if spec.category not in FEW_SPECS:
                owners.setdefault(canonical(spec), set()).add(name)
    assert {len(names) for names in owners.values()} == {1}


def test_only_compositional_prompts_name_a_held_out_pair(sets: dict[str, list[Prompt]]) -> None:
    for name, prompts in sets.items():
        assert {mentions_held_out(from_metadata(p.metadata)) for p in prompts} == {name == "compositional"}


def test_categories_are_balanced_as_far_as_they_last(sets: dict[str, list[Prompt]]) -> None:
    for name, prompts in sets.items():
        counts = Counter(prompt.metadata["tag"] for prompt in prompts)
        assert set(counts) == set(COLOURED if name == "compositional" else CATEGORIES)
        lasting = [counts[c] for c in ("counting", "position", "color_attr", "size")]
        assert max(lasting) - min(lasting) <= 1
        assert max(counts.values()) == max(lasting)


def test_a_set_is_reproducible_and_a_shorter_one_is_its_beginning(sets: dict[str, list[Prompt]]) -> None:
    assert prompt_set("development", 50) == sets["development"][:50]
    assert prompt_set("development", 50, seed=1) != sets["development"][:50]


def test_the_split_of_a_prompt_never_changes() -> None:
    """Golden values: a change here would mix what models were trained on with what they are tested on."""
    spec = Spec((Want("circle", "red"), Want("square", "blue")), "color_attr")
    assert split_of(spec, "whatever") == "held_out"
    assert split_of(Spec((Want("star"),), "single_object"), "a star") == "development"
    assert split_of(Spec((Want("star", "red"),), "colors"), "a red star") == "compositional"


@pytest.mark.parametrize("split", SPLITS)
def test_sampled_prompts_belong_to_their_split(split: str) -> None:
    rng = np.random.default_rng(0)
    assert {split_of(*sample_prompt(rng, split)) for _ in range(100)} == {split}


def test_unknown_splits_and_too_long_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="test_set"):
        prompt_set("test_set", 1)
    with pytest.raises(ValueError, match="test_set"):
        sample_prompt(np.random.default_rng(0), "test_set")
