"""Refinement by the model's own judge: the score of an image, how an evaluation draws, and ``srum refine``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL.Image import Image
from torch import Tensor

from srum.config import RunConfig
from srum.drawing import Chain, Draw, Shot
from srum.drawing.refining import Blame, Score, best_of, refine
from srum.evaluation.accuracy import CheckedImage, drawn
from srum.grounding.stage import load_proposer
from srum.images import ImageError, image_size, open_image, save_image
from srum.judging.stage import load_judging
from srum.models.base import TrainableModel
from srum.processes import Processes
from srum.records import Candidate, Grounding, Judgement, Prompt, Refinement, Turn
from srum.run import Run, console, load_model
from srum.run_dir import RunError, claim_settings, finished, read_records, run_stage
from srum.seeding import seed_for
from srum.shapes.checker import is_right
from srum.shapes.prompts import is_checkable
from srum.stages.reward_map import Skipped, rasterize, reason_to_skip, sample_score
from srum.stages.rollout import choose_prompts
from srum.tensors import read_tensor

ImageJudge = Callable[
    [Sequence[Image], Sequence[str], Sequence[Mapping[str, Any]]], list[tuple[Grounding, Judgement]]
]  # of images, their prompts, the prompts' metadata


def image_judge(model: TrainableModel, config: RunConfig, seed: int) -> ImageJudge:
    """Images grounded and judged as a round's candidates are."""
    propose, judge = load_proposer(config, model), load_judging(config, model, seed)

    def judged(
        images: Sequence[Image], prompts: Sequence[str], facts: Sequence[Mapping[str, Any]]
    ) -> list[tuple[Grounding, Judgement]]:
        proposed = propose(images, prompts)
        said = judge(images, prompts, facts, [regions for regions, _ in proposed])
        return [
            (
                Grounding(candidate_id="image", regions=regions, error=error),
                Judgement(candidate_id="image", regions=of_regions, layout=layout),
            )
            for (regions, error), (of_regions, layout) in zip(proposed, said, strict=True)
        ]

    return judged


def score_and_blame(model: TrainableModel, config: RunConfig, seed: int) -> tuple[Score, Blame]:
    """Scores in [-1, 1] as a round's candidates get them, grounded, judged, the lowest of regions and layout; and their
    reward maps, for which images are judged once more."""
    judge, rules = image_judge(model, config, seed), config.reward.signed_rules()

    def score(images: Sequence[Image], prompts: Sequence[str]) -> list[float | None]:
        return [
            None if reason_to_skip(grounding, judgement, config.reward.on_failure) else sample_score(judgement)
            for grounding, judgement in judge(images, prompts, [{}] * len(images))
        ]

    def blame(images: Sequence[Image], prompts: Sequence[str]) -> list[Tensor | None]:
        said = judge(images, prompts, [{}] * len(images))
        drawn = [as_candidate(image) for image in images]
        made = [
            rasterize(one, *judged, model.latent_grid(one.size), **rules)
            for one, judged in zip(drawn, said, strict=True)
        ]
        return [None if isinstance(one, Skipped) else one[0] for one in made]

    return score, blame


def as_candidate(image: Image) -> Candidate:
    """What the rasterizer asks of an image that is no round's."""
    return Candidate(
        id="image",
        prompt_id="image",
        prompt="image",
        index=0,
        seed=0,
        size=(image.height, image.width),
        image="image.png",
        latent="image.safetensors",
    )


def drawn_again(model: TrainableModel, config: RunConfig, seed: int) -> Draw:
    """Images of prompts as the evaluation draws them, the same first ones, then again as ``config.refine`` says."""
    score, blame = score_and_blame(model, config, seed_for(seed, "refine", "judge"))

    def draw(prompts: Mapping[str, Prompt]) -> list[Chain]:
        firsts = [Shot(made.image, latent=made.latent) for made in drawn(model, prompts, config.eval, seed)]
        texts = [prompt.text for prompt in prompts.values()]
        return refine(model, score, list(prompts), texts, firsts, config.refine, seed, blame)

    return draw


@dataclass(frozen=True)
class Item:
    """An image of a run that may be drawn again, and what the checker would ask of it, where it can; the file of its
    latent, where there is one."""

    prompt: str
    image: Path
    metadata: Mapping[str, Any]
    latent: Path | None = None

    def shot(self, image: Image) -> Shot:
        """It as the first of a chain."""
        return Shot(image, latent=None if self.latent is None else read_tensor(self.latent))


def refine_run(run: Run, place: Path, weights: str, config: RunConfig) -> list[Refinement]:
    """refined/ in ``place``, a round's folder or that of an evaluated arm: its images, drawn again by ``weights``.

    refined.jsonl has every image of a chain with its seed and score; it resumes by batches. An image that cannot be
    read is left out, and counted. Raises RunError where none can be read, and where the folder holds refinements of
    other settings or weights.
    """
    folder, processes = place / "refined", Processes.here()
    items = items_of(run, place)
    wanted = {"weights": weights, "refine": config.refine.model_dump(mode="json", exclude={"batch_size"})}
    processes.once(lambda: claim_settings(folder, wanted))
    if finished(folder, "refined"):
        return read_records(folder / "refined.jsonl", Refinement)
    if not any(_readable(item.image) for item in items.values()):
        raise RunError(f"{place}: none of its {len(items)} images can be read; make them again, then refine")
    model = load_model(run.config, weights)
    score, blame = score_and_blame(model, config, run.seed("refine", "judge"))

    def work(batch: Mapping[str, Item]) -> list[Refinement]:
        opened = {name: image for name, item in batch.items() if (image := _readable(item.image)) is not None}
        texts = [batch[name].prompt for name in opened]
        firsts = [batch[name].shot(image) for name, image in opened.items()]
        chains = refine(model, score, list(opened), texts, firsts, config.refine, run.config.seed, blame)
        return [_keep(folder, *one) for one in zip(opened, texts, chains, strict=True)]

    made = list(run_stage(folder, "refined", Refinement, items, config.refine.batch_size, work, gaps=True))
    if processes.rank == 0 and (lost := len(items) - len(made)):
        console.print(f"{folder}: {lost} of {len(items)} images could not be read and were left out")
    return made


def items_of(run: Run, place: Path) -> dict[str, Item]:
    """The images in a round's folder or in that of an evaluated arm. Raises RunError where there are none yet."""
    if (place / "verdicts.jsonl").exists():
        asked = {prompt.id: prompt for prompt in choose_prompts(run.config.eval.prompts, run.config.eval.count, 0)}
        verdicts = read_records(place / "verdicts.jsonl", CheckedImage)
        return {v.prompt_id: Item(v.prompt, place / v.files()[0], asked[v.prompt_id].metadata) for v in verdicts}
    candidates = read_records(place / "candidates.jsonl", Candidate)
    prompts = {prompt.id: prompt for prompt in read_records(place / "prompts.jsonl", Prompt)}
    return {c.id: Item(c.prompt, place / c.image, prompts[c.prompt_id].metadata, place / c.latent) for c in candidates}


def refinement_rows(items: Mapping[str, Item], place: Path, made: Sequence[Refinement]) -> list[dict[str, Any]]:
    """After 0, 1, ... rounds: the share that was drawn again, the judge's mean score, and where the checker can tell
    the accuracy, wrong images made right (mended) and right ones made wrong (broken), in percent of all."""
    longest = max((len(one.turns) for one in made), default=1)
    folder = place / "refined"
    checkable = bool(made) and all(_is_checkable(folder, items[one.id], one) for one in made)
    right = [_verdicts(folder, items[one.id], one) for one in made] if checkable else []
    rows = []
    for number in range(longest):
        stays = [kept_of(one.turns[: number + 1], whole=number + 1 >= len(one.turns), kept=one.kept) for one in made]
        scores = [s for one, i in zip(made, stays, strict=True) if (s := one.turns[i].score) is not None]
        row: dict[str, Any] = {
            "round": number,
            "drawn again, %": 100 * fmean(len(one.turns) > number > 0 for one in made),
        }
        row |= {"mean score": fmean(scores) if scores else None}
        if checkable:
            before, after = [own[0] for own in right], [own[i] for own, i in zip(right, stays, strict=True)]
            row |= {
                "right, %": 100 * fmean(after),
                "mended, %": 100 * fmean(a and not b for a, b in zip(after, before, strict=True)),
                "broken, %": 100 * fmean(b and not a for a, b in zip(after, before, strict=True)),
            }
        rows.append(row)
    return rows


def kept_of(turns: Sequence[Turn], whole: bool, kept: int) -> int:
    """The number of the image that stays after these turns: the recorded one after all, else the best so far."""
    return kept if whole else best_of([turn.score for turn in turns])


def _is_checkable(folder: Path, item: Item, made: Refinement) -> bool:
    width, height = image_size(folder / made.turns[0].image)
    return is_checkable(item.metadata, (height, width))


def _verdicts(folder: Path, item: Item, made: Refinement) -> list[bool]:
    return [is_right(open_image(folder / turn.image), item.metadata) for turn in made.turns]


def _readable(path: Path) -> Image | None:
    try:
        return open_image(path)
    except ImageError:
        return None


def _keep(folder: Path, name: str, prompt: str, chain: Chain) -> Refinement:
    turns = []
    for number, shot in enumerate(chain.shots):
        image = f"images/{name}-{number}.png"
        save_image(shot.image, folder / image)
        turns.append(Turn(image=image, seed=shot.seed, score=shot.score, said=shot.said))
    return Refinement(id=name, prompt=prompt, turns=turns, kept=chain.kept)
