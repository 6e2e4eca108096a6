"""What is said of a field: every field of every method has a type, a default and a meaning."""

from __future__ import annotations

import pytest
import yaml

from srum.config import ConfigError, RunConfig, config_class
from srum.explain import explain, fields, reference, values
from srum.plugins import names


@pytest.mark.parametrize("method", names("method"))
def test_every_field_says_what_it_means(method: str) -> None:
    kind = config_class(method)
    told = {field.name: field for field in fields(kind)}
    assert [name for name, field in told.items() if not field.meaning] == []
    for name, field in told.items():
        default = kind()
        for part in name.split("."):
            default = default[part] if isinstance(default, dict) else getattr(default, part)
        assert yaml.safe_load(field.default) == (list(default) if isinstance(default, tuple) else default), name


def test_types_and_ranges_are_those_that_pydantic_checks() -> None:
    kind = config_class("region_nft")
    said = {field.name: field.values for field in fields(kind)}
    assert said["train.lr"] == "number > 0"
    assert said["train.betas"] == "[number >= 0, < 1; number >= 0, < 1]"
    assert said["train.tracker"] == "tensorboard, wandb or trackio or null"
    assert said["pairs.per_prompt"] == "integer >= 1, <= 4"
    assert said["judge.options"] == "keys and values" and said["compare"] == "list of text"
    assert values({"const": "flow", "type": "string"}) == "text"


def test_a_field_of_a_base_class_keeps_its_meaning_where_only_the_default_is_another() -> None:
    (rollout,), (refine,) = explain(RunConfig, "rollout.guidance"), explain(RunConfig, "refine.guidance")
    assert rollout.meaning == refine.meaning == "<= 1 is off" and (rollout.default, refine.default) == ("1.0", "2.5")


def test_a_section_is_all_of_its_fields_and_a_typo_has_a_suggestion() -> None:
    assert [field.name for field in explain(RunConfig, "train.lora")] == [
        f"train.lora.{name}" for name in ("rank", "alpha", "target")
    ]
    for typo, said in {"train.lrr": "did you mean train.lr?", "tain.lr": "did you mean train?"}.items():
        with pytest.raises(ConfigError, match=f"unknown key {typo}; {said[:-1]}"):
            explain(RunConfig, typo)


def test_the_reference_has_a_row_for_every_field() -> None:
    page = reference()
    for method in names("method"):
        for field in fields(config_class(method)):
            assert f"\n| `{field.name}` |" in page, field.name
