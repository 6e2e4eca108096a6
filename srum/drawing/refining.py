"""Drawing again: what is drawn after an image that the model has seen, and when to stop (docs/specs/rvr.md, 5).

    regenerate        full = [SYSTEM][seen][USER]     no text = [SYSTEM][seen]     no image = [SYSTEM][USER]
    regenerate_clean  with the clean latent of the image before what is seen of it
    edit              RvE: the model first says what must change; [clean][seen][what it said]
    infill            [prompt]: the cells that are blamed are drawn anew, all others stay as they are (ability infill)
    prompt            [prompt]: the control, which sees nothing of the image

The output has the size of the image. A round's noise is seeded by the run's seed, the image's id and the round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from PIL.Image import Image
from torch import Tensor

from srum.config import RefineConfig
from srum.drawing import Chain, Shot
from srum.models.base import Decoding, Sampling, Segment, UnifiedModel, require, to_edit
from srum.seeding import seed_for

Score: TypeAlias = Callable[[Sequence[Image], Sequence[str]], Sequence[float | None]]
# Of images and their prompts the reward maps (h, w) in [-1, 1] on the latent grid, None where there is none.
Blame: TypeAlias = Callable[[Sequence[Image], Sequence[str]], Sequence[Tensor | None]]
REPLY = Decoding(max_tokens=128)  # of what must change


def refine(
    model: UnifiedModel,
    score: Score,
    names: Sequence[str],
    prompts: Sequence[str],
    firsts: Sequence[Shot],
    config: RefineConfig,
    seed: int,
    blame: Blame | None = None,
) -> list[Chain]:
    """Each first image and what was drawn after it; ``names`` seed the noise.

    ``score`` says in [-1, 1] how well images meet their prompts, None where it cannot; a first image with a score keeps
    it. Only those are drawn again that score less than ``config.stop``. What is kept is the best of a chain by that
    score, of equal ones the earlier. ``blame`` says for the way ``infill`` what is drawn anew: where its map is below
    0, or all, where it is nowhere or there is none. Raises MissingAbility.
    """
    needs: dict[str, set[str]] = {"edit": {"edit"}, "infill": {"infill"}, "prompt": set()}
    require(model, needs.get(config.way, {"seen"}), f"drawing an image again by {config.way}")
    begun = list(firsts)
    if unscored := [i for i, one in enumerate(firsts) if one.score is None]:
        scores = _scored(score, [firsts[i] for i in unscored], [prompts[i] for i in unscored])
        for i, value in zip(unscored, scores, strict=True):
            begun[i] = replace(firsts[i], score=value)
    chains = [[one] for one in begun]
    active = [i for i, (first,) in enumerate(chains) if config.always or not _good(first, config)]
    for number in range(1, config.rounds + 1):
        if not active:
            break
        texts, last = [prompts[i] for i in active], [chains[i][-1] for i in active]
        seeds = [seed_for(seed, names[i], "refine", number) for i in active]
        drawn = _again(model, last, texts, config, seeds, blame)
        for i, shot, value in zip(active, drawn, _scored(score, drawn, texts), strict=True):
            chains[i].append(replace(shot, score=value))
        active = [i for i in active if not _good(chains[i][-1], config)]
    return [Chain(shots, kept(shots, config)) for shots in chains]


def _scored(score: Score, shots: Sequence[Shot], prompts: Sequence[str]) -> Sequence[float | None]:
    return score([shot.image for shot in shots], prompts)


def _good(shot: Shot, config: RefineConfig) -> bool:
    return config.stop is not None and shot.score is not None and shot.score >= config.stop


def kept(shots: Sequence[Shot], config: RefineConfig) -> int:
    """The number of the image that stays: the best by the judge, or the last drawn."""
    return best_of([shot.score for shot in shots]) if config.keep == "best" else len(shots) - 1


def best_of(scores: Sequence[float | None]) -> int:
    """The place of the highest score, of equal ones the first; what could not be judged comes last."""
    return max(range(len(scores)), key=lambda i: (-2.0 if (score := scores[i]) is None else score, -i))


def _again(
    model: UnifiedModel,
    shots: Sequence[Shot],
    prompts: Sequence[str],
    config: RefineConfig,
    seeds: Sequence[int],
    blame: Blame | None,
) -> list[Shot]:
    """One image after each."""
    sampling = Sampling(**config.sampling())
    if config.way == "infill":
        return _infilled(model, shots, prompts, sampling, seeds, blame)
    seen = [shot.image for shot in shots]
    sizes = [model.resized(image).size[::-1] for image in seen]
    if config.way == "edit":
        return _edited(model, seen, prompts, sampling, seeds, sizes)
    contexts = [refine_context(model, *one, config) for one in zip(seen, prompts, strict=True)]
    made = model.draw(contexts, sampling, seeds, sizes=sizes)
    return [Shot(one.image, seed) for one, seed in zip(made, seeds, strict=True)]


def _infilled(
    model: UnifiedModel,
    shots: Sequence[Shot],
    prompts: Sequence[str],
    sampling: Sampling,
    seeds: Sequence[int],
    blame: Blame | None,
) -> list[Shot]:
    """The cells that are blamed drawn anew; of an image without a latent that of the image as it is."""
    if blame is None:
        raise ValueError("the way infill needs to know what is to be blamed")
    filling: Any = model
    resized = [model.resized(shot.image) for shot in shots]
    latents = [
        model.encode([image])[0] if shot.latent is None else shot.latent
        for shot, image in zip(shots, resized, strict=True)
    ]
    grids = [model.latent_grid((image.height, image.width)) for image in resized]
    maps = blame([shot.image for shot in shots], prompts)
    holes = [holes_of(rewards, grid) for rewards, grid in zip(maps, grids, strict=True)]
    contexts = [[Segment("text", text=prompt, droppable=True)] for prompt in prompts]
    made = filling.infill(contexts, latents, holes, sampling, seeds)
    return [Shot(one.image, seed, latent=one.latent) for one, seed in zip(made, seeds, strict=True)]


def holes_of(rewards: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """What of a ``grid`` (h, w) is drawn anew, bool: where the rewards are below 0, or all of it."""
    if rewards is None or not (rewards < 0).any():
        return torch.ones(grid, dtype=torch.bool)
    return rewards < 0


def refine_context(model: UnifiedModel, image: Image, prompt: str, config: RefineConfig) -> list[Segment]:
    """What an image is drawn again from. Guidance leaves out the user's text alone, or the image alone."""
    if config.way == "prompt":
        return [Segment("text", text=prompt, droppable=True)]
    system, user = model.refine_texts
    resized = model.resized(image)
    clean = [Segment("clean", latent=model.encode([resized])[0])] if config.way == "regenerate_clean" else []
    return [
        Segment("text", text=config.system or system),
        *clean,
        Segment("seen", image=resized),
        Segment("text", text=user.format(prompt=prompt), droppable=True),
    ]


def _edited(
    model: UnifiedModel,
    seen: Sequence[Image],
    prompts: Sequence[str],
    sampling: Sampling,
    seeds: Sequence[int],
    sizes: Sequence[tuple[int, int]],
) -> list[Shot]:
    """RvE: what must change, in the model's words, then the image with that changed; as it is where nothing must."""
    asked = [
        [Segment("seen", image=image), Segment("text", text=model.reflect_question.format(prompt=prompt))]
        for image, prompt in zip(seen, prompts, strict=True)
    ]
    told = [(reply.text.strip().splitlines() or [""])[-1] for reply in model.write(asked, REPLY, seeds)]
    wanted = [i for i, said in enumerate(told) if said and said != model.reflect_stop]
    contexts = [[*to_edit(model, seen[i])[0], Segment("text", text=told[i], droppable=True)] for i in wanted]
    made = model.draw(contexts, sampling, [seeds[i] for i in wanted], sizes=[sizes[i] for i in wanted])
    changed = dict(zip(wanted, made, strict=True))
    return [Shot(changed[i].image if i in changed else image, seeds[i], said=told[i]) for i, image in enumerate(seen)]
