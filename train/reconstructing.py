"""Reconstruction, looked at and measured: a model draws what it sees (docs/specs/reca.md, 6)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from srum.config import RunConfig
from srum.evaluation.statistics import wilson
from srum.images import ImageError, save_image
from srum.models.base import Sampling, Segment, require
from srum.processes import Processes
from srum.records import Name, Record, RunPath
from srum.run import Run, load_model, newest_weights
from srum.run_dir import RunError, claim_settings, run_stage
from srum.seeding import seed_for
from srum.shapes.checker import parse
from srum.shapes.edits import same_things
from srum.stages.pictures import Entry, entries_of
from srum.train.methods.reca import RecaConfig, read_templates
from srum.train.tasks.base import recognised

SHOWN = 24  # pairs in the picture
USED = ("images", "refine")  # sections of the config


class Reconstruction(Record):
    """An image before and after; ``same``: whether both hold the same things in the same cells, of a scene alone."""

    id: Name
    source: str
    before: RunPath | None = None
    after: RunPath | None = None
    same: bool | None = None
    failure: str | None = None

    def files(self) -> list[str]:
        """Both images."""
        return [name for name in (self.before, self.after) if name is not None]


def reconstruct_images(config: RunConfig, out: Path, run: Run | Path | None, weights: str | None) -> str:
    """reconstructed.jsonl, images/, reconstructed.png in ``out``; a line that says how many scenes are the same.

    ``config`` is of RecA: its first template, its ``seen_size``; images have the size of the evaluation, sampled as
    ``config.refine`` says. It resumes by batches. Raises MissingAbility, and RunError where no image can be read or
    where ``out`` holds reconstructions of other settings or weights.
    """
    assert isinstance(config, RecaConfig)
    opened = Run(run, config) if isinstance(run, Path) else None
    weights = weights or (newest_weights(opened) if opened else config.model)
    model = load_model(config, weights)
    require(model, {"seen"}, "reconstructing")
    template = Segment("text", text=read_templates(config.templates)[0], droppable=True)
    sampling = Sampling(**config.refine.sampling())
    entries = entries_of(config, opened.round(0) if opened else None, 0)
    made_with = {"weights": weights, "template": template.text, "side": config.seen_size, "seed": config.seed}
    made_with |= {part: getattr(config, part).model_dump(mode="json", exclude={"batch_size"}) for part in USED}
    Processes.here().once(lambda: claim_settings(out, made_with))

    def work(batch: Mapping[str, Entry]) -> list[Reconstruction]:
        images: dict[str, Image.Image] = {}
        failed: dict[str, str] = {}
        for name, entry in batch.items():
            try:
                images[name] = entry.open()
            except ImageError as error:
                failed[name] = str(error)
        contexts = [[Segment("seen", image=image, side=config.seen_size), template] for image in images.values()]
        drawn = model.draw(contexts, sampling, [seed_for(config.seed, name, "reconstruct") for name in images])
        after = dict(zip(images, (made.image for made in drawn), strict=True))
        return [
            Reconstruction(id=name, source=entry.source, failure=failed[name])
            if name in failed
            else _keep(out, name, entry.source, images[name], after[name])
            for name, entry in batch.items()
        ]

    made = run_stage(out, "reconstructed", Reconstruction, entries, config.images.batch_size, work)
    good = [one for one in made if one.failure is None]
    if not good:
        raise RunError(f"{config.images.source}: none of {len(made)} images can be read; the first: {made[0].failure}")
    Processes.here().once(lambda: _picture(out, good[:SHOWN]))
    scenes = [one.same for one in good if one.same is not None]
    line = f"{out}: {len(good)} images reconstructed, {len(made) - len(good)} could not be read"
    if not scenes:
        return line
    share = wilson(scenes)
    return f"{line}; the same things in the same cells: {share.value:.1f}% of {len(scenes)} scenes" + (
        f" ({share.low:.1f} to {share.high:.1f})"
    )


def _keep(out: Path, name: str, source: str, before: Image.Image, after: Image.Image) -> Reconstruction:
    files = f"images/{name}-before.png", f"images/{name}-after.png"
    for image, file in zip((before, after), files, strict=True):
        save_image(image, out / file)
    return Reconstruction(id=name, source=source, before=files[0], after=files[1], same=same_scene(before, after))


def same_scene(before: Image.Image, after: Image.Image) -> bool | None:
    """Whether two pictures of the embedded world hold the same things in the same cells; None where it is no scene."""
    one, other = np.asarray(before), np.asarray(after)
    if one.shape != (64, 64, 3) or not any(not thing.stray for thing in parse(one)):
        return None
    return other.shape == one.shape and same_things(recognised(one).things, recognised(other).things)


def _picture(out: Path, made: list[Reconstruction]) -> None:
    columns = min(len(made), 8)
    pairs = [
        [Image.open(out / str(name)).convert("RGB").resize((128, 128)) for name in (one.before, one.after)]
        for one in made
    ]
    sheet = Image.new("RGB", (columns * 136, -(-len(pairs) // columns) * 272), "white")
    for number, (before, after) in enumerate(pairs):
        x, y = number % columns * 136, number // columns * 272
        sheet.paste(before, (x, y))
        sheet.paste(after, (x, y + 130))
    save_image(sheet, out / "reconstructed.png")
