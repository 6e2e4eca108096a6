"""Reinforcement on the embedded world: what policy gradients change in drawing, refining and understanding.

    python -m benchmarks.reinforce --seeds 0 1 2 --out runs/reinforce [--arms r3 flow_grpo ...] [--steps 12] [--set ...]

An arm of a seed is a training from ``srum-tiny`` with as many images drawn as every other. Prompts are bare but for
``reason``: of planned images so many are right that most groups have nothing to compare.

    base         the weights that enter       flow_grpo   Flow-GRPO: images alone, the generation expert
    reason       plans and images, all weights: R3's first stage alone
    r3           images, then replies about them and refined images, all weights, in turn: one refinement
    flow_region  flow_grpo, each advantage spread by blame
    ..._forward  each of these with its images learned by the forward process: two draws, of which 64 are learned from
                 in an update, each image 10 times
    region_nft   region-NFT on a round of candidates, each learned as often as those of ..._forward
    best_of      no training: of two images of the base model the one that its judge prefers, beside what refining once
                 gives at no more passes

Then all draw the same prompts, bare and after a plan, and say once what must change (``once``, ``refined``; ``said``);
``passes`` of the network for a refined image, of text guidance two a step.
``fixed``: their judgements of the base model's bare images (ITA), ``answers``: to questions about these (VQA); ``own``
and ``own_answers`` of the bare images that they draw themselves. Percent, 95%, by the exact checker, bootstrap crossed
over seeds and prompts; counts over all seeds. What is finished is kept in ``OUT/seed-K/ARM/outcome.json``. With
``--bare N`` N held-out prompts are drawn once more, bare (``bare-N.json`` beside it).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL.Image import Image
from rich.table import Table

from benchmarks.refine import estimate_cell
from srum.config import EvalConfig, RunConfig, load_config
from srum.drawing.chains import ChainSettings, ChainState, run_chains, template
from srum.evaluation.accuracy import drawn
from srum.evaluation.compute import passes_of
from srum.evaluation.statistics import crossed, difference
from srum.evaluation.understanding import alignment, answered
from srum.images import open_image, save_image
from srum.loop import perform
from srum.models.base import Decoding, Generated, Sampling, TrainableModel
from srum.records import Prompt
from srum.run import BASE, Run, console, load_model
from srum.run_dir import claim_run, write_json
from srum.seeding import seed_for
from srum.shapes.checker import is_right
from srum.stages.rollout import choose_prompts
from srum.train.refining import score_and_blame

BEST, DRAWINGS = "best_of", 2
MODES = {"bare": False, "planned": True}
GROUP, BATCH = 8, 32  # images of a prompt, and of a policy's step
EDIT_GUIDANCE = 1.5
SMALL = (
    "rounds=1",
    "compare=[]",
    f"candidates_per_prompt={GROUP}",
    "rollout.plan=false",
    "rollout.timesteps=10",
    "eval.prompts=held_out",
    "eval.count=48",
    f"train.batch_size={BATCH}",
)
# a weight of the KL near that of an advantage: at 0.001 noise moves the velocity away within a few steps
POLICY = ("train.lr=1e-4", "train.warmup_steps=2", "train.checkpoint_every=4", "random_steps=3", "kl=1")
IMAGES = (*POLICY, "train.trainable=generation")
VISITS, MINIBATCH = 10, 64  # how often an image is learned by the forward process, beside how many others
FORWARD = ("images_by=forward", "train.schedule=linear")
ARMS: dict[str, Sequence[str]] = {
    BASE: ("method=flow_grpo",),
    "flow_grpo": ("method=flow_grpo", *IMAGES),
    "r3": ("method=r3", *POLICY),
    "reason": ("method=flow_grpo", *POLICY, "rollout.plan=true"),
    "flow_region": ("method=flow_grpo", *IMAGES, "credit=region"),
    "flow_grpo_forward": ("method=flow_grpo", *IMAGES, *FORWARD),
    "r3_forward": ("method=r3", *POLICY, *FORWARD),
    "reason_forward": ("method=flow_grpo", *POLICY, *FORWARD, "rollout.plan=true"),
    "flow_region_forward": ("method=flow_grpo", *IMAGES, *FORWARD, "credit=region"),
    "region_nft": ("method=region_nft",),
    BEST: ("method=flow_grpo",),
}


@dataclass(frozen=True)
class Outcome:
    """An arm on a seed. Of every mode and prompt: right when drawn ``once``, right when ``refined``, and what was
    ``said`` between: stop, edit or failure; ``again`` where another was drawn and the better one chosen. Judgements in
    [-1, 1] and whether answers are right. ``value``: the mean reward in [0, 1] of each step that drew from prompts."""

    once: dict[str, list[bool]]
    refined: dict[str, list[bool]]
    said: dict[str, list[str]]
    fixed: list[float | None]
    answers: list[bool]
    own: list[float | None]
    own_answers: list[bool]
    value: list[float]


# --- an arm of a seed


def measured(folder: Path, arm: str, config: RunConfig) -> Outcome:
    """Trained, where it is not the base model, and measured."""
    run = Run(folder / arm, config)
    if arm != BASE:
        for stage in run.stages:
            perform(run, stage, 0)
    model = load_model(config, run.newest(int(arm != BASE)))
    prompts = choose_prompts(config.eval.prompts, config.eval.count, seed=0)
    chains = {mode: chained(model, prompts, config, planning) for mode, planning in MODES.items()}
    own = [chain.images[0].image for chain in chains["bare"]]
    for prompt, image in zip(prompts, own, strict=True):
        save_image(image, run.folder / "bare" / f"{prompt.id}.png")
    fixed = [open_image(folder / BASE / "bare" / f"{prompt.id}.png") for prompt in prompts]
    (score, _), texts = score_and_blame(model, config, config.seed), [prompt.text for prompt in prompts]
    return Outcome(
        once={mode: verdicts(prompts, made, 0) for mode, made in chains.items()},
        refined={mode: verdicts(prompts, made, 1) for mode, made in chains.items()},
        said={mode: [chain.replies[0].kind for chain in made] for mode, made in chains.items()},
        fixed=list(score(fixed, texts)),
        answers=answered(model, fixed, config.seed),
        own=list(score(own, texts)),
        own_answers=answered(model, own, config.seed),
        value=values_of(run),
    )


def chained(model: TrainableModel, prompts: Sequence[Prompt], config: RunConfig, plan: bool) -> list[ChainState]:
    """Drawn as the evaluation draws, and refined once where the model wants to."""
    wanted = config.eval.model_copy(update={"plan": plan})
    drawing = Sampling(**wanted.sampling())
    settings = ChainSettings(
        drawing=drawing,
        changing=replace(drawing, guidance=EDIT_GUIDANCE),
        form=template("compact"),
        max_refinements=1,
        decoding=Decoding(max_tokens=96),
    )
    firsts, names = all_drawn(model, prompts, wanted, config.seed), [prompt.id for prompt in prompts]
    texts, size = [prompt.text for prompt in prompts], wanted.batch_size
    some = [slice(start, start + size) for start in range(0, len(prompts), size)]
    return [
        chain for one in some for chain in run_chains(model, texts[one], names[one], settings, config.seed, firsts[one])
    ]


def chosen(base: Outcome, config: RunConfig) -> Outcome:
    """The base model's, but refined is the best of ``DRAWINGS`` by its judge; the first image is that of the base."""
    model = load_model(config, config.model)
    prompts = choose_prompts(config.eval.prompts, config.eval.count, seed=0)
    (score, _), best = score_and_blame(model, config, config.seed), dict[str, list[bool]]()
    for mode, plan in MODES.items():
        wanted = config.eval.model_copy(update={"plan": plan})
        seeds = [config.seed, *(seed_for(config.seed, BEST, number) for number in range(1, DRAWINGS))]
        tries = [[made.image for made in all_drawn(model, prompts, wanted, seed)] for seed in seeds]
        scores = [score(images, [prompt.text for prompt in prompts]) for images in tries]
        picked = [np.argmax([-2.0 if one is None else one for one in own]) for own in zip(*scores, strict=True)]
        best[mode] = [
            is_right(tries[int(k)][i], p.metadata) for i, (p, k) in enumerate(zip(prompts, picked, strict=True))
        ]
    return replace(base, refined=best, said={mode: ["again"] * len(prompts) for mode in MODES}, value=[])


def bare(folder: Path, arm: str, config: RunConfig, count: int) -> list[bool]:
    """Which of so many prompts are right, bare and drawn once by the arm trained in ``folder``; drawn or read."""
    path = folder / arm / f"bare-{count}.json"
    if not path.exists():
        model = load_model(config, Run(folder / arm, config).newest(int(arm != BASE)))
        prompts = choose_prompts(config.eval.prompts, count, seed=0)
        made = all_drawn(model, prompts, config.eval.model_copy(update={"plan": False}), config.seed)
        write_json(path, [is_right(one.image, prompt.metadata) for prompt, one in zip(prompts, made, strict=True)])
    return list(json.loads(path.read_text()))


def all_drawn(model: TrainableModel, prompts: Sequence[Prompt], wanted: EvalConfig, seed: int) -> list[Generated]:
    """An image of each prompt, by batches."""
    starts = range(0, len(prompts), wanted.batch_size)
    batches = [{p.id: p for p in prompts[start : start + wanted.batch_size]} for start in starts]
    return [made for batch in batches for made in drawn(model, batch, wanted, seed)]


def verdicts(prompts: Sequence[Prompt], chains: Sequence[ChainState], refinements: int) -> list[bool]:
    """The exact checker's after so many refinements."""
    images: list[Image] = [chain.after(refinements).image for chain in chains]
    return [is_right(image, prompt.metadata) for prompt, image in zip(prompts, images, strict=True)]


def values_of(run: Run) -> list[float]:
    """The mean reward of each step that drew from prompts; of a method that is given candidates none."""
    path = run.train_dir(run.method.name, 0) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["value"] for row in rows if "value" in row]


# --- all seeds


def measure(
    folder: Path, seeds: Sequence[int], arms: Sequence[str], steps: int, overrides: Sequence[str], more: int = 0
) -> dict[str, list[Outcome]]:
    """The outcomes seed by seed; what is finished is read. The tables of what there is after each seed.

    Raises RunError for a folder of other overrides or steps.
    """
    counts = f"prompt_count={steps * BATCH // GROUP}", f"train.steps={steps}"
    rows, drawn_once = dict[str, list[Outcome]](), dict[str, list[list[bool]]]()
    for seed in seeds:
        place = folder / f"seed-{seed}"
        for arm in arms:
            path = place / arm / "outcome.json"
            overrides_of_arm = *ARMS[arm], *learned(arm, steps)
            config = load_config(None, [*SMALL, *counts, *overrides_of_arm, *overrides, f"seed={seed}"])
            claim_run(path.parent, config, resume=True)
            if not path.exists():
                outcome = chosen(rows[BASE][-1], config) if arm == BEST else measured(place, arm, config)
                write_json(path, vars(outcome))
            rows.setdefault(arm, []).append(Outcome(**json.loads(path.read_text())))
            if more and arm != BEST:
                drawn_once.setdefault(arm, []).append(bare(place, arm, config, more))
        console.print(drawing_table(rows), understanding_table(rows))
        if more:
            console.print(bare_table(drawn_once))
    return rows


def learned(arm: str, steps: int) -> tuple[str, ...]:
    """How ``steps`` times BATCH images are learned, VISITS times each: those of a round, or of two draws in halves."""
    if arm == "region_nft":
        return f"train.steps={steps * BATCH * VISITS // MINIBATCH}", f"train.batch_size={MINIBATCH}"
    if FORWARD[0] not in ARMS[arm]:
        return ()
    drawn = steps * BATCH // 2
    minibatches = max(1, drawn // MINIBATCH)
    updates = minibatches * VISITS
    counts = f"updates={updates}", f"minibatches={minibatches}", f"train.steps={2 * updates}"
    return *counts, f"train.batch_size={drawn // minibatches}", f"train.checkpoint_every={2 * updates}"


def drawing_table(rows: Mapping[str, Sequence[Outcome]]) -> Table:
    """Of every arm and mode what is right, against the base; what refining mends and breaks; edits of right images."""
    named = (
        "arm",
        "mode",
        "once, %",
        "- base",
        "refined, %",
        "- base",
        "mended",
        "broken",
        "edits",
        "of right",
        "passes",
        "seeds",
    )
    table = Table(*named)
    for arm, outcomes in rows.items():
        for mode in MODES:
            once, refined = (np.array([getattr(o, name)[mode] for o in outcomes]) for name in ("once", "refined"))
            edits = np.array([[said == "edit" for said in o.said[mode]] for o in outcomes])
            cells = []
            for name, ours in (("once", once), ("refined", refined)):
                theirs = np.array([getattr(o, name)[mode] for o in rows[BASE][: len(ours)]])
                cells += [estimate_cell(crossed(ours)), estimate_cell(difference(ours, theirs), "+")]
            counts = [int(one.sum()) for one in (refined & ~once, once & ~refined, edits, edits & once)]
            more = np.mean([[said in ("edit", "again") for said in o.said[mode]] for o in outcomes])
            passes = f"{(1 + more) * passes_of(EvalConfig()):.0f}"
            table.add_row(arm, mode, *cells, *map(str, counts), passes, str(len(outcomes)))
    return table


def bare_table(rows: Mapping[str, Sequence[Sequence[bool]]]) -> Table:
    """Of every arm what is right of more prompts, bare and drawn once, against the base."""
    table = Table("arm", "bare, once, %", "- base", "prompts", "seeds")
    for arm, verdicts in rows.items():
        ours, theirs = np.array(verdicts), np.array(rows[BASE][: len(verdicts)])
        cells = estimate_cell(crossed(ours)), estimate_cell(difference(ours, theirs), "+")
        table.add_row(arm, *cells, str(ours.shape[1]), str(len(ours)))
    return table


def understanding_table(rows: Mapping[str, Sequence[Outcome]]) -> Table:
    """Of every arm ITA and VQA on the base model's images and on its own, means over seeds; its rewards as it began and
    as it ended, means over a third of the steps."""
    table = Table("arm", "ITA", "balanced", "AUROC", "VQA", "own: ITA", "balanced", "AUROC", "VQA", "reward")
    for arm, outcomes in rows.items():
        cells = list[str]()
        for seen, answers, drawn_by in (("fixed", "answers", rows[BASE]), ("own", "own_answers", outcomes)):
            told = [alignment(getattr(o, seen), by.once["bare"]) for o, by in zip(outcomes, drawn_by, strict=False)]
            accuracies, replies = [one.accuracy for one in told], [fmean(getattr(o, answers)) for o in outcomes]
            shares = accuracies, [t.balanced for t in told], [t.auroc for t in told], replies
            cells += [percent(own) for own in shares]
        table.add_row(arm, *cells, rise([o.value for o in outcomes if o.value]))
    return table


def percent(shares: Sequence[float | None]) -> str:
    """The mean of the shares that exist."""
    return f"{100 * fmean(share for share in shares if share is not None):.1f}"


def rise(values: Sequence[Sequence[float]]) -> str:
    """Rewards of the first and of the last third of the steps."""
    if not values:
        return ""
    thirds = [max(1, len(own) // 3) for own in values]
    first = fmean(fmean(own[:n]) for own, n in zip(values, thirds, strict=True))
    last = fmean(fmean(own[-n:]) for own, n in zip(values, thirds, strict=True))
    return f"{first:.3f} to {last:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=12, help=f"of a policy, each of {BATCH} images")
    parser.add_argument("--bare", type=int, default=0, help="of so many prompts drawn once besides")
    parser.add_argument("--out", type=Path, default=Path("runs/reinforce"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    options = parser.parse_args(arguments)
    arms = list(dict.fromkeys([BASE, *options.arms]))
    rows = measure(options.out, options.seeds, arms, options.steps, options.overrides, options.bare)
    write_json(options.out / "reinforce.json", {arm: [vars(one) for one in own] for arm, own in rows.items()})


if __name__ == "__main__":
    main()
