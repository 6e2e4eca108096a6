"""What the judge is asked, and the format in which it replies: versioned template files that a user can replace.

A template is a YAML file (``judging/templates/``, or any path) with the fields of ``Instructions``. ``compact`` is what
the embedded model was pretrained on; ``paper`` follows Appendix D (Tables 7, 8) of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import Formatter

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from srum.errors import SrumError
from srum.geometry import format_box
from srum.records import Region
from srum.yaml_files import load_named

TEMPLATES = Path(__file__).parent / "templates"
PLACEHOLDERS = {
    "region": {"prompt", "regions"},
    "short_region": {"prompt", "regions"},
    "region_entry": {"id", "box"},
    "layout": {"prompt"},
    "short_layout": {"prompt"},
    "whole": {"prompt"},
}


class InstructionsError(SrumError, ValueError):
    """A template that is not there, that is none, or that lacks a text; the message names file and field."""


class Instructions(BaseModel):
    """The texts of one template file, with the placeholders of ``PLACEHOLDERS``; other braces are doubled.

    The ``short`` texts are those of further attempts, where there are any; ``whole`` asks for one score of the whole
    image; ``marks`` is a line before the regions of an image on which they are drawn; ``think`` goes before a question
    that is to be thought about.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    regions_per_question: int = Field(ge=1)
    region: str
    region_entry: str
    background_box: str
    layout: str
    short_region: str | None = None
    short_layout: str | None = None
    whole: str | None = None
    marks: str | None = None
    think: str | None = None

    @field_validator(*PLACEHOLDERS)
    @classmethod
    def _has_its_placeholders(cls, text: str | None, info: ValidationInfo) -> str | None:
        expected = PLACEHOLDERS[info.field_name or ""]
        found = expected if text is None else {name for _, name, _, _ in Formatter().parse(text) if name is not None}
        if found != expected:
            wanted, got = (", ".join(f"{{{name}}}" for name in sorted(names)) for names in (expected, found))
            raise ValueError(f"expected the placeholders {wanted}, got {got or 'none'}; double other braces")
        return text

    def about_regions(self, prompt: str, regions: Sequence[Region], marked: bool = False, short: bool = False) -> str:
        """The region instruction for ``regions`` (boxes in pixels of the image shown); region 0 is the background."""
        entries = [
            self.region_entry.format(id=r.id, box=self.background_box if r.id == 0 else format_box(r.box))
            for r in regions
        ]
        if marked and self.marks:
            entries.insert(0, self.marks)
        return ((short and self.short_region) or self.region).format(prompt=prompt, regions="\n".join(entries))

    def about_layout(self, prompt: str, short: bool = False) -> str:
        """The layout instruction."""
        return ((short and self.short_layout) or self.layout).format(prompt=prompt)

    def about_image(self, prompt: str) -> str:
        """The instruction for one score of the whole image. Raises InstructionsError where there is no ``whole``."""
        if self.whole is None:
            raise InstructionsError(
                f"the instructions {self.version} have no text 'whole', for one score of the whole image"
            )
        return self.whole.format(prompt=prompt)


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
    """A shipped template by name, or a user's file by path.

    Raises InstructionsError: with the names that exist where there is none; naming file and field for what is none.
    """
    return load_named(Instructions, name_or_path, TEMPLATES, InstructionsError)
