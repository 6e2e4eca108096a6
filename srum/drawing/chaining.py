"""Chains of prompts, kept in a folder: every image, what was said between them, how each chain ended.

The folder is laid out as a round's: ``candidates.jsonl`` (each refined image names its ``parent`` and its context),
``images/``, ``latents/``; beside them ``chains.jsonl``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter
from safetensors.torch import save_file

from srum.config import RunConfig
from srum.drawing.chains import ChainSettings, ChainState, run_chains
from srum.drawing.strokes import Drawing, StrokeSettings, draw_in_strokes
from srum.images import save_image
from srum.models.base import Generated, Sampling, UnifiedModel
from srum.processes import Processes
from srum.records import Candidate, ContextPart, Name, Prompt, Record
from srum.run_dir import RunError, atomic, claim_settings, run_stage, write_records
from srum.seeding import seed_for


class ChainTurn(Record):
    """One turn: what was written and, of a reflection, what kind of reply that was; or the image that was drawn.

    Of a drawing in strokes ``draft`` and ``inspect``, and of a correction the plan that it made.
    """

    kind: Literal["plan", "draw", "reflect", "refine", "draft", "inspect"]
    text: str | None = None
    reply: Literal["edit", "stop", "failure"] | None = None
    failure: str | None = None
    candidate_id: Name | None = None


class ChainRecord(Record):
    """The chain of one prompt; ``end`` is "stop", "limit", or how its last reply failed."""

    id: Name
    prompt: str
    turns: list[ChainTurn] = Field(min_length=1)
    end: str

    @property
    def images(self) -> list[str]:
        """The ids of its images, in order."""
        return [turn.candidate_id for turn in self.turns if turn.candidate_id is not None]

    def files(self) -> list[str]:
        """All images."""
        return [f"images/{name}.png" for name in self.images]


def claim(
    folder: Path, model: str, prompts: Sequence[Prompt], settings: ChainSettings | StrokeSettings, seed: int
) -> None:
    """Make ``folder`` that of these prompts, settings and weights, or go on in it. Raises RunError where it has others,
    and where there is no prompt."""
    if not prompts:
        raise RunError("eval.count is 0: there is no prompt to draw")
    values = TypeAdapter(type(settings)).dump_python(settings, mode="json")
    asked = sha256("\0".join(prompt.text for prompt in prompts).encode()).hexdigest()
    Processes.here().once(lambda: claim_settings(folder, values | {"model": model, "seed": seed, "prompts": asked}))


def draw_chains(
    model: UnifiedModel, prompts: Sequence[Prompt], settings: ChainSettings, folder: Path, seed: int, batch_size: int
) -> list[ChainRecord]:
    """A chain of each prompt, kept in ``folder``; finished batches of an interrupted call are kept."""

    def work(batch: Mapping[str, Prompt]) -> list[ChainRecord]:
        chains = run_chains(model, [prompt.text for prompt in batch.values()], list(batch), settings, seed)
        return [_keep(folder, name, chain) for name, chain in zip(batch, chains, strict=True)]

    by_id = {prompt.id: prompt for prompt in prompts}
    records = list(run_stage(folder, "chains", ChainRecord, by_id, batch_size, work))
    candidates = [candidate for record in records for candidate in _candidates(record, settings, seed)]
    Processes.here().once(lambda: write_records(folder / "candidates.jsonl", candidates))
    return records


def draw_strokes(
    model: UnifiedModel, prompts: Sequence[Prompt], settings: StrokeSettings, folder: Path, seed: int, batch_size: int
) -> list[ChainRecord]:
    """Each prompt drawn in strokes, kept in ``folder`` as ``chains.jsonl``, ``images/``, ``latents/``."""

    def work(batch: Mapping[str, Prompt]) -> list[ChainRecord]:
        drawings = draw_in_strokes(model, [p.text for p in batch.values()], list(batch), settings, seed)
        return [_keep_strokes(folder, name, drawing) for name, drawing in zip(batch, drawings, strict=True)]

    return list(run_stage(folder, "chains", ChainRecord, {prompt.id: prompt for prompt in prompts}, batch_size, work))


def _keep_strokes(folder: Path, name: str, drawing: Drawing) -> ChainRecord:
    _keep_images(folder, name, drawing.images)
    turns, number = list[ChainTurn](), 0
    for stage in drawing.stages:
        if stage.read is not None:
            turns.append(ChainTurn(kind=stage.kind, text=stage.read.raw, failure=stage.read.failure))
        else:
            turns.append(ChainTurn(kind=stage.kind, text=stage.asked, candidate_id=f"{name}-{number}"))
            number += 1
    return ChainRecord(id=name, prompt=drawing.prompt, turns=turns, end=drawing.end or "limit")


def _keep_images(folder: Path, name: str, images: Sequence[Generated]) -> None:
    for number, made in enumerate(images):
        save_image(made.image, folder / "images" / f"{name}-{number}.png")
        with atomic(folder / "latents" / f"{name}-{number}.safetensors") as partial:
            save_file({"latent": made.latent.contiguous()}, partial)


def _keep(folder: Path, name: str, chain: ChainState) -> ChainRecord:
    _keep_images(folder, name, chain.images)
    turns = [] if chain.plan is None else [ChainTurn(kind="plan", text=chain.plan.text)]
    turns.append(ChainTurn(kind="draw", candidate_id=f"{name}-0"))
    for number, reply in enumerate(chain.replies, 1):
        turns.append(ChainTurn(kind="reflect", text=reply.raw, reply=reply.kind, failure=reply.failure))
        if reply.kind == "edit":
            turns.append(ChainTurn(kind="refine", text=reply.instruction, candidate_id=f"{name}-{number}"))
    return ChainRecord(id=name, prompt=chain.prompt, turns=turns, end=chain.end or "limit")


def _candidates(record: ChainRecord, settings: ChainSettings, seed: int) -> list[Candidate]:
    """The images as candidates, each the child of the one before it."""
    plan = next((turn.text for turn in record.turns if turn.kind == "plan"), None)
    edits = [turn.text for turn in record.turns if turn.kind == "refine"]
    candidates = []
    for number, name in enumerate(record.images):
        parent = record.images[number - 1] if number else None
        shown = [ContextPart(kind=kind, candidate_id=parent) for kind in ("clean", "seen")] if parent else []
        told = [ContextPart(kind="text", text=edits[number - 1])] if parent else []
        candidates.append(
            Candidate(
                id=name,
                prompt_id=record.id,
                prompt=record.prompt,
                index=number,
                seed=seed_for(seed, record.id, number, "refine" if number else "draw"),
                plan=None if number else plan,
                image=f"images/{name}.png",
                latent=f"latents/{name}.safetensors",
                size=settings.drawing.size,
                parent=parent,
                context=[*shown, *told],
            )
        )
    return candidates


def samplings(config: RunConfig, edit_guidance: float) -> tuple[Sampling, Sampling]:
    """How a first image is drawn, as in the evaluation, and how one that is changed; ``edit_guidance`` is by text."""
    drawing = Sampling(**config.eval.sampling())
    return drawing, replace(drawing, guidance=edit_guidance, guidance_interval=(0.0, 1.0))
