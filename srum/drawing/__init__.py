"""From prompts to images: what an image is drawn from, and the planning text that a model may write first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, TypeAlias

from PIL.Image import Image
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from srum.config import ConfigError, ImageConfig
from srum.errors import first_fault
from srum.models.base import Decoding, Generated, Sampling, Segment, UnifiedModel, require
from srum.records import Prompt


@dataclass(frozen=True)
class Shot:
    """One image on the way to that of a prompt: its seed, the judge's score in [-1, 1], what the model wrote before,
    and its latent where that is known."""

    image: Image
    seed: int | None = None
    score: float | None = None
    said: str | None = None
    latent: Tensor | None = None


@dataclass(frozen=True)
class Chain:
    """The images of one prompt, each drawn after the one before it; ``kept`` is the number of the one that counts,
    ``end`` what the model said of the last one where nothing was drawn after that."""

    shots: Sequence[Shot]
    kept: int
    end: str | None = None

    @property
    def image(self) -> Image:
        """The image that counts."""
        return self.shots[self.kept].image


def checked_sampling(values: Mapping[str, Any]) -> Sampling:
    """The sampler of plain values, such as a request has; ranges are those of a config. Raises ConfigError, naming the
    field."""
    try:
        sampling = TypeAdapter(Sampling).validate_python(values)
        ImageConfig.model_validate({n: v for n, v in asdict(sampling).items() if n in ImageConfig.model_fields})
    except ValidationError as error:
        raise ConfigError(first_fault(error)) from None
    for name in ("image_guidance", "renorm_min"):
        if not isfinite(getattr(sampling, name)):
            raise ConfigError(f"{name}: expected a finite number")
    return sampling


Draw: TypeAlias = Callable[[Mapping[str, Prompt]], list[Chain]]  # the images of prompts by id


def draw_prompts(
    model: UnifiedModel,
    prompts: Sequence[str],
    sampling: Sampling,
    seeds: Sequence[int],
    plan_seeds: Sequence[int] | None = None,
    path: bool = False,
) -> list[Generated]:
    """An image of each prompt, its noise drawn by its seed; with ``plan_seeds`` after a plan that is drawn by those."""
    planned = draw_planned(model, prompts, sampling, seeds, plan_seeds or [None] * len(prompts), path)
    return [made for made, _ in planned]


def draw_planned(
    model: UnifiedModel,
    prompts: Sequence[str],
    sampling: Sampling,
    seeds: Sequence[int],
    plan_seeds: Sequence[int | None],
    path: bool = False,
) -> list[tuple[Generated, str | None]]:
    """The same with the plans, which only those images have that have a seed for one."""
    planning = {n: seed for n, seed in enumerate(plan_seeds) if seed is not None}
    asked = [prompts[n] for n in planning]
    written = write_plans(model, asked, sampling, list(planning.values())) if planning else []
    by_image = dict(zip(planning, written, strict=True))
    plans = [by_image.get(n) for n in range(len(prompts))]
    made = model.draw(contexts_of(model, prompts, plans), sampling, seeds, path=path)
    return list(zip(made, plans, strict=True))


def write_plans(model: UnifiedModel, prompts: Sequence[str], sampling: Sampling, seeds: Sequence[int]) -> list[str]:
    """The planning text that the model writes for each prompt, by its seed. Raises MissingAbility."""
    require(model, {"plan"}, "drawing after a plan")
    instruction = Segment("text", text=model.plan_instruction)
    contexts = [[instruction, Segment("text", text=prompt)] for prompt in prompts]
    return [text.text for text in model.write(contexts, Decoding(temperature=sampling.plan_temperature), seeds)]


def contexts_of(model: UnifiedModel, prompts: Sequence[str], plans: Sequence[str | None]) -> list[list[Segment]]:
    """What the image of each prompt is drawn from: the prompt, or, with a plan, the instruction to write one, the
    prompt, the plan."""
    asked = [Segment("text", text=prompt, droppable=True) for prompt in prompts]
    if all(plan is None for plan in plans):
        return [[prompt] for prompt in asked]
    instruction = Segment("text", text=model.plan_instruction)
    return [
        [prompt] if plan is None else [instruction, prompt, Segment("text", text=plan, droppable=True, written=True)]
        for prompt, plan in zip(asked, plans, strict=True)
    ]
