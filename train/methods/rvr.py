"""RvR, refinement via regeneration (docs/specs/rvr.md): the model draws again what it sees that it has missed.

    stages    ROLLOUT GROUND JUDGE RASTERIZE PAIR
    examples  [SYSTEM, seen: the candidate that misses, USER(prompt), noisy: the one that meets it]
              + [prompt, noisy] of the latter, + [seen, question, reply] of the judge, in the shares ``mix``
    loss      |v - u|^2 + 0.25 CE                            0.25: train.text_weight                      (Eq. 9)
    draw      once, then again while the model's own judge finds fault (``refine``)

The two images are independent of one another, so that nothing has to be preserved; no instruction is written. What the
model is trained on is what it draws from: the texts around the image are the model's own (``refine_texts``), and
``refine.way=regenerate_clean`` puts a clean latent before the seen image in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from srum.config import Count, NotNegative, RunConfig, TrainConfig
from srum.stages import GROUND, JUDGE, PAIR, RASTERIZE, ROLLOUT
from srum.train.methods.base import Method, check_mix, weighted_error
from srum.train.objective import Terms, Tokens

if TYPE_CHECKING:
    from srum.drawing import Draw
    from srum.models.base import TrainableModel
    from srum.records import Candidate, Pair
    from srum.run import Run
    from srum.train.examples import Example
    from srum.train.feed import Mix

Share = Annotated[int, Field(ge=0)]


class RvrTrain(TrainConfig):
    """Texts count a quarter (Eq. 9)."""

    text_weight: NotNegative = 0.25


class RvrConfig(RunConfig):
    """What is mixed in, and what drops."""

    method: str = "rvr"
    train: RvrTrain = RvrTrain()
    mix: tuple[Count, Share, Share] = (1, 1, 0)  # refinement : text to image : replies; 2 : 1 : 1 in the paper
    droppable: bool = (
        False  # drop the prompt and what is seen, for guidance, as train.text_dropout and image_dropout say
    )

    @model_validator(mode="after")
    def _can_be_mixed(self) -> RvrConfig:
        if self.candidates_per_prompt < 2:
            raise ValueError("candidates_per_prompt: rvr pairs two candidates of a prompt; it needs at least 2")
        if self.refine.way not in ("regenerate", "regenerate_clean"):
            raise ValueError(f"refine.way: rvr is trained to draw again, not to {self.refine.way}; use regenerate")
        check_mix(self, self.mix)
        return self


class Rvr(Method):
    """Refinement via regeneration."""

    name, label, colour = "rvr", "RvR", "#d55e00"
    Config = RvrConfig
    stages = (ROLLOUT, GROUND, JUDGE, RASTERIZE, PAIR)
    needs = frozenset({"train", "seen"})

    def examples(self, run: Run, k: int, config: RvrConfig) -> Mix:
        """The pairs, their good images from the prompt alone, the judge's replies."""
        from srum import models
        from srum.records import Candidate, Pair
        from srum.run_dir import read_by_id, read_records
        from srum.train.data import load_replies
        from srum.train.examples import hold_out
        from srum.train.feed import Mix

        folder = run.round(k)
        candidates = read_by_id(folder / "candidates.jsonl", Candidate)
        pairs = read_records(folder / "pairs.jsonl", Pair)
        model = models.load(run.config.model, run.config.device, empty=True)  # it only knows its texts
        texts = (config.refine.system or model.refine_texts[0], model.refine_texts[1])
        refinements = [refinement(run, k, pair, candidates, texts, config) for pair in pairs]
        training, held_out = hold_out(refinements, config.train.validation.share, run.seed(k, "train"))
        aside = {example.group for example in held_out}
        t2i = [one for one in text_to_image(run, k, pairs, candidates) if one.group not in aside]
        replies = load_replies(run.round(k), config.judge.instructions) if config.mix[2] else ()
        kinds: dict[str, Sequence[Example]] = {"": training, "t2i": t2i, "replies": replies}
        shares = dict(zip(kinds, config.mix, strict=True))
        return Mix(Mix.of_shares(kinds, shares, config.train.batch_size).parts, held_out)

    def terms(self, tokens: Tokens, config: RvrConfig) -> Terms:
        """The error itself."""
        return weighted_error(tokens, config)

    def draw(self, model: TrainableModel, config: Any, seed: int) -> Draw:
        """As the evaluation draws, then again as ``refine`` says, scored by the model itself."""
        from srum.train.refining import drawn_again

        return drawn_again(model, config, seed)


def refinement(
    run: Run, k: int, pair: Pair, candidates: Mapping[str, Candidate], texts: tuple[str, str], config: RvrConfig
) -> Example:
    """[SYSTEM][seen: misaligned][USER][noisy: aligned, loss]; with the clean latent of what is seen before it."""
    from srum.models.base import Segment
    from srum.train.examples import Example

    folder, (system, user) = run.round(k), texts
    bad, good = candidates[pair.misaligned], candidates[pair.aligned]
    clean = [Segment("clean", file=folder / bad.latent, droppable=config.droppable)]
    segments = [
        Segment("text", text=system),
        *(clean if config.refine.way == "regenerate_clean" else []),
        Segment("seen", image=folder / bad.image, droppable=config.droppable),
        Segment("text", text=user.format(prompt=pair.prompt), droppable=config.droppable),
        Segment("noisy", file=folder / good.latent, loss=True),
    ]
    return Example(id=pair.id, group=pair.prompt_id, segments=segments)


def text_to_image(run: Run, k: int, pairs: Sequence[Pair], candidates: Mapping[str, Candidate]) -> list[Example]:
    """[prompt, droppable][noisy] of the aligned candidates and of those that are alone with their prompt, as the
    text-to-image rows of an import are."""
    from srum.models.base import Segment
    from srum.train.examples import Example

    siblings: dict[str, list[str]] = {}
    for name, candidate in candidates.items():
        siblings.setdefault(candidate.prompt_id, []).append(name)
    alone = [names[0] for names in siblings.values() if len(names) == 1]
    chosen = [candidates[name] for name in dict.fromkeys([*(pair.aligned for pair in pairs), *alone])]
    return [
        Example(
            id=one.id,
            group=one.prompt_id,
            segments=[
                Segment("text", text=one.prompt, droppable=True),
                Segment("noisy", file=run.round(k) / one.latent, loss=True),
            ],
        )
        for one in chosen
    ]
