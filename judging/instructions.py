"""What the judge is asked, and the format in which it replies: versioned template files that a user can replace.

A template is a YAML file (``judging/templates/``, or any path) with the fields of ``Instructions``. ``compact`` is what
the embedded model was pretrained on; ``paper`` follows Appendix D (Tables 7, 8) of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field

from srum.records import Region

TEMPLATES = Path(__file__).parent / "templates"


class Instructions(BaseModel):
    """The texts of one template file. Placeholders: ``{prompt}``, ``{regions}``; in an entry ``{id}`` and ``{box}``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    regions_per_question: int = Field(ge=1)
    region: str
    region_entry: str
    background_box: str
    layout: str

    def about_regions(self, prompt: str, regions: Sequence[Region]) -> str:
        """The region instruction for ``regions`` (boxes in image pixels); region 0 is the background."""
        entries = [
            self.region_entry.format(id=r.id, box=self.background_box if r.id == 0 else format_box(r.box))
            for r in regions
        ]
        return self.region.format(prompt=prompt, regions="\n".join(entries))

    def about_layout(self, prompt: str) -> str:
        """The layout instruction."""
        return self.layout.format(prompt=prompt)


def format_box(box: Sequence[float]) -> str:
    """``[x0, y0, x1, y1]`` in whole pixels."""
    return "[" + ", ".join(str(round(value)) for value in box) + "]"


def region_reply(region_id: int, label: str, score: float, reason: str, asked: str = "") -> str:
    """One region's part of a well-formed reply; what ``replies.parse_regions`` reads. ``asked``: what was asked for."""
    compared = f"Asked For: {asked}\n" if asked else ""
    return f"Region ID: {region_id}\nIdentified Object: {label}\n{compared}Score: {score:.1f}\nReason: {reason}"


def layout_reply(score: float, reason: str, analysis: str = "") -> str:
    """A well-formed reply to the layout instruction; what ``replies.parse_layout`` reads. An analysis may precede."""
    described = f"Composition Analysis: {analysis}\n" if analysis else ""
    return f"{described}Score: {score:.1f}\nReason: {reason}"


@cache
def load_instructions(name_or_path: str) -> Instructions:
    """A shipped template by name, or a user's file by path. Raises FileNotFoundError with the names that exist."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = TEMPLATES / f"{name_or_path}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.yaml")))
        raise FileNotFoundError(f"no instruction template {name_or_path!r}: give a .yaml path or one of {shipped}")
    return Instructions.model_validate(yaml.safe_load(path.read_text()))
