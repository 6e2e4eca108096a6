"""What one stage hands to the next: prompt, candidate, regions, judgement, reward map.

Every record is frozen, validated on construction and one line of JSON in a run's folder (``srum.run_dir``).
Arrays (images, latents, reward maps) are files beside the lines, addressed by candidate id. Records come from anywhere:
an id can name a file (``Name``), a path leads down from the round's folder (``RunPath``), or the record is refused.

Frames: boxes and masks are in *image pixels* of the candidate's own image, continuous coordinates
``(x0, y0, x1, y1)`` with x in [0, W], y in [0, H], the origin at the top left corner. Sizes are (H, W).
Scores are in [-1, 1] (specs: -1 contradicts the prompt, 0 neutral, 1 perfect).
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1
FILE_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # with a suffix and a dot before it still a file's name


def _names_a_file(text: str) -> str:
    if not FILE_SAFE.fullmatch(text):
        raise ValueError(f"{text[:200]!r} cannot name a file; use at most 200 letters, digits and ._-")
    return text


def _leads_down(text: str) -> str:
    path = PurePosixPath(text)
    if not path.parts or path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00-\x1f\ud800-\udfff]", text):
        raise ValueError(f"{text[:200]!r} is not the path of a file inside the round's folder")
    return text


Name = Annotated[str, AfterValidator(_names_a_file)]
RunPath = Annotated[str, AfterValidator(_leads_down)]  # relative; where links lead is asked where it is read (run_dir)
Score = Annotated[float, Field(ge=-1.0, le=1.0, allow_inf_nan=False)]
Size = tuple[int, int]  # (H, W)
Box = tuple[float, float, float, float]  # (x0, y0, x1, y1), image pixels


class Record(BaseModel):
    """Base of all records: immutable, no unknown fields, NaN refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def files(self) -> list[str]:
        """The files that the record names, as paths from the folder of its own file."""
        return []


class Prompt(Record):
    """A text that requests an image. ``metadata`` is free (the embedded world stores GenEval's format there)."""

    id: Name
    text: str = Field(min_length=1)
    metadata: dict[str, Any] = Field(default_factory=dict)


class ContextPart(Record):
    """One segment of what an image was drawn after: a text, or an earlier candidate of the round.

    ``kind`` says how the candidate stood there: ``seen`` by the understanding encoder, or as a ``clean`` latent.
    """

    kind: Literal["text", "seen", "clean"]
    text: str | None = None
    candidate_id: Name | None = None

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> ContextPart:
        if (self.text is None) == (self.kind == "text") or (self.candidate_id is None) != (self.kind == "text"):
            raise ValueError(f"kind: {self.kind} has {'a text' if self.kind == 'text' else 'a candidate_id'} alone")
        return self


class Candidate(Record):
    """One generated image of one prompt.

    ``image`` and ``latent`` are paths relative to the round's folder; the latent is the sampler's own clean latent
    (C, h, w) in the model's scaled latent space, never a re-encoding; of an image that a server drew, or that was
    imported, it is the encoding. ``context`` is what stood between the prompt and the image; ``parent`` is the
    candidate that this one continues: chains and trees are candidates with parents.
    """

    id: Name
    prompt_id: Name
    prompt: str
    index: int = Field(ge=0, description="number of this candidate among those of its prompt")
    seed: int
    plan: str | None = None
    image: RunPath
    latent: RunPath
    size: Size
    sampling: dict[str, Any] = Field(default_factory=dict)
    parent: Name | None = None
    context: list[ContextPart] = Field(default_factory=list)

    def files(self) -> list[str]:
        """The image and the latent."""
        return [self.image, self.latent]


class MaskRLE(Record):
    """Binary mask (H, W), run lengths in row-major order, starting with the length of the first run of zeros."""

    size: Size
    counts: list[int]


class Region(Record):
    """A region proposal in image pixels. ``id`` counts from 1 inside one image; 0 is the background region."""

    id: int = Field(ge=0)
    box: Box
    mask: MaskRLE | None = None
    area: float = Field(gt=0, description="pixels of the mask, or of the box where there is none")
    source: str
    label: str | None = None

    @model_validator(mode="after")
    def _box_is_ordered(self) -> Region:
        x0, y0, x1, y1 = self.box
        if not (x0 < x1 and y0 < y1):
            raise ValueError(f"box {self.box} is empty or inverted; expected x0 < x1 and y0 < y1")
        return self


class Grounding(Record):
    """All region proposals of one candidate. No region found is a valid, counted outcome; ``error`` is not."""

    candidate_id: Name
    regions: list[Region]
    error: str | None = None


class Failure(StrEnum):
    """Why a reply gave no score. Never a number: a failed judgement is not a neutral one."""

    EMPTY = "empty_reply"
    TRUNCATED_THOUGHT = "truncated_thought"
    NO_SCORE = "no_score"
    OUT_OF_RANGE = "score_out_of_range"
    MISSING_REGION = "missing_region"
    NO_REPLY = "no_reply"
    NO_IMAGE = "unreadable_image"


class Judged(Record):
    """What the judge says of one thing: either a score or a failure, with the raw reply either way.

    ``raw`` is the reply of the last of ``attempts``; with the failure ``no_reply`` or ``unreadable_image`` it
    says why there was none.
    ``confidence`` is 1 less the standard deviation of the score under the judge's own distribution: 1 is certain, 0 is
    torn between -1 and 1; None where that distribution was not asked for.
    """

    score: Score | None
    reason: str | None = None
    failure: Failure | None = None
    raw: str = ""
    attempts: int = Field(default=1, ge=1)
    confidence: float | None = Field(default=None, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _score_or_failure(self) -> Judged:
        if (self.score is None) == (self.failure is None):
            raise ValueError(f"exactly one of score and failure must be set, got {self.score} and {self.failure}")
        return self


class RegionJudgement(Judged):
    """What the judge says of one region, and what it takes the region for."""

    region_id: int = Field(ge=0)
    label: str | None = None


class LayoutJudgement(Judged):
    """The judge's view of the whole composition."""


class Judgement(Record):
    """Everything the judge said of one candidate. Region 0, where present, is the background."""

    candidate_id: Name
    regions: list[RegionJudgement]
    layout: LayoutJudgement


class RewardMap(Record):
    """A reward map on the latent grid: the array is in ``values`` (a safetensors path), the facts are here.

    ``alpha`` = (layout + 1) / 2 in [0, 1]. ``mapping`` is the range of the array: ``signed`` [-1, 1], ``unit`` [0, 1].
    ``sample_score`` is the candidate's one score in [-1, 1]: the minimum over its judged regions and its layout, whose
    scores up to 0.4, neutral, are first stretched to [-1, 1] (``srum.stages.reward_map.sample_score``).
    """

    candidate_id: Name
    values: RunPath
    grid: Size
    mapping: Literal["signed", "unit"]
    alpha: float = Field(ge=0.0, le=1.0)
    sample_score: Score

    def files(self) -> list[str]:
        """The array."""
        return [self.values]


class Picture(Record):
    """One image of a source, ready to be reconstructed, or the reason why it is not (``failure``).

    ``source`` says where it is from. ``image`` is the picture in RGB at its own ``size``, ``seen`` what understanding
    is shown of it, the same file or a blurred one, ``latent`` the clean latent of the whole picture.
    """

    id: Name
    source: str
    image: RunPath | None = None
    seen: RunPath | None = None
    latent: RunPath | None = None
    size: Size | None = None
    failure: str | None = None

    @model_validator(mode="after")
    def _is_whole_or_failed(self) -> Picture:
        parts = (self.image, self.seen, self.latent, self.size)
        if any((part is None) != (self.failure is not None) for part in parts):
            raise ValueError(f"failure: either that, or image, seen, latent and size; got {parts}")
        return self

    def files(self) -> list[str]:
        """The images and the latent."""
        return [name for name in (self.image, self.seen, self.latent) if name is not None]


class Pair(Record):
    """Two candidates of a prompt: one that misses it, which is seen, and one that meets it, which is to be drawn."""

    id: Name
    prompt_id: Name
    prompt: str
    misaligned: Name
    aligned: Name
    misaligned_score: Score
    aligned_score: Score


class Turn(Record):
    """One image of a refinement: the first, as it came, or one drawn after it.

    ``image`` is relative to the folder of ``refined.jsonl``; ``score`` is the judge's, None where that failed or did
    not ask; ``said`` is what the model wrote before it drew.
    """

    image: RunPath
    seed: int | None = None
    score: Score | None = None
    said: str | None = None


class Refinement(Record):
    """The images of one prompt from the first on; ``kept`` is the number of the one that stays."""

    id: Name
    prompt: str
    turns: list[Turn] = Field(min_length=1)
    kept: int = Field(ge=0)

    @model_validator(mode="after")
    def _kept_is_one(self) -> Refinement:
        if self.kept >= len(self.turns):
            raise ValueError(f"kept: {self.kept} of {len(self.turns)} turns")
        return self

    def files(self) -> list[str]:
        """All images."""
        return [turn.image for turn in self.turns]
