"""Templates of instructions: those that ship, and those of a user."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from srum.judging.instructions import TEMPLATES, InstructionsError, load_instructions
from srum.records import Region

OWN = {
    "version": "mine-1",
    "regions_per_question": 2,
    "region": '{prompt}: rate {regions} as {{"region_id": 1, "score": 0.5}}',
    "region_entry": "{id} at {box}",
    "background_box": "the rest",
    "layout": "{prompt}: rate the layout",
}


def written(folder: Path, **changes: object) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(OWN | changes))
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.yaml")))
def test_shipped_templates_are_versioned(name: str) -> None:
    assert load_instructions(name).version.startswith(f"{name}-")


def test_a_users_template(tmp_path: Path) -> None:
    own = load_instructions(written(tmp_path))
    regions = [Region(id=i, box=(0.4, 1, 2.6, 3), area=1, source="test") for i in (3, 0)]
    asked = own.about_regions("{a} cat", regions)
    assert asked == '{a} cat: rate 3 at [0, 1, 3, 3]\n0 at the rest as {"region_id": 1, "score": 0.5}'
    assert own.about_regions("a", regions, marked=True, short=True) == own.about_regions("a", regions)
    assert own.about_layout("a", short=True) == "a: rate the layout"
    with pytest.raises(ValueError, match="mine-1 have no text 'whole'"):
        own.about_image("a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": "{prompt}"}, r"region: expected the placeholders \{prompt\}, \{regions\}, got \{prompt\}"),
        ({"layout": "{prompt} {score}"}, r"layout: expected the placeholders \{prompt\}, got \{prompt\}, \{score\}"),
        ({"layout": '{prompt} {"score": 1}'}, "layout: .*double other braces"),
        ({"layout": "{prompt} }"}, "layout: Single '}'"),
        ({"whole": "no prompt"}, "whole: .*got none"),
        ({"regions_per_question": 0}, "regions_per_question: "),
        ({"layuot": "{prompt}"}, "layuot: Extra inputs"),
    ],
)
def test_a_bad_template_is_named_with_its_field(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"mine.yaml: {message}") as error:
        load_instructions(written(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", ":1:5: not YAML"), ("- 1", "Input should be"), ("", "Input should be")]
)
def test_a_file_that_is_no_template(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"own.yaml:? ?{message}"):
        load_instructions(str(tmp_path / "own.yaml"))


def test_a_missing_template_names_those_there_are() -> None:
    with pytest.raises(InstructionsError, match=r"no instructions \'no_such\': give one of compact, paper"):
        load_instructions("no_such")
