"""The authors' JSON lines (docs/specs/srum.md, 5): their training set as a round of ours, and our runs as theirs.

A line is one judged image: ``prompt``, ``bad_image_file``, ``good_image_file`` (the same file) and ``vlm_rewards``, a
list of ``object``, ``bbox`` [x0, y0, x1, y1] in image pixels, ``score`` in [-1, 1] and perhaps ``reason``. The first
entry whose object is ``global_layout_reward`` is the layout, its box says nothing. Other fields are passed over. The
format has no place for masks, the background, failures and latents: the last are made from the images, the others lost.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import save_file

from srum.evaluation.released import GLOBAL_ENTRY
from srum.geometry import clip_box, scale_box
from srum.images import open_image, save_image
from srum.json_files import read_json
from srum.models.base import UnifiedModel, crop_box
from srum.records import (
    Box,
    Candidate,
    Failure,
    Grounding,
    Judgement,
    LayoutJudgement,
    Prompt,
    Region,
    RegionJudgement,
    Score,
)
from srum.run_dir import RunError, atomic, inside, run_stage, write_json, write_records, write_text
from srum.views.reading import CandidateView, RunView

BATCH = 16  # images per shard


class Entry(BaseModel):
    """What was said of one region, or of the layout."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    object: str
    bbox: Box
    score: Score
    reason: str | None = None

    @model_validator(mode="after")
    def _box_is_ordered(self) -> Entry:
        x0, y0, x1, y1 = self.bbox
        if self.object != GLOBAL_ENTRY and not (x0 < x1 and y0 < y1):
            raise ValueError(f"bbox: {self.bbox} is empty or inverted; expected x0 < x1 and y0 < y1")
        return self


class Line(BaseModel):
    """One judged image."""

    model_config = ConfigDict(frozen=True)

    prompt: str = Field(min_length=1)
    bad_image_file: str = Field(min_length=1)
    good_image_file: str
    vlm_rewards: list[Entry]

    @model_validator(mode="after")
    def _is_one_image(self) -> Line:
        if self.good_image_file != self.bad_image_file:
            raise ValueError(f"good_image_file: {self.good_image_file!r} is another image than bad_image_file")
        return self

    @property
    def layout(self) -> Entry | None:
        """The entry about the layout."""
        return next((entry for entry in self.vlm_rewards if entry.object == GLOBAL_ENTRY), None)

    @property
    def regions(self) -> list[Entry]:
        """The entries about regions."""
        return [entry for entry in self.vlm_rewards if entry.object != GLOBAL_ENTRY]


# --- theirs to ours


def read_lines(path: Path) -> tuple[dict[int, Line], list[str]]:
    """The lines of a file by their number, and what is wrong with the others: ``file:number: field: why``.

    Raises RunError for a file that cannot be read as text.
    """
    try:
        texts = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {error}") from None
    lines: dict[int, Line] = {}
    problems = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            lines[number] = Line.model_validate(json.loads(text))
        except ValidationError as error:
            problems.append(f"{path}:{number}: {_explain(error)}")
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: not JSON: {error}")
    return lines, problems


def import_round(path: Path, images: Path, model: UnifiedModel, folder: Path) -> tuple[int, list[str]]:
    """Make a round in ``folder``, up to its judgements, of the lines of ``path`` and the files in ``images``.

    An image is resized as ``model`` encodes it, its latent is the encoded one, its boxes move along; what lies outside
    it is cut off. A line without a layout score is a candidate whose layout failed. Returns how many candidates there
    are, and what is wrong with the lines that were left out. Goes on with an import that was interrupted: which one is
    in ``imported.json``. Raises RunError for a folder that holds another round, be it of the same prompts, and for a
    file without any usable line.
    """
    lines, problems = read_lines(path)
    if not lines:
        raise RunError(f"{path}: no line that can be used" + (f"; {problems[0]}" if problems else ""))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    claim_import(folder, {"lines": path.name, "sha256": digest, "images": str(images.resolve())})
    names = {f"line-{number:06d}": number for number in lines}
    first: dict[str, str] = {}  # prompt -> the line that brings it first
    for name, number in names.items():
        first.setdefault(lines[number].prompt, name)
    prompts = [Prompt(id=name, text=text) for text, name in first.items()]
    write_records(folder / "prompts.jsonl", prompts)
    taken: Counter[str] = Counter()
    index = {}
    for name, number in names.items():
        index[name] = taken[lines[number].prompt]
        taken[lines[number].prompt] += 1

    def work(batch: Mapping[str, int]) -> list[Candidate]:
        made = []
        for name, number in batch.items():
            line = lines[number]
            try:
                image = open_image(inside(images, line.bad_image_file))
            except RunError:
                continue  # named below, also where an earlier call met it
            resized = model.resized(image)
            candidate = Candidate(
                id=name,
                prompt_id=first[line.prompt],
                prompt=line.prompt,
                index=index[name],
                seed=0,
                image=f"images/{name}.png",
                latent=f"latents/{name}.safetensors",
                size=(resized.height, resized.width),
                sampling={"imported": f"{path.name}:{number}", "shows": crop_box(model, (image.height, image.width))},
            )
            save_image(resized, folder / candidate.image)
            with atomic(folder / candidate.latent) as partial:
                save_file({"latent": model.encode([resized])[0].contiguous()}, partial)
            made.append(candidate)
        return made

    candidates = run_stage(folder, "candidates", Candidate, names, BATCH, work, gaps=True)
    records = [_records(candidate, lines[names[candidate.id]]) for candidate in candidates]
    write_records(folder / "regions.jsonl", [grounding for grounding, _ in records])
    write_records(folder / "judgements.jsonl", [judgement for _, judgement in records])
    made = {candidate.id for candidate in candidates}
    left_out = [number for name, number in names.items() if name not in made]
    problems += [
        f"{path}:{number}: bad_image_file: {fault(images, lines[number].bad_image_file)}" for number in left_out
    ]
    return len(candidates), problems


def claim_import(folder: Path, source: Mapping[str, str]) -> None:
    """Keep in a round what it is imported from, in ``imported.json``. Raises RunError where it holds another import, or
    a rollout."""
    held = folder / "imported.json"
    if not held.exists() and not (folder / "prompts.jsonl").exists():
        write_json(held, source)
    elif not held.exists() or read_json(held) != source:
        raise RunError(f"{folder} holds another round; choose another folder")


def fault(images: Path, name: str) -> str:
    """Why an image was left out, in this call or an earlier one."""
    try:
        open_image(inside(images, name))
    except RunError as error:
        return str(error)
    return f"{name!r} could not be read when the round was made; import into another folder"


def _records(candidate: Candidate, line: Line) -> tuple[Grounding, Judgement]:
    """The regions of a line in pixels of the candidate, as far as they lie in its image, and what is said of them."""
    regions: list[Region] = []
    said: list[RegionJudgement] = []
    left, top, right, bottom = candidate.sampling["shows"]
    for entry in line.regions:
        moved = [value - start for value, start in zip(entry.bbox, (left, top, left, top), strict=True)]
        box = clip_box(scale_box(moved, (bottom - top, right - left), candidate.size), candidate.size)
        x0, y0, x1, y1 = box
        if x0 < x1 and y0 < y1:
            number, area = len(regions) + 1, (x1 - x0) * (y1 - y0)
            regions.append(Region(id=number, box=box, area=area, source="imported", label=entry.object))
            said.append(RegionJudgement(region_id=number, score=entry.score, reason=entry.reason, label=entry.object))
    if line.layout is None:
        layout = LayoutJudgement(score=None, failure=Failure.NO_SCORE)
    else:
        layout = LayoutJudgement(score=line.layout.score, reason=line.layout.reason)
    return (
        Grounding(candidate_id=candidate.id, regions=regions),
        Judgement(candidate_id=candidate.id, regions=said, layout=layout),
    )


def _explain(error: ValidationError) -> str:
    detail = error.errors()[0]
    field = ".".join(map(str, detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":  # ours: the message names the field within its entry
        return f"{field}.{message}" if field else message
    return f"{field or 'the line'}: {message}, got {detail['input']!r:.80}"


# --- ours to theirs


def write_lines(run: RunView, out: Path) -> tuple[int, int]:
    """Write the candidates of all rounds to ``out``; how many, and how many lack a layout or any region's score.

    Files are named from the folder of the run: ``round-000/images/train-0003-1.png``.
    """
    lines = [_line(candidate) for candidate in run.candidates()]
    complete = [line for line in lines if line is not None]
    write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in complete))
    return len(complete), len(lines) - len(complete)


def _line(candidate: CandidateView) -> dict[str, Any] | None:
    judgement = candidate.judgement
    if judgement is None or judgement.layout.score is None:
        return None
    boxes = {region.id: region for region in candidate.regions if region.id != 0}
    entries = [
        _entry(said.label or boxes[said.region_id].label or "", boxes[said.region_id].box, said.score, said.reason)
        for said in judgement.regions
        if said.region_id in boxes and said.score is not None
    ]
    if not entries:
        return None
    name = f"{candidate.folder.name}/{candidate.record.image}"
    layout = _entry(GLOBAL_ENTRY, (0, 0, 0, 0), judgement.layout.score, judgement.layout.reason)
    return {
        "prompt": candidate.record.prompt,
        "bad_image_file": name,
        "good_image_file": name,
        "vlm_rewards": [layout, *entries],
    }


def _entry(label: str, box: Iterable[float], score: float, reason: str | None) -> dict[str, Any]:
    """An entry; whole numbers are written as such."""
    bbox = [int(value) if value == int(value) else value for value in box]
    entry: dict[str, Any] = {"object": label, "bbox": bbox, "score": score}
    return entry if reason is None else entry | {"reason": reason}
