"""RecA, reconstruction alignment (docs/specs/reca.md): the model sees an image and has to draw it. No caption.

    stages    IMAGES     (+ ROLLOUT GROUND JUDGE RASTERIZE where the images, or what is mixed in, are the round's own)
    examples  [seen image, template, noisy: the same image]                 the template is drawn anew at every visit
    loss      error              there is no other: the reconstruction is in the layout of the example      (Eq. 2)

What is seen must be too coarse to copy: ``seen_size``. With ``train.trainable=generation`` understanding stays as it
was, bit for bit; the gradient is the true one, where the released code cuts it at the markers of the noisy image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from srum.config import Count, RunConfig
from srum.errors import SrumError
from srum.stages import GROUND, IMAGES, JUDGE, RASTERIZE, ROLLOUT, Stage
from srum.train.methods.base import Method, check_mix, weighted_error
from srum.train.objective import Terms, Tokens

if TYPE_CHECKING:
    from srum.models.base import Segment
    from srum.records import Picture
    from srum.run import Run
    from srum.train.examples import Example
    from srum.train.feed import Mix

TEMPLATES = {name: Path(__file__).parents[1] / "templates" / f"{name}.txt" for name in ("full", "tiny")}
OF_THE_ROUND = (ROLLOUT, GROUND, JUDGE, RASTERIZE)
COMPARED = 16  # pictures whose losses are told before the first step
SEEN, TOLD = "what is seen", "a text alone"
FAR = 1.25  # what is seen, over a text alone: a model that had never drawn what it sees stood at 1.4 (spec, 10)
HINDERED = (
    "what is seen makes these images harder to draw, not easier; they may be unlike what the model draws, or it has "
    "never drawn what it sees, and text to image may suffer: other images.source, mix=[1,1,0], a lower train.lr"
)
Share = Annotated[int, Field(ge=0)]


class TemplateError(SrumError, ValueError):
    """A file of templates that cannot be used; the message names the line."""


class RecaConfig(RunConfig):
    """What is seen, and what is mixed in."""

    method: str = "reca"
    templates: str = "tiny"  # full (60 and more), tiny (srum-tiny's), or a text file with one a line
    template_count: Count | None = None  # the first so many of them; null: all
    seen_size: Count | None = None  # the longest side of what is seen, 224 for BAGEL; null: the model's own rule
    condition: Literal["seen", "clean"] = "seen"  # clean: its latent in place of what is seen (ablation)
    mix: tuple[Count, Share, Share] = (1, 0, 0)  # of a batch: reconstruction : text to image : the judge's replies

    @model_validator(mode="after")
    def _can_be_mixed(self) -> RecaConfig:
        check_mix(self, self.mix)
        return self


class Reca(Method):
    """Reconstruction alignment."""

    name, label, colour = "reca", "RecA", "#009e73"
    Config = RecaConfig
    stages = (IMAGES,)
    needs = frozenset({"train", "seen"})

    def stages_of(self, config: RecaConfig) -> Sequence[Stage]:
        """The images alone, or the round's candidates before them."""
        own = config.images.source in ("candidates", "good") or any(config.mix[1:])
        return (*OF_THE_ROUND, IMAGES) if own else self.stages

    def examples(self, run: Run, k: int, config: RecaConfig) -> Mix:
        """The pictures that could be read, and the shares of the round's candidates and replies; beside them the first
        pictures, as they are learned and from a text alone. Of a prompt that is held out no image is learned."""
        import torch

        from srum.records import Candidate
        from srum.run_dir import read_by_id
        from srum.train.data import candidate_examples, load_replies, load_training_records
        from srum.train.examples import hold_out
        from srum.train.feed import Mix

        folder = run.round(k)
        own = config.images.source in ("candidates", "good")
        candidates = read_by_id(folder / "candidates.jsonl", Candidate) if own else {}
        prompts = {name: candidate.prompt for name, candidate in candidates.items()}
        groups = {name: candidate.prompt_id for name, candidate in candidates.items()}
        pictures = reconstructions(folder, config, groups)
        training, held_out = hold_out(pictures, config.train.validation.share, run.seed(k, "train"))
        kinds: dict[str, Sequence[Example]] = {"": training, "t2i": (), "replies": ()}
        if config.mix[1]:
            aside = {example.group for example in held_out}
            records = [one for one in load_training_records(folder) if one.candidate.prompt_id not in aside]
            kinds["t2i"] = candidate_examples(records, [torch.ones(())] * len(records))
        if config.mix[2]:
            kinds["replies"] = load_replies(folder, config.judge.instructions)
        shares = dict(zip(kinds, config.mix, strict=True))
        compared = {SEEN: pictures[:COMPARED], TOLD: [told(one, prompts) for one in pictures[:COMPARED]]}
        return Mix(Mix.of_shares(kinds, shares, config.train.batch_size).parts, held_out, compared)

    def remark(self, losses: Mapping[str, float]) -> str:
        """Both losses, and a warning where what is seen is a hindrance."""
        line = f"before the first step: loss {losses[SEEN]:.3f} with {SEEN}, {losses[TOLD]:.3f} with {TOLD}"
        return f"{line}; warning: {HINDERED}" if losses[SEEN] > FAR * losses[TOLD] else line

    def terms(self, tokens: Tokens, config: RecaConfig) -> Terms:
        """The error itself."""
        return weighted_error(tokens, config)


def reconstructions(folder: Path, config: RecaConfig, groups: Mapping[str, str]) -> list[Example]:
    """An example of each picture of the round, in its group of ``groups`` or alone. Raises TemplateError."""
    from srum.records import Picture
    from srum.run_dir import read_records
    from srum.train.examples import Example

    templates = read_templates(config.templates)[: config.template_count]
    pictures = [one for one in read_records(folder / "pictures.jsonl", Picture) if one.failure is None]
    return [
        Example(id=one.id, group=groups.get(one.id, one.id), segments=layout(folder, one, templates, config))
        for one in pictures
    ]


def told(example: Example, prompts: Mapping[str, str]) -> Example:
    """Text to image of the same picture, with the same noise: from its prompt where it has one, else the template."""
    from srum.models.base import Segment

    condition, template, noisy = example.segments
    prompt = prompts.get(example.id)
    text = template if prompt is None else Segment("text", text=prompt)
    return replace(example, segments=[replace(condition, dropped=True), text, noisy])


def layout(folder: Path, picture: Picture, templates: Sequence[str], config: RecaConfig) -> list[Segment]:
    """[seen image][template, droppable][noisy, loss]: the seen image is never dropped."""
    from srum.models.base import Segment

    assert picture.seen is not None and picture.latent is not None
    condition = Segment("clean", file=folder / picture.latent)
    if config.condition == "seen":
        condition = Segment("seen", image=folder / picture.seen, side=config.seen_size)
    noisy = Segment("noisy", file=folder / picture.latent, loss=True)
    return [condition, Segment("text", texts=templates, droppable=True), noisy]


def read_templates(name: str) -> list[str]:
    """The templates of a shipped list or of a text file, one a line; blank lines are passed over.

    Raises TemplateError for a file that cannot be read, that has none, and that has one twice.
    """
    path = TEMPLATES.get(name, Path(name))
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise TemplateError(
            f"templates: cannot read {path}: {error.strerror}; or give {' or '.join(TEMPLATES)}"
        ) from None
    except UnicodeDecodeError as error:
        raise TemplateError(f"templates: {path} is not UTF-8 at byte {error.start}") from None
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if line and (first := numbers.setdefault(line, number)) != number:
            raise TemplateError(f"templates: {path}:{number} repeats line {first}; keep one of them")
    if not numbers:
        raise TemplateError(f"templates: {path} has none; write one a line")
    return list(numbers)
