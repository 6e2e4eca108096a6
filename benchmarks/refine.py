"""Refinement on the embedded world: every arm on the same first images, measured by the exact checker.

    python -m benchmarks.refine --seeds 0 1 2 3 4 --out runs/refine [--arms rvr sft ...] [--set train.steps=60]

A seed is a run: one round of ``srum-tiny``'s candidates, judged by itself and paired (RvR's stages), on which the arms
are trained, each for the same steps. All arms begin with the base model's images of the evaluation's prompts. The judge
is the model's own, the same for all, since only the generation expert is trained; the checker measures, and chooses
nothing.

    base        drawn once                                  best_of    the best of 2, 3, 4 drawings, by the judge
    zero_shot   drawn again by the base model               sft        trained on the pairs' good images, drawn once
    rvr         RvR, up to three rounds with a stop rule    always     RvR once, whatever the judge says
    t2i_after   RvR's weights, drawn once                   rvr_vae    with a clean latent of the image that is seen
    rvr_edit    half of the pairs are edits of rendered     rve        edited by the base model's own instruction
                scenes
    far_start   RvR, but the image seen is of another prompt
    once_more   the base model again from the prompt alone, with the same stop rule and rounds: what seeing adds

What several arms need is made once for a seed: the first images and their scores (``OUT/seed-K/first``), the weights.
Beside the accuracy (percent, 95%, bootstrap crossed over seeds and prompts): wrong images that became right (mended)
and right ones that became wrong (broken), both in percent of all, and the denoising passes of an image. What is
finished is kept in ``OUT/seed-K/arms/ARM.json``, so that the same command goes on, and with fewer arms it prints those.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image, fromarray
from rich.table import Table

from srum.config import RefineConfig, changed, load_config
from srum.drawing import Chain, Shot
from srum.drawing.refining import Score, kept, refine
from srum.evaluation.accuracy import drawn
from srum.evaluation.compute import passes_of
from srum.evaluation.statistics import Estimate, crossed, difference
from srum.images import open_image, save_image
from srum.models.base import Segment, TrainableModel
from srum.records import Prompt
from srum.run import Run, console, load_model
from srum.run_dir import claim_run, write_json
from srum.seeding import seed_for
from srum.shapes.checker import is_right
from srum.shapes.hard_negatives import perturb
from srum.shapes.prompts import sample_prompt
from srum.shapes.render import render
from srum.shapes.scenes import sample_scene
from srum.stages.rollout import choose_prompts
from srum.train.examples import Example
from srum.train.feed import Mix, Part
from srum.train.methods.rvr import Rvr
from srum.train.refining import score_and_blame

ROUNDS = 3  # of the arms that go on
DRAWINGS = 4  # of best_of
SMALL = (  # what a seed costs: about ten minutes of a core
    "method=rvr",
    "compare=[]",
    "rounds=1",
    "prompt_count=64",
    "candidates_per_prompt=4",
    "rollout.plan=true",
    "train.steps=40",
    "train.batch_size=32",
    "train.lr=1e-4",
    "train.warmup_steps=4",
    "eval.prompts=development",
    "eval.count=48",
)


class AlignedSft(Rvr):
    """SFT on the good images of the pairs: prompt -> image."""

    name, label = "sft_aligned", "SFT on the pairs' good images"

    def examples(self, run: Run, k: int, config: Any) -> Mix:
        """Those of the mix's second kind alone, as many a step as of all kinds."""
        parts = super().examples(run, k, config).parts
        return Mix([replace(part, per_step=config.train.batch_size * (part.name == "t2i")) for part in parts])


class EditedPairs(Rvr):
    """RvR with half of its pairs from editing data: a rendered scene with an error, and the scene without it."""

    name, label = "rvr_edit", "RvR with editing pairs"

    def examples(self, run: Run, k: int, config: Any) -> Mix:
        """The first kind in two halves."""
        mix = super().examples(run, k, config)
        first, *others = mix.parts
        model = load_model(run.config, run.config.model)
        edits = [edited(model, seed_for(run.config.seed, k, "edits", n)) for n in range(len(first.examples))]
        half = first.per_step // 2
        return Mix([replace(first, per_step=first.per_step - half), Part("edits", edits, half), *others])


def edited(model: TrainableModel, seed: int) -> Example:
    """A training prompt's scene with an error is seen, the same scene without it is to be drawn."""
    rng = np.random.default_rng(seed)
    spec, prompt = sample_prompt(rng)
    scene = sample_scene(spec, rng)
    before, after = (fromarray(render(one)) for one in (perturb(scene, spec, rng), scene))
    system, user = model.refine_texts
    segments = [
        Segment("text", text=system),
        Segment("seen", image=before),
        Segment("text", text=user.format(prompt=prompt)),
        Segment("noisy", latent=model.encode([after])[0], loss=True),
    ]
    return Example(id=f"edit-{seed}", segments=segments)


TRAINED = {  # weights -> what they change in the config of a seed's run
    "rvr": (),
    "sft": ("method=benchmarks.refine:AlignedSft",),
    "rvr_vae": ("refine.way=regenerate_clean",),
    "rvr_edit": ("method=benchmarks.refine:EditedPairs",),
}


@dataclass(frozen=True)
class Ground:
    """What all arms of a seed share: prompts, models, the judge, the base model's first images and their scores."""

    run: Run
    models: dict[str, TrainableModel] = field(default_factory=dict)  # by their weights

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        config = self.run.config.eval
        return {prompt.id: prompt for prompt in choose_prompts(config.prompts, config.count, seed=0)}

    @cached_property
    def score(self) -> Score:
        """The base model's judge."""
        return score_and_blame(self.model(self.run.config.model), self.run.config, self.run.config.seed)[0]

    @cached_property
    def firsts(self) -> dict[str, Shot]:
        """Drawn by the base model, or read, in the order of the prompts."""
        folder = self.run.folder / "first"
        if not (folder / "scores.json").exists():
            images = self.draw(self.run.config.model, self.prompts)
            for name, image in zip(self.prompts, images, strict=True):
                save_image(image, folder / f"{name}.png")
            write_json(folder / "scores.json", dict(zip(self.prompts, self.score(images, self.texts), strict=True)))
        scores = json.loads((folder / "scores.json").read_text())
        return {name: Shot(open_image(folder / f"{name}.png"), score=scores[name]) for name in self.prompts}

    @cached_property
    def before(self) -> list[bool]:
        """The checker's verdicts on the first images."""
        return [is_right(self.firsts[name].image, prompt.metadata) for name, prompt in self.prompts.items()]

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts.values()]

    def config(self, **values: Any) -> RefineConfig:
        return self.run.config.refine.model_copy(update=values)

    def model(self, weights: str) -> TrainableModel:
        """Loaded once."""
        if weights not in self.models:
            self.models[weights] = load_model(self.run.config, weights)
        return self.models[weights]

    def draw(self, weights: str, prompts: Mapping[str, Prompt]) -> list[Image]:
        """An image of each prompt, as the evaluation draws, its noise seeded by its id."""
        made = drawn(self.model(weights), prompts, self.run.config.eval, self.run.config.seed)
        return [one.image for one in made]


@dataclass(frozen=True)
class Outcome:
    """An arm on a seed, per prompt: whether the image was right before and is now, and denoising passes of it."""

    before: list[bool]
    after: list[bool]
    passes: list[float]


# --- a seed


def seed_run(folder: Path, seed: int, overrides: Sequence[str]) -> Run:
    """The run of a seed. Raises RunError where the folder holds one with other values."""
    config = load_config(None, [*SMALL, *overrides, f"seed={seed}"])
    claim_run(folder, config, resume=True)
    return Run(folder, config)


def weights_of(run: Run, name: str) -> str:
    """Trained on the pairs of the run's round, which is made where it is not there, in a folder beside it."""
    from srum.fork import fork_run
    from srum.loop import perform

    config = changed(run.config, TRAINED[name])
    folder = run.folder / "trained" / name
    if not folder.exists():
        for stage in Rvr.stages:
            perform(run, stage.name, 0)
        folder.parent.mkdir(exist_ok=True)
        fork_run(run.folder, folder, "train", config, 0)
    trained = Run(folder, config)
    perform(trained, "train", 0)
    return trained.newest(1)


# --- the arms


def base(ground: Ground) -> dict[str, Outcome]:
    return {"base": outcome(ground, [Chain([first], 0) for first in ground.firsts.values()])}


def best_of(ground: Ground) -> dict[str, Outcome]:
    """The same first image, and others of other seeds."""
    further = {f"{name}+{n}": prompt for n in range(1, DRAWINGS) for name, prompt in ground.prompts.items()}
    images = ground.draw(ground.run.config.model, further)
    scores = ground.score(images, [prompt.text for prompt in further.values()])
    more = {name: Shot(image, score=score) for name, image, score in zip(further, images, scores, strict=True)}
    chains = [[first, *(more[f"{name}+{n}"] for n in range(1, DRAWINGS))] for name, first in ground.firsts.items()]
    return {f"best of {k}": outcome(ground, chains_of(chains, k, ground)) for k in range(2, DRAWINGS + 1)}


def chains_of(shots: Sequence[Sequence[Shot]], count: int, ground: Ground) -> list[Chain]:
    """The first so many of each, of which the judge keeps the best."""
    return [Chain(own[:count], kept(own[:count], ground.config())) for own in shots]


def again(
    ground: Ground, name: str, weights: str, rounds: int = 1, firsts: Sequence[Shot] | None = None, **values: Any
) -> dict[str, Outcome]:
    """Drawn again by these weights, after 1, 2, ... rounds."""
    begun = list(ground.firsts.values()) if firsts is None else list(firsts)
    wanted = ground.config(rounds=rounds, **values)
    judged = wanted.stop is not None or wanted.keep == "best"  # else no score changes anything
    score = ground.score if judged else unjudged
    seed, names = ground.run.config.seed, list(ground.prompts)
    chains = refine(ground.model(weights), score, names, ground.texts, begun, wanted, seed)
    outcomes = {}
    for k in range(1, rounds + 1):
        cut = [chain.shots[: k + 1] for chain in chains]
        made = [Chain(shots, kept(shots, wanted)) for shots in cut]
        outcomes[f"{name}, round {k}" if rounds > 1 else name] = outcome(ground, made, wanted)
    return outcomes


def unjudged(images: Sequence[Image], prompts: Sequence[str]) -> list[None]:
    """No scores."""
    return [None] * len(images)


def once_more(ground: Ground) -> dict[str, Outcome]:
    """The control: the base model draws from the prompt alone, with the same stop rule."""
    return again(ground, "prompt alone", ground.run.config.model, ROUNDS, way="prompt")


def rvr(ground: Ground) -> dict[str, Outcome]:
    return again(ground, "rvr", weights_of(ground.run, "rvr"), ROUNDS)


def always(ground: Ground) -> dict[str, Outcome]:
    """One round for every image; the last one stays."""
    return again(ground, "rvr, always", weights_of(ground.run, "rvr"), always=True, stop=None, keep="last")


def far_start(ground: Ground) -> dict[str, Outcome]:
    """What is seen is the image of the next prompt, and never kept."""
    images = list(ground.firsts.values())
    weights = weights_of(ground.run, "rvr")
    return again(ground, "rvr, far start", weights, firsts=images[1:] + images[:1], always=True, stop=None, keep="last")


def zero_shot(ground: Ground) -> dict[str, Outcome]:
    return again(ground, "zero shot", ground.run.config.model)


def rvr_vae(ground: Ground) -> dict[str, Outcome]:
    return again(ground, "rvr, clean latent", weights_of(ground.run, "rvr_vae"), way="regenerate_clean")


def rvr_edit(ground: Ground) -> dict[str, Outcome]:
    return again(ground, "rvr, editing pairs", weights_of(ground.run, "rvr_edit"))


def rve(ground: Ground) -> dict[str, Outcome]:
    return again(ground, "rve", ground.run.config.model, way="edit", guidance=1.5)


def once_by(name: str, weights: str) -> Callable[[Ground], dict[str, Outcome]]:
    """Drawn once by trained weights, with the first images' seeds."""

    def arm(ground: Ground) -> dict[str, Outcome]:
        images = ground.draw(weights_of(ground.run, weights), ground.prompts)
        return {name: outcome(ground, [Chain([Shot(image)], 0) for image in images])}

    return arm


ARMS: dict[str, Callable[[Ground], dict[str, Outcome]]] = {
    "base": base,
    "best_of": best_of,
    "once_more": once_more,
    "zero_shot": zero_shot,
    "rvr": rvr,
    "sft": once_by("sft", "sft"),
    "t2i_after": once_by("rvr, drawn once", "rvr"),
    "rve": rve,
    "always": always,
    "rvr_vae": rvr_vae,
    "rvr_edit": rvr_edit,
    "far_start": far_start,
}


def outcome(ground: Ground, chains: Sequence[Chain], config: RefineConfig | None = None) -> Outcome:
    """The checker's verdicts on the first images and on those that were kept; passes of the images on the way."""
    first, later = passes_of(ground.run.config.eval), passes_of(ground.config())
    others = later if config is not None else first
    return Outcome(
        before=ground.before,
        after=[is_right(chain.image, p.metadata) for p, chain in zip(ground.prompts.values(), chains, strict=True)],
        passes=[first + others * (len(chain.shots) - 1) for chain in chains],
    )


# --- all seeds


def measure(
    folder: Path, seeds: Sequence[int], arms: Sequence[str], overrides: Sequence[str]
) -> dict[str, list[Outcome]]:
    """The outcomes of every row, seed by seed; what is finished is read. Rows that a seed lacks are left out."""
    rows: dict[str, list[Outcome]] = {}
    for seed in seeds:
        ground = Ground(seed_run(folder / f"seed-{seed}", seed, overrides))
        for arm in arms:
            path = ground.run.folder / "arms" / f"{arm}.json"
            if not path.exists():
                write_json(path, {name: vars(one) for name, one in ARMS[arm](ground).items()})
            for name, values in json.loads(path.read_text()).items():
                rows.setdefault(name, []).append(Outcome(**values))
        console.print(table(rows))
    return rows


def table(rows: Mapping[str, Sequence[Outcome]]) -> Table:
    """A line per row: accuracy, its difference to the base in points, mended, broken, passes."""
    reference = rows["base"]
    shown = Table("arm", "accuracy, %", "against base, points", "mended", "broken", "passes", "seeds")
    for name, outcomes in rows.items():
        after = np.array([one.after for one in outcomes], dtype=float)
        before = np.array([one.before for one in outcomes], dtype=float)
        gain = difference(after, np.array([one.after for one in reference], dtype=float)[: len(after)])
        mended, broken = (100 * (x > y).mean() for x, y in ((after, before), (before, after)))
        passes = np.mean([one.passes for one in outcomes])
        cells = (
            estimate_cell(crossed(after)),
            estimate_cell(gain, "+"),
            f"{mended:.1f}",
            f"{broken:.1f}",
            f"{passes:.0f}",
        )
        shown.add_row(name, *cells, str(len(outcomes)))
    return shown


def estimate_cell(estimate: Estimate, sign: str = "") -> str:
    """A share in percent, or a difference of shares in points, and its interval."""
    estimate = estimate.times(100)
    return f"{estimate.value:{sign}.1f} ({estimate.low:{sign}.1f} to {estimate.high:{sign}.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/refine"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    options = parser.parse_args(arguments)
    arms = list(dict.fromkeys(["base", *options.arms]))
    rows = measure(options.out, options.seeds, arms, options.overrides)
    write_json(options.out / "refine.json", {name: [vars(one) for one in own] for name, own in rows.items()})


if __name__ == "__main__":
    main()
