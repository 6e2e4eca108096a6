"""The loop of the paper's Fig. 2: rollout -> ground -> judge -> rasterize -> train, again with the new weights.

One function per stage, in order; each reads what the stages before it wrote into the round's folder, and writes its own
file there. Beside the configured objective (arm ``srum``), whose weights make the next round's candidates, two arms
train on the same candidates from their own weights: ``sft``, and ``srum_paper``, Eq. 1-3 as published.

The processes of one launch (``srum.processes.connected``) call everything here alike and share the work; what is not
shared, process 0 does, and it alone prints.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from grounding.base import ground, load_grounder
from grounding.relevance import RelevanceFilter
from judging.base import Answerer
from judging.remote import Server
from judging.self_judge import SelfJudge
from srum import models
from srum.config import RunConfig, TrainConfig
from srum.evaluation.accuracy import EvalResult, evaluate, paired_bootstrap, require_metadata
from srum.models.base import Decoding
from srum.processes import Processes
from srum.records import Candidate, Failure, Grounding, Judgement, LayoutJudgement, Prompt, Region, RewardMap
from srum.report import write_report
from srum.reward_map import Skipped, binarized, centred, rasterize, sample_score
from srum.rollout import choose_prompts, rollout
from srum.run_dir import (
    ImageError,
    RunError,
    StageTimer,
    alone_in,
    atomic,
    claim_run,
    finished,
    open_image,
    read_by_id,
    read_records,
    round_dir,
    run_stage,
    write_json,
    write_records,
    write_text,
)
from srum.seeding import seed_for
from train.data import TrainingRecord, load_replies, load_training_records
from train.optimizer import make_optimizer
from train.tracking import require_tracker
from train.trainer import DTYPES, train

if TYPE_CHECKING:
    from srum.models.bagel import Bagel

BASE, MAIN = "base", "srum"  # the model that entered; the arm whose weights make the candidates
RASTERIZE_BATCH = 64  # candidates per shard
console = Console()


@dataclass(frozen=True)
class Run:
    """An open run: its folder and its config."""

    folder: Path
    config: RunConfig

    def round(self, k: int) -> Path:
        """The folder of round ``k``."""
        return round_dir(self.folder, k)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that the block takes in process 0 to the times of the run, as ``name``."""
        if Processes.here().rank:
            yield
            return
        with StageTimer(self.folder / "timings.json").stage(name):
            yield

    def weights(self, arm: str, rounds: int) -> str:
        """The weights of ``arm`` after so many rounds: a folder, or the model that entered.

        Raises RunError where they have not been trained yet.
        """
        if arm == BASE or rounds == 0:
            return self.config.model
        folder = self.train_dir(arm, rounds - 1) / "model"
        if not folder.is_dir():
            raise RunError(f"{folder} is missing: {arm} has not been trained in round {rounds - 1}")
        return str(folder)

    def train_dir(self, arm: str, k: int) -> Path:
        """Where ``arm`` is trained in round ``k``."""
        return self.round(k) / "train" / arm


def arms(config: RunConfig) -> dict[str, TrainConfig]:
    """What is trained in each round, on the same candidates and with the same number of steps.

    ``srum_paper`` needs signed maps, and is left out of a run whose maps are not; so is an arm that would be trained as
    ``srum`` is.
    """
    if not config.compare:
        return {MAIN: config.train}
    paper: dict[str, Any] = {"objective": "srum", "constraint_weight": 0.5, "use_layout": True, "credit": "region"}
    found = {"sft": config.train.model_copy(update={"objective": "sft"})}
    if config.reward.mapping == "signed":
        found["srum_paper"] = config.train.model_copy(update=paper)
    return {arm: own for arm, own in found.items() if own != config.train} | {MAIN: config.train}


def load_model(config: RunConfig, weights: str, dtype: torch.dtype = torch.float32, empty: bool = False) -> Bagel:
    """The model with these weights, or still ``empty`` (``Bagel.load``), on the device and compiled as the config says.

    Raises RunError where several processes would share that device.
    """
    if Processes.here().count > 1 and (config.device == "spread" or ":" in config.device):
        raise RunError(f"device: every process needs a GPU of its own, not {config.device}; use auto or cuda")
    if config.compile or Processes.here().count > 1:
        gc.collect()  # the model before it, compiled or sharded, is a cycle and would keep its memory
    model = models.load(weights, config.device, dtype, empty)
    if config.compile:
        model.compile()
    return model


# --- one round


def rollout_stage(run: Run, k: int) -> None:
    """prompts.jsonl, candidates.jsonl, images/, latents/: made with the newest weights."""
    folder, config = run.round(k), run.config
    if finished(folder, "prompts") and finished(folder, "candidates"):
        return
    weights = run.weights(MAIN, k)
    if not finished(folder, "prompts"):
        Processes.here().once(lambda: write_records(folder / "prompts.jsonl", round_prompts(config, k)))
    prompts = read_records(folder / "prompts.jsonl", Prompt)
    rollout(load_model(config, weights), prompts, config, k, folder)


def round_prompts(config: RunConfig, k: int) -> list[Prompt]:
    """The prompts of round ``k``: drawn anew each round."""
    return choose_prompts(config.prompts, config.prompt_count, seed_for(config.seed, k, "prompts"))


def ground_stage(run: Run, k: int) -> None:
    """regions.jsonl: the region proposals of every candidate. Raises RunError where all of them failed."""
    folder, config = run.round(k), run.config.ground
    if finished(folder, "regions"):
        return
    candidates = read_by_id(folder / "candidates.jsonl", Candidate)
    propose = load_proposer(run.config, run.weights(MAIN, k))

    def work(batch: Mapping[str, Candidate]) -> list[Grounding]:
        files = [folder / candidate.image for candidate in batch.values()]
        prompts = [candidate.prompt for candidate in batch.values()]
        found = propose(files, prompts)
        return [
            Grounding(candidate_id=name, regions=regions, error=error)
            for name, (regions, error) in zip(batch, found, strict=True)
        ]

    found = run_stage(folder, "regions", Grounding, candidates, config.batch_size, work)
    if all(grounding.error for grounding in found):
        Processes.here().once((folder / "regions.jsonl").unlink)  # else the next attempt would find the stage finished
        raise RunError(f"the grounder {config.grounder} failed on every image; on the first: {found[0].error}")


def load_proposer(config: RunConfig, weights: str) -> Callable[..., list[tuple[list[Region], str | None]]]:
    """``ground`` of images and prompts with the grounder, the limits and the filter that the config names."""
    model = load_model(config, weights)
    grounder = load_grounder(config.ground.grounder, model, **config.ground.options)
    relevant = RelevanceFilter(model, config.ground.min_relevance) if config.ground.min_relevance > 0 else None
    return partial(ground, grounder, **config.ground.limits(), relevant=relevant)


def judge_stage(run: Run, k: int) -> None:
    """judgements.jsonl: what the judge, by default the model that made the images, says of every region and layout."""
    folder, config = run.round(k), run.config.judge
    if finished(folder, "judgements"):
        return
    candidates = read_by_id(folder / "candidates.jsonl", Candidate)
    groundings = read_by_id(folder / "regions.jsonl", Grounding, candidates)
    judge = load_judge(run.config, run.weights(MAIN, k), seed_for(run.config.seed, k, "judge"))

    def work(batch: Mapping[str, Candidate]) -> list[Judgement]:
        images, judgements = {}, {}
        for name, candidate in batch.items():
            try:
                images[name] = open_image(folder / candidate.image)
            except ImageError as error:
                layout = LayoutJudgement(score=None, failure=Failure.NO_IMAGE, raw=str(error))
                judgements[name] = Judgement(candidate_id=name, regions=[], layout=layout)
        prompts, proposed = [batch[name].prompt for name in images], [groundings[name].regions for name in images]
        for name, (of_regions, of_layout) in zip(
            images, judge.judge(list(images.values()), prompts, proposed), strict=True
        ):
            judgements[name] = Judgement(candidate_id=name, regions=of_regions, layout=of_layout)
        return [judgements[name] for name in batch]

    run_stage(folder, "judgements", Judgement, candidates, config.batch_size, work)


def load_judge(config: RunConfig, weights: str, seed: int) -> SelfJudge:
    """The judge that the config names: ``weights``, those that entered the run, another model, or a server."""
    judge = config.judge
    if judge.server.url:
        model: Answerer = Server(**judge.server.model_dump())
    else:
        model = load_model(config, {"self": weights, "start": config.model}.get(judge.model, judge.model))
    options = judge.model_dump(include={"instructions", "soft", "retries", "view", "think", "reply"})
    return SelfJudge(model, decoding=Decoding(max_tokens=judge.max_tokens, seed=seed), **options)


def rasterize_stage(run: Run, k: int) -> None:
    """rewards.jsonl, rewards/, counts.json: a reward map for every candidate whose judgement allows one."""
    folder, config = run.round(k), run.config.reward
    processes = Processes.here()
    if finished(folder, "rewards") and processes.once((folder / "counts.json").exists):
        return
    candidates = read_by_id(folder / "candidates.jsonl", Candidate)
    groundings = read_by_id(folder / "regions.jsonl", Grounding, candidates)
    judgements = read_by_id(folder / "judgements.jsonl", Judgement, candidates)
    model = models.load(run.weights(MAIN, k), run.config.device, empty=True)  # it only knows its grid
    in_map = judgements
    if config.centred:
        ids = list(candidates)
        prompts = [candidate.prompt_id for candidate in candidates.values()]
        in_map = dict(zip(ids, centred([judgements[name] for name in ids], prompts), strict=True))
    if config.binary:
        in_map = {name: binarized(judgement) for name, judgement in in_map.items()}
    rules = config.model_dump(exclude={"centred", "binary"})
    scale: Literal["signed", "unit"] = "signed" if config.mapping == "signed" else "unit"

    def outcome(candidate: Candidate) -> tuple[Tensor, float] | Skipped:
        grid = model.latent_grid(candidate.size)
        return rasterize(candidate, groundings[candidate.id], in_map[candidate.id], grid, **rules)

    def work(batch: Mapping[str, Candidate]) -> list[RewardMap]:
        outcomes = {name: outcome(candidate) for name, candidate in batch.items()}
        return [
            _keep_reward(folder, judgements[name], scale, *made)
            for name, made in outcomes.items()
            if not isinstance(made, Skipped)
        ]

    rewards = run_stage(folder, "rewards", RewardMap, candidates, RASTERIZE_BATCH, work, gaps=True)

    def count() -> None:
        rewarded = {reward.candidate_id for reward in rewards}
        skipped = [str(outcome(candidate)) for name, candidate in candidates.items() if name not in rewarded]
        counts = count_outcomes(list(groundings.values()), list(judgements.values()), skipped)
        write_json(folder / "counts.json", counts)
        console.print(f"{folder.name}: {json.dumps(counts)}")

    processes.once(count)


def _keep_reward(
    folder: Path, judgement: Judgement, mapping: Literal["signed", "unit"], values: Tensor, alpha: float
) -> RewardMap:
    name = f"rewards/{judgement.candidate_id}.safetensors"
    with atomic(folder / name) as partial:
        save_file({"reward": values.contiguous()}, partial)
    return RewardMap(
        candidate_id=judgement.candidate_id,
        values=name,
        grid=(values.shape[0], values.shape[1]),
        mapping=mapping,
        alpha=alpha,
        sample_score=sample_score(judgement),
    )


def count_outcomes(
    groundings: Sequence[Grounding], judgements: Sequence[Judgement], skipped: Sequence[str]
) -> dict[str, Any]:
    """What became of a round's candidates: how many, and how many failed at what (``skipped``: why, each)."""
    return {
        "candidates": len(groundings),
        "grounding_errors": sum(g.error is not None for g in groundings),
        "without_regions": sum(g.error is None and all(region.id == 0 for region in g.regions) for g in groundings),
        "regions_judged": sum(len(j.regions) for j in judgements),
        "region_failures": _count(region.failure for j in judgements for region in j.regions),
        "layout_failures": _count(j.layout.failure for j in judgements),
        "skipped": _count(skipped),
        "reward_maps": len(groundings) - len(skipped),
    }


def _count(kinds: Iterable[str | None]) -> dict[str, int]:
    return {str(kind): number for kind, number in sorted(Counter(kind for kind in kinds if kind is not None).items())}


def train_stage(run: Run, k: int) -> None:
    """train/ARM/: every arm goes on from its own weights, on the same candidates, with the same noise.

    An arm whose ``model/`` is there is left as it is, whatever its candidates are now.
    """
    require_trainable(run.config.device)
    processes = Processes.here()
    trained = processes.once(lambda: [arm for arm in arms(run.config) if (run.train_dir(arm, k) / "model").exists()])
    if processes.rank == 0:
        for arm in trained:
            console.print(f"already trained: {run.train_dir(arm, k)}", soft_wrap=True)
    missing = {arm: config for arm, config in arms(run.config).items() if arm not in trained}
    if not missing:
        return
    records, unrewarded = load_training_records(run.round(k))
    if processes.rank == 0:
        console.print(f"{run.round(k).name}: training on {len(records)} candidates, {unrewarded} have no reward map")
    if not records:
        skipped = processes.once(lambda: json.loads((run.round(k) / "counts.json").read_text())["skipped"])
        raise RunError(f"nothing to train on: no candidate of {run.round(k)} has a reward map, because of {skipped}")
    for arm, config in missing.items():
        train_arm(run, k, arm, config, records)


def train_arm(run: Run, k: int, arm: str, config: TrainConfig, records: Sequence[TrainingRecord]) -> None:
    """train/ARM/: one arm goes on from its own weights."""
    model = load_model(run.config, run.weights(arm, k), DTYPES[config.memory.frozen], empty=True)
    replies = load_replies(run.round(k), run.config.judge.instructions) if config.replies.weight else []
    seed, progress = seed_for(run.config.seed, k, "train"), sys.stderr.isatty()
    made_them = arm == MAIN or k == 0  # these weights made the candidates
    train(model, records, config, run.train_dir(arm, k), seed, progress, replies, reproduces=made_them)


def require_trainable(device: str) -> None:
    """RunError for layers in several places."""
    if device == "spread":
        raise RunError("device: spread layers can sample and judge, not train; train on one device, or by torchrun")


def require_sizes(config: RunConfig) -> None:
    """RunError for images that the model's latent grid does not divide."""
    model = models.load(config.model, config.device, empty=True)  # it only knows its grid
    sizes = {"rollout.size": config.rollout.size} | ({"eval.size": config.eval.size} if config.eval.count else {})
    for name, size in sizes.items():
        try:
            model.latent_grid(size)
        except ValueError as error:
            raise RunError(f"{name}: {error}") from None


STAGES: dict[str, Callable[[Run, int], None]] = {
    "rollout": rollout_stage,
    "ground": ground_stage,
    "judge": judge_stage,
    "rasterize": rasterize_stage,
    "train": train_stage,
}


def perform(run: Run, name: str, k: int) -> None:
    """One stage of round ``k``, timed; nothing is done again that is finished."""
    with run.timed(f"{run.round(k).name}/{name}"):
        STAGES[name](run, k)


# --- the whole run


def run_loop(config: RunConfig, folder: Path, resume: bool = False, command: str = "") -> dict[str, Any]:
    """All rounds, then every arm on the held-out prompts: ``summary.json`` (returned) and ``report.html``.

    ``command`` is what the report says the run was made with.

    An interrupted run with ``resume`` ends in the same ``summary.json``, bit for bit. Raises ConfigError, RunError,
    GrounderError, TrainingError and ValueError for inputs that cannot work, before anything is written, and RunError
    where another launch is at work in the folder.
    """

    def begin() -> None:
        claim_run(folder, config, resume)
        if command and not resume:
            write_text(folder / "command.txt", command + "\n")

    processes = Processes.here()
    processes.once(lambda: check_inputs(config))
    with alone_in(folder):
        processes.once(begin)
        run = Run(folder, config)
        for k in range(config.rounds):
            for name in STAGES:
                perform(run, name, k)
        return conclude(run)


def check_inputs(config: RunConfig) -> None:
    """Raise now what would else be raised after hours: prompts, model, sizes, grounder, judge, optimiser, tracker."""
    require_trainable(config.device)
    choose_prompts(config.prompts, config.prompt_count, config.seed)
    if config.eval.count:
        require_metadata(eval_prompts(config))
    require_sizes(config)
    load_grounder(config.ground.grounder, load_model(config, config.model), **config.ground.options)
    load_judge(config, config.model, config.seed)
    make_optimizer([Parameter(torch.zeros(1))], config.train)
    if config.train.tracker:
        require_tracker(config.train.tracker)


def conclude(run: Run) -> dict[str, Any]:
    """Evaluate every arm after the last round; write ``summary.json`` and ``report.html``, print the table.

    With ``eval.count=0`` the report alone; the summary is then empty.
    """
    results = evaluate_arms(run, run.config.rounds, run.folder / "eval") if run.config.eval.count else {}
    summary = summarize(results)

    def publish() -> None:
        if summary:
            write_json(run.folder / "summary.json", summary)
            console.print(summary_table(summary))
        write_report(run.folder)

    Processes.here().once(publish)
    return summary


def evaluate_arms(run: Run, rounds: int, folder: Path) -> dict[str, EvalResult]:
    """The base model and every arm after so many rounds, on the same prompts with the same noise, in ``folder/ARM``."""
    prompts, results = eval_prompts(run.config), {}
    weights = {arm: run.weights(arm, rounds) for arm in (BASE, *arms(run.config))}
    for arm in weights:
        with run.timed(f"{folder.relative_to(run.folder)} {arm}"):
            results[arm] = evaluate(  # the model has no name here, which would keep it while the next loads
                load_model(run.config, weights[arm]), prompts, run.config.eval, folder / arm, run.config.seed
            )
    return results


def eval_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts of the evaluation: the same for every seed of the run."""
    return choose_prompts(config.eval.prompts, config.eval.count, seed=0)


def summarize(results: Mapping[str, EvalResult]) -> dict[str, Any]:
    """Plain values of ``summary.json``: accuracies in percent, intervals of 95%, differences to ``base`` in points."""
    summary = {
        arm: asdict(result.overall)
        | {"seed": result.seed, "per_category": {name: asdict(a) for name, a in result.per_category.items()}}
        for arm, result in results.items()
    }
    for arm, result in results.items():
        if arm != BASE:
            points, low, high = paired_bootstrap(result.correct, results[BASE].correct)
            summary[arm]["difference_to_base"] = {"points": points, "interval": (low, high)}
    return summary


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The summary as a table of the terminal, a column per arm: percent, points."""
    table = Table("", *summary, title="held-out prompts, exact checker")
    table.add_row("accuracy, %", *(f"{values['accuracy']:.1f}" for values in summary.values()))
    table.add_row("  95% interval", *("{:.1f} to {:.1f}".format(*values["interval"]) for values in summary.values()))
    table.add_row("against base, points", *(_difference(values) for values in summary.values()))
    table.add_section()
    for category in next(iter(summary.values()))["per_category"]:
        accuracies = (values["per_category"][category]["accuracy"] for values in summary.values())
        table.add_row(category, *(f"{accuracy:.1f}" for accuracy in accuracies))
    return table


def _difference(values: Mapping[str, Any]) -> str:
    if "difference_to_base" not in values:
        return ""
    low, high = values["difference_to_base"]["interval"]
    return f"{values['difference_to_base']['points']:+.1f}\n{low:+.1f} to {high:+.1f}"
