"""Tables of benchmarks: means, weights, intervals over prompts, paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from srum.evaluation.benchmark import Benchmark, Failure, Item, Verdict, limited
from srum.evaluation.leakage import leakage
from srum.evaluation.statistics import RESAMPLES, stratified, stratified_difference
from srum.evaluation.tables import differences, same_evaluator, table_of


class Page(Benchmark):
    name, about = "page", "tests"

    def figures(self) -> dict[str, dict[str, float]]:
        return {"B+": {"b": 0.5, "c": 0.5}, "overall": {"a": 0.5, "B+": 0.5}}


def verdict(name: str, column: str, *values: float, prompt: str = "", official: float | None = None) -> Verdict:
    return Verdict(
        item_id=name,
        prompt_id=prompt or name,
        category=column,
        evaluator="e",
        values={column: list(values)} if values else {},
        official={column: [official]} if official is not None else {column: list(values)} if values else {},
        failure=None if values else Failure.UNREADABLE,
    )


def test_figures_are_weighted_means_of_columns_and_failures_are_no_numbers() -> None:
    """a: (1 + 0 + 0.5) / 3; b: mean of all values, 3 of one prompt: (1 + 1 + 0 + 0) / 4; c: 1; B+: (0.5 + 1) / 2."""
    verdicts = [
        *(verdict(f"a{n}", "a", value) for n, value in enumerate((1, 0, 0.5))),
        verdict("a-failed", "a", official=-1),
        verdict("b1", "b", 1, 1, 0),
        verdict("b2", "b", 0),
        verdict("c", "c", 1),
    ]
    table = table_of(Page(), verdicts)
    assert {name: e.value for name, e in table.columns.items()} == {"a": 0.5, "b": 0.5, "c": 1.0}
    assert {name: e.value for name, e in table.figures.items()} == {"B+": 0.75, "overall": 0.625}
    assert table.counts == {"a": 3, "b": 4, "c": 1} and table.n == 7 and table.failures == {"unreadable_reply": 1}
    assert table_of(Page(), verdicts, official=True).columns["a"].value == pytest.approx((1 + 0 + 0.5 - 1) / 4)
    assert table_of(Page(), verdicts[:3]).figures == {}  # a figure whose columns are not all there is none
    assert table_of(Page(), [verdict("x", "a")]).columns == {}


def test_a_share_that_is_all_or_nothing_has_a_width() -> None:
    table = table_of(Page(), [verdict(f"a{n}", "a", 1.0) for n in range(10)])
    assert table.columns["a"].low == pytest.approx(1 / (1 + 1.96**2 / 10), abs=1e-3) and table.columns["a"].high == 1


def test_images_of_a_prompt_are_drawn_again_together() -> None:
    """Four copies of each prompt's value tell no more than one: the interval is that of the prompts."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=50)
    once = table_of(Page(), [verdict(f"{n}", "a", v) for n, v in enumerate(values)]).columns["a"]
    four = [verdict(f"{n}-{k}", "a", v, prompt=f"{n}") for n, v in enumerate(values) for k in range(4)]
    again = table_of(Page(), four).columns["a"]
    assert again.interval == pytest.approx(once.interval) and again.value == pytest.approx(once.value)
    half = 1.96 * values.std() / 50**0.5
    assert once.high - once.low == pytest.approx(2 * half, rel=0.05)


def test_prompts_are_drawn_within_their_categories() -> None:
    """Two categories of one value each have no spread within, however far apart they are."""
    verdicts = [verdict(f"{column}{n}", column, place) for place, column in enumerate("abc") for n in range(5)]
    table = table_of(Page(), [v.model_copy(update={"values": {"a": [0.3], **v.values}}) for v in verdicts])
    assert table.figures["B+"].interval == (1.5, 1.5)


def test_a_difference_is_paired_over_what_both_have() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=200)
    base = [verdict(f"{n}", column, v) for column in "abc" for n, v in zip(range(200), values, strict=True)]
    base = [
        v.model_copy(update={"item_id": f"{v.category}{v.item_id}", "prompt_id": f"{v.category}{v.item_id}"})
        for v in base
    ]
    better = [v.model_copy(update={"values": {v.category: [v.values[v.category][0] + 0.1]}}) for v in base]
    moved = differences(Page(), better, base)["overall"]
    assert (moved.value, *moved.interval) == pytest.approx((0.1, 0.1, 0.1))
    failed = [better[0].model_copy(update={"values": {}}), *better[1:]]
    assert differences(Page(), failed, base)["overall"].value == pytest.approx(0.1)
    assert differences(Page(), better, []) == {}


def test_the_bootstrap_agrees_with_the_normal_interval() -> None:
    rng = np.random.default_rng(2)
    sums, strata = rng.normal(size=(400, 1)), ["x"] * 400
    (one,) = stratified(sums, np.ones((400, 1)), strata, np.eye(1))
    assert one.high - one.low == pytest.approx(2 * 1.96 * sums.std() / 20, rel=0.05) and one.prompts == 400
    (none,) = stratified_difference((sums, np.ones((400, 1))), (sums, np.ones((400, 1))), strata, np.eye(1))
    assert (none.value, none.low, none.high) == (0, 0, 0)
    assert RESAMPLES == 10_000
    with pytest.raises(ValueError, match="has no values"):
        stratified(sums, np.zeros((400, 1)), strata, np.eye(1))


def test_a_limit_keeps_the_first_prompts_of_each_category() -> None:
    items = [Item(f"{c}{n}-{k}", "", "", c, f"{c}{n}") for c in "ab" for n in range(3) for k in range(2)]
    assert [item.id for item in limited(items, 2)] == ["a0-0", "a0-1", "a1-0", "a1-1", "b0-0", "b0-1", "b1-0", "b1-1"]


@pytest.mark.parametrize(
    ("ours", "published", "same"),
    [
        ("Qwen/Qwen2.5-VL-72B-Instruct, template 0a1b2c3d", "Qwen2.5-VL-72B-Instruct", True),
        ("Qwen/Qwen2.5-VL-7B-Instruct, template 0a1b2c3d", "Qwen2.5-VL-72B-Instruct", False),
        ("gpt-4o-mini, template 0a1b2c3d", "gpt-4o", False),
        ("Mask2Former Swin-S + CLIP ViT-L/14 (transformers)", "official: Mask2Former Swin-S + CLIP ViT-L/14", False),
    ],
)
def test_an_evaluator_is_the_same_by_its_whole_name(ours: str, published: str, same: bool) -> None:
    assert same_evaluator(ours, published) == same


def test_leakage_ignores_case_full_stops_and_openings() -> None:
    asked = ["a photo of two bicycles", "a photo of a red cup", "a photo of a cat left of a dog"]
    met = ["A Photo of two bicycles.", "two  bicycles", "Red cup.", "a photo of a tree", "a cat"]
    result = leakage(met, asked)
    assert (result.prompts, result.equal, result.bare, result.template) == (5, 1, 2, 2)
    assert result.examples == ("a photo of two bicycles", "two bicycles", "red cup")
