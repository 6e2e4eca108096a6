"""The experiment behind the claims: several seeds of the loop on the embedded world, measured by the exact checker.

    python benchmarks/lab.py --seeds 0 1 2 3 4 --rounds 4 --out runs/lab [--set train.lr=3e-4] [--parts loop rounds]

Parts, each over all seeds:

    loop    base, sft, srum (Eq. 1-3) and region_nft after the last round, on the held-out prompts
    first   the same after the first round, the only one in which every arm learns from images of its own weights
    rounds  region_nft after every round, on development prompts: does it collapse?
    controls  one round of region_nft on the candidates of round 0, beside what needs no judge or has a perfect one
            (benchmarks/controls.py); a run with plans (--set rollout.plan=true) has those that tell modes apart, too
    rates   one round of every method on the candidates of round 0 at each of three learning rates, on development
            prompts: as many trials for each
    best-of  the base model, of whose images of a held-out prompt the judge keeps the best: as many images as the passes
            of a round of the loop would pay for, and no training
    credit  region_nft on the candidates of round 0, its score on the blamed regions or spread evenly, same
            steps and noise, on the held-out prompts
    judge   the judge's scores of round 0 against the truth, and flipped relations
    plan    the base model with a planning text and without, on development prompts
    ablations  Eq. 1-3 after one round, on the candidates of round 0, without one of its parts or with another lambda_c
    own     every method in a loop of its own, which learns from images of its own weights in every round, after one
            round and after three, on the held-out prompts
    steps   layout, detail and correctness of the images that the denoising steps of the arms after one round head for
            (paper, Fig. 4), judged by the base model, on held-out prompts: means over the first and over the second
            half of the steps; every step is in lab/steps/ARM/means.json of a seed
    activation  the strength of the base model's neurons for understanding and for generation, in the base model and in
            the arms after one round (paper, Algorithm 1)
    transfer  one round of every arm on prompts of one domain, half as many and half as long, on the held-out prompts of
            each domain (paper, Table 4)
    after   the judge's scores of the images of round 0 again, after training: by the weights that region_nft made, and
            by those of one round in which all weights are trained, with the judge's replies among the data and without

Every part goes on where it was interrupted and returns at once where it has finished; ``lab.json`` gathers the parts.
Intervals are of 95%: of accuracies and their differences by a bootstrap crossed over training seeds and prompts, of
what is one number per seed by Student's t (``srum.evaluation.statistics``). Of one seed they cover the prompts alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from srum.config import EvalConfig, RunConfig, changed, config_class, load_config
from srum.drawing.refining import best_of as best
from srum.evaluation.accuracy import drawn, evaluate
from srum.evaluation.activation import find_clusters, mean_activations, strength
from srum.evaluation.compute import passes_of
from srum.evaluation.denoising import JudgedSteps, judge_steps, summarize_steps
from srum.evaluation.judge_quality import JudgeQuality, flipped_relations, judge_quality
from srum.evaluation.statistics import crossed, over_seeds
from srum.fork import fork_run
from srum.grounding.stage import load_proposer
from srum.images import open_image
from srum.judging.stage import load_judge
from srum.loop import evaluate_arms, perform, run_loop
from srum.models.base import Sampling
from srum.records import Candidate, Grounding, Judgement, Prompt, RewardMap
from srum.run import BASE, Run, console, load_model
from srum.run_dir import atomic, claim_run, read_records, write_json, write_records
from srum.shapes.checker import is_right
from srum.stages.rollout import choose_prompts
from srum.train.methods.region_nft import RegionNftConfig

DEVELOPMENT = 280  # prompts; no more than there are for the evaluation
FLIPPED = 200  # prompts about positions
OWN_ROUNDS = 3  # of the loops of part own, in a run that has so many
STEP_PROMPTS = 32  # of part steps, of each of which every step is judged
SAMPLES = 100  # of part activation: images that are judged, and prompts that are drawn
PERCENTILE = 50.0  # tau of Algorithm 1, to which the paper gives no value: the more active half of the neurons
DOMAIN_POOL = 900  # prompts of all categories, from which those of a domain are taken

CLAIMED = (("region_nft", BASE), ("srum", "sft"))  # the first is better than the second
# part controls: the methods, and whether they need candidates of both modes
CONTROLS = {
    "judge": ("region_nft", False),
    "contrast": ("benchmarks.controls:Contrast", True),
    "within modes": ("benchmarks.controls:WithinModes", True),
    "separated": ("benchmarks.controls:Separated", True),
    "shuffled": ("benchmarks.controls:Shuffled", False),
    "checker": ("benchmarks.controls:Checker", False),
    "planned SFT": ("benchmarks.controls:PlannedSft", True),
    "SFT": ("sft", False),
}
# part rates: the learning rates at which each method is tried
RATES = ("3e-4", "1e-4", "3e-5")
# part own: what each loop changes in the config of the run, which is region_nft's
LOOPS = {
    "sft": ("method=sft",),
    "srum": ("method=srum",),
    "srum-unit": ("method=srum", "reward.mapping=unit"),
}
# part ablations: what each of them changes in Eq. 1-3 (paper, Fig. 3)
ABLATIONS = {
    "srum": (),
    "sample-level": ("credit=sample", "use_layout=false"),  # that score holds the layout's
    "binary": ("reward.binary=true",),
    "no-layout": ("use_layout=false",),
    **{f"lambda-{value}": (f"constraint_weight={value}",) for value in (0.0, 0.1, 0.3, 0.7, 1.0)},
}
# part transfer: the categories of each domain
DOMAINS = {
    "objects": ("single_object", "two_object"),
    "attributes": ("colors", "color_attr", "size"),
    "relations": ("counting", "position"),
}
# part after: what is trained for one round
TRAINED = {
    "all-weights": ("train.trainable=all",),
    "all-weights-and-replies": ("train.trainable=all", "train.replies=16", "train.text_weight=0.1"),
}

Verdicts = dict[str, list[bool]]  # what was tried -> correct or not, in the order of the prompts
Quality = dict[str, dict[str, Any]]  # what was judged -> its numbers
Transferred = dict[str, dict[str, Verdicts]]  # arm -> domain of its prompts -> domain of the images -> verdicts
Strengths = dict[str, dict[str, float]]  # weights -> cluster and task -> average activation strength


@dataclass(frozen=True)
class Row:
    """One line of the table: percent, or points where it is a difference; AUROC and scores times 100, activations times
    1000; counts as they are. ``covers``: what the interval treats as drawn, such as ``5 seeds, 600 prompts``."""

    what: str
    mean: float
    per_seed: list[float]
    interval: tuple[float, float] | None = None
    covers: str = ""


# --- the parts


def loop(run: Run) -> Verdicts:
    """The whole run, and what its arms have come to."""
    if not (run.folder / "summary.json").exists():
        run_loop(run.config, run.folder, resume=True)
    results = evaluate_arms(run, run.config.rounds, run.folder / "eval")
    return {arm: result.correct for arm, result in results.items()}


def first(run: Run) -> Verdicts:
    """The arms after one round. From then on all learn from the images of ``region_nft``, better than their own."""
    return {arm: verdicts(run, after_one_round(run, arm), run.config.eval, f"first/{arm}") for arm in (BASE, *run.arms)}


def after_one_round(run: Run, arm: str) -> str:
    """The weights of an arm after round 0, which all arms share; those of the base model stay what they are."""
    return run.weights(arm, 0 if arm == BASE else 1)


def rounds(run: Run) -> Verdicts:
    """The default after every round; the rounds are made by ``loop``."""
    config = development(run.config.eval)
    return {
        f"after {k} rounds": verdicts(run, run.newest(k), config, f"rounds/{k}") for k in range(run.config.rounds + 1)
    }


def controls(run: Run) -> Verdicts:
    """One round of region-NFT by the judge, and by what takes its place; advantages lie evenly on their images."""
    judge_round_0(run)
    correct = {BASE: verdicts(run, run.weights(BASE, 0), run.config.eval, f"first/{BASE}")}
    both = 0 < run.config.rollout.planned(run.config.candidates_per_prompt) < run.config.candidates_per_prompt
    for name in [name for name, (_, of_modes) in CONTROLS.items() if both or not of_modes]:
        trained = branch(run, f"controls/{name}", ["compare=[]", *control_changes(run.config, name)], "train")
        perform(trained, "train", 0)
        correct[name] = verdicts(trained, trained.newest(1), run.config.eval, "after-1")
    return correct


def control_changes(config: RunConfig, name: str) -> list[str]:
    """The overrides that make a run that control's: its method, and the trust region of the run's own."""
    method, _ = CONTROLS[name]
    if not issubclass(config_class(method), RegionNftConfig) or not isinstance(config, RegionNftConfig):
        return [f"method={method}"]
    return [f"method={method}", "credit=sample", f"beta={config.beta}", f"old_decay={config.old_decay}"]


def rates(run: Run) -> Verdicts:
    """One round of every method at every rate."""
    judge_round_0(run)
    config = development(run.config.eval)
    correct = {BASE: verdicts(run, run.weights(BASE, 0), config, f"rates/{BASE}")}
    for method in ("sft", "srum", run.method.name):
        for rate in RATES:
            changes = ["compare=[]", f"method={method}", f"train.lr={rate}"]
            trained = branch(run, f"rates/{method}-{rate}", changes, "train")
            perform(trained, "train", 0)
            correct[f"{method}, {rate}"] = verdicts(trained, trained.newest(1), config, "after-1")
    return correct


def best_of(run: Run) -> Verdicts:
    """The base model's images of the evaluation: the first, the best by its judge, and whether any is right."""
    count, config = affordable(run.config), run.config.eval
    path = run.folder / "lab" / "best-of.jsonl"
    if not path.exists():
        write_records(path, choose_prompts(config.prompts, config.count, seed=0))
    sampling = [f"rollout.{name}={json.dumps(value)}" for name, value in config.sampling().items()]
    asked = [f"prompts={path}", "eval.own_share=0", f"prompt_count={config.count}", f"candidates_per_prompt={count}"]
    asked += ["rollout.plan=false"]
    drawn = branch(run, "best-of", ["compare=[]", *asked, *sampling], "rollout")
    judge_round_0(drawn)
    images = judged_images(drawn.round(0))
    return {
        "first": [own[0][1] for own in images],
        f"best of {count} by the judge": [own[best([score for score, _ in own])][1] for own in images],
        f"any of {count} right": [any(right for _, right in own) for own in images],
    }


def affordable(config: RunConfig) -> int:
    """Images per prompt of the evaluation, for the passes of the network that one image each and one round take.

    A step of training counts four passes of each sample: with the old weights, forward, and twice that backward.
    """
    drawn = config.prompt_count * config.candidates_per_prompt * passes_of(config.rollout)
    learned = 4 * config.train.steps * config.train.batch_size
    return 1 + max(1, round((drawn + learned) / (config.eval.count * passes_of(config.eval))))


def judged_images(folder: Path) -> list[list[tuple[float | None, bool]]]:
    """By prompt, of every candidate in order: the judge's score, None where it has none, and the truth."""
    asked = {prompt.id: prompt.metadata for prompt in read_records(folder / "prompts.jsonl", Prompt)}
    scores = {reward.candidate_id: reward.sample_score for reward in read_records(folder / "rewards.jsonl", RewardMap)}
    images: dict[str, list[tuple[float | None, bool]]] = {name: [] for name in asked}
    for one in read_records(folder / "candidates.jsonl", Candidate):
        right = is_right(open_image(folder / one.image), asked[one.prompt_id])
        images[one.prompt_id].append((scores.get(one.id), right))
    return list(images.values())


def credit(run: Run) -> Verdicts:
    """One round of the default with the score spread evenly, and on the blamed regions."""
    judge_round_0(run)
    correct = {}
    for name in ("sample", "region"):
        same = changed(run.config, [f"credit={name}"]) == run.config
        trained = run if same else branch(run, f"credit/{name}", ["compare=[]", f"credit={name}"], "train")
        perform(trained, "train", 0)
        correct[name] = verdicts(run, trained.newest(1), run.config.eval, f"credit/{name}")
    return correct


def plan(run: Run) -> Verdicts:
    """The base model in its two modes."""
    config = development(run.config.eval)
    modes = {"direct": False, "plan": True}
    return {
        name: verdicts(run, run.weights(BASE, 0), config.model_copy(update={"plan": planning}), f"plan/{name}")
        for name, planning in modes.items()
    }


def ablations(run: Run) -> Verdicts:
    """One round of Eq. 1-3 as it is and ablated, beside the base model and SFT."""
    judge_round_0(run)
    changes = {"sft": ("method=sft",)} | {name: ("method=srum", *parts) for name, parts in ABLATIONS.items()}
    correct = {BASE: verdicts(run, run.weights(BASE, 0), run.config.eval, f"first/{BASE}")}
    for name, parts in changes.items():
        # the first round of part own, where that trains the same
        folder = f"own/{name}" if LOOPS.get(name) == parts else f"ablations/{name}"
        ablated = branch(run, folder, ["compare=[]", *parts], "rasterize")
        make_round(ablated, 0)
        correct[name] = verdicts(ablated, ablated.newest(1), run.config.eval, "after-1")
    return correct


def own(run: Run) -> Verdicts:
    """The methods, each in a loop of its own that begins with the candidates of the base model."""
    judge_round_0(run)
    loops = {name: branch(run, f"own/{name}", ["compare=[]", *changes], "rasterize") for name, changes in LOOPS.items()}
    counts = own_rounds(run.config)
    correct = {BASE: verdicts(run, run.weights(BASE, 0), run.config.eval, f"first/{BASE}")}
    for name, looped in [*loops.items(), (run.method.name, run)]:
        for k in range(counts[-1]):
            make_round(looped, k)
        for k in counts:
            correct[f"{name}, {k}"] = verdicts(looped, looped.newest(k), run.config.eval, f"after-{k}")
    return correct


def own_rounds(config: RunConfig) -> list[int]:
    """After how many rounds ``own`` looks: the first, in which all have the same candidates, and the last."""
    return sorted({1, min(OWN_ROUNDS, config.rounds)})


def steps(run: Run) -> dict[str, list[JudgedSteps]]:
    """The arms after one round, every step of the sampler looked at by the same judge."""
    config = run.config.eval.model_copy(update={"count": min(STEP_PROMPTS, run.config.eval.count)})
    prompts = choose_prompts(config.prompts, config.count, seed=0)
    judge = load_judge(run.config, run.config.model, run.config.seed)
    propose = load_proposer(run.config, run.config.model)
    found = {}
    for arm in (BASE, *run.arms):
        folder, model = run.folder / "lab" / "steps" / arm, load_model(run.config, after_one_round(run, arm))
        found[arm] = judge_steps(model, judge, propose, prompts, config, folder, run.config.seed)
        means = summarize_steps(found[arm], Sampling(**config.sampling()))
        write_json(folder / "means.json", [asdict(step) for step in means])
    return found


def activation(run: Run) -> Strengths:
    """Algorithm 1: clusters from the base model, and their strengths in it and in the arms after one round."""
    judge_round_0(run)
    means = {arm: activations_of(run, arm) for arm in (BASE, *run.arms)}
    clusters = asdict(find_clusters(means[BASE]["understanding"], means[BASE]["generation"], PERCENTILE))
    sizes = {f"number of {cluster} neurons": float(neurons.sum()) for cluster, neurons in clusters.items()}
    return {"sizes": sizes} | {
        arm: {
            f"{cluster} neurons in {task}": strength(values, neurons)
            for task, values in own.items()
            for cluster, neurons in clusters.items()
        }
        for arm, own in means.items()
    }


def activations_of(run: Run, arm: str) -> dict[str, Tensor]:
    """``mean_activations`` of judging round 0's first candidate of each prompt, and of drawing held-out prompts."""
    path, config = run.folder / "lab" / "activation" / f"{arm}.safetensors", run.config
    if not path.exists():
        weights, visible = after_one_round(run, arm), config.model_copy(update={"compile": False})
        judge, folder = load_judge(visible, weights, config.seed), run.round(0)
        regions = {g.candidate_id: g.regions for g in read_records(folder / "regions.jsonl", Grounding)}
        candidates = [c for c in read_records(folder / "candidates.jsonl", Candidate) if c.index == 0][:SAMPLES]
        model = load_model(visible, weights)
        prompts = choose_prompts(config.eval.prompts, min(SAMPLES, config.eval.count), seed=0)
        found = {
            "understanding": mean_activations(
                judge.model.network,
                candidates,
                lambda c: judge.judge([open_image(folder / c.image)], [c.prompt], [regions[c.id]]),
            ),
            "generation": mean_activations(
                model.network,
                prompts,
                lambda p: drawn(model, {p.id: p}, config.eval, config.seed),
            ),
        }
        with atomic(path) as partial:
            save_file(found, partial)
    return load_file(path)


def transfer(run: Run) -> Transferred:
    """Every arm trained on one domain's prompts, and the base model, on the held-out prompts of each domain."""
    asked = choose_prompts(run.config.eval.prompts, run.config.eval.count, seed=0)

    def on_domains(correct: Sequence[bool]) -> Verdicts:
        judged = list(zip(asked, correct, strict=True))
        return {domain: [right for prompt, right in judged if is_of(prompt, domain)] for domain in DOMAINS}

    base = verdicts(run, run.weights(BASE, 0), run.config.eval, f"first/{BASE}")
    found: Transferred = {BASE: {"nothing": on_domains(base)}}
    for domain in DOMAINS:
        trained = domain_run(run, domain)
        make_round(trained, 0)
        for arm in trained.arms:
            correct = verdicts(trained, trained.weights(arm, 1), run.config.eval, f"first/{arm}")
            found.setdefault(arm, {})[domain] = on_domains(correct)
    return found


def domain_run(run: Run, domain: str) -> Run:
    """A run of one round, half as many prompts, all of the domain, and half as many steps."""
    path = run.folder / "lab" / "transfer" / f"{domain}.jsonl"
    if not path.exists():
        pool = choose_prompts(run.config.prompts, DOMAIN_POOL, seed=0)
        write_records(path, [prompt for prompt in pool if is_of(prompt, domain)])
    count, steps = max(1, run.config.prompt_count // 2), max(1, run.config.train.steps // 2)
    changes = ["rounds=1", f"prompts={path}", "eval.own_share=0", f"prompt_count={count}", f"train.steps={steps}"]
    return branch(run, f"transfer/{domain}", changes, "rollout")


def is_of(prompt: Prompt, domain: str) -> bool:
    """Whether a prompt of the embedded world belongs to the domain."""
    return prompt.metadata["tag"] in DOMAINS[domain]


def judge(run: Run) -> Quality:
    """How well the base model judges round 0, and flipped relations."""
    judge_round_0(run)
    return quality(run, run.newest(0))


def after(run: Run) -> dict[str, Quality]:
    """The same of weights that have been trained."""
    found = {"before": judge(run)}
    weights = {f"{run.method.name}, {run.config.rounds} rounds": run.newest(run.config.rounds)}
    for name, changes in TRAINED.items():
        trained = branch(run, f"after/{name}", ["compare=[]", *changes], "rasterize")
        make_round(trained, 0)
        weights[name] = trained.newest(1)
    for name, path in weights.items():
        judged = branch(run, f"after/{name}, judging", [f"judge.model={path}"], "judge")
        perform(judged, "judge", 0)
        found[name] = quality(judged, path)
    return found


def quality(run: Run, weights: str) -> Quality:
    """``JudgeQuality`` of the judgements of round 0, which ``weights`` made, and ``FlippedRelations`` by them."""
    path = run.folder / "lab" / "judge.json"
    if not path.exists():
        flipped = flipped_relations(load_judge(run.config, weights, run.config.seed), FLIPPED, run.config.seed)
        write_json(path, asdict(quality_of_round_0(run.round(0))) | {"relations": asdict(flipped)})
    return json.loads(path.read_text())


def quality_of_round_0(folder: Path) -> JudgeQuality:
    """The judgements of a round against the truth."""
    candidates = read_records(folder / "candidates.jsonl", Candidate)
    return judge_quality(
        candidates,
        read_records(folder / "regions.jsonl", Grounding),
        read_records(folder / "judgements.jsonl", Judgement),
        {prompt.id: prompt.metadata for prompt in read_records(folder / "prompts.jsonl", Prompt)},
        (open_image(folder / candidate.image) for candidate in candidates),
    )


def branch(run: Run, name: str, changes: Sequence[str], stage: str) -> Run:
    """A run in ``lab/NAME`` with the config of ``run`` but for ``changes``, and its round 0 before ``stage``."""
    branched = Run(run.folder / "lab" / name, changed(run.config, changes))
    if not branched.folder.exists():
        fork_run(run.folder, branched.folder, stage, branched.config, 0)
    claim_run(branched.folder, branched.config, resume=True)
    return branched


def judge_round_0(run: Run) -> None:
    """The candidates of the base model, their judgements and reward maps."""
    for name in run.stages:
        if name != "train":
            perform(run, name, 0)


def make_round(run: Run, k: int) -> None:
    """Every stage of a round."""
    for name in run.stages:
        perform(run, name, k)


def development(config: EvalConfig) -> EvalConfig:
    """The same evaluation on development prompts, which may be looked at as often as one likes."""
    return config.model_copy(update={"prompts": "development", "count": min(DEVELOPMENT, config.count)})


def verdicts(run: Run, weights: str, config: EvalConfig, name: str) -> list[bool]:
    """What the checker says of one image per prompt, kept in ``lab/NAME`` of the run."""
    prompts = choose_prompts(config.prompts, config.count, seed=0)
    return evaluate(
        load_model(run.config, weights), prompts, config, run.folder / "lab" / name, run.config.seed
    ).correct


# --- over the seeds


def accuracy_rows(found: Sequence[Verdicts], pairs: Sequence[tuple[str, str]] = ()) -> list[Row]:
    """Accuracies, and differences of ``pairs`` (the last against the first where none are given)."""
    names = list(found[0])
    correct = {name: np.array([verdicts[name] for verdicts in found], dtype=float) for name in names}
    rows = [accuracy_row(name, values) for name, values in correct.items()]
    present = [(a, b) for a, b in pairs or [(names[-1], names[0])] if a in correct and b in correct]
    return rows + [accuracy_row(f"{a} - {b}", correct[a] - correct[b]) for a, b in present]


def accuracy_row(what: str, values: np.ndarray) -> Row:
    """``values`` (seeds, prompts) in [-1, 1]; the mean over both in percent, its crossed interval."""
    estimate = crossed(values).times(100)
    return Row(what, estimate.value, (100 * values.mean(axis=1)).tolist(), estimate.interval, estimate.covers)


def judge_rows(found: Sequence[Quality]) -> list[Row]:
    """Every number of the judge; those that do not exist for want of examples are left out."""
    rows = []
    for subject, values in found[0].items():
        for name in values:
            scale = 100 if name in ("auroc", "rejected", "accepted") else 1
            per_seed = [scale * by_seed[subject][name] for by_seed in found if by_seed[subject][name] is not None]
            if per_seed:
                rows.append(mean_row(f"{subject}: {name}", per_seed))
    return rows


def control_rows(found: Sequence[Verdicts]) -> list[Row]:
    """Accuracies; what each gains over the base, and the judge over each."""
    others = [name for name in found[0] if name != BASE]
    over_base = [(name, BASE) for name in others]
    return accuracy_rows(found, over_base + [("judge", name) for name in others if name != "judge"])


def rate_rows(found: Sequence[Verdicts]) -> list[Row]:
    """Accuracies, and what each gains over the base."""
    return accuracy_rows(found, [(name, BASE) for name in found[0] if name != BASE])


def best_of_rows(found: Sequence[Verdicts]) -> list[Row]:
    """Accuracies, and what choosing gains over the first image."""
    first, *chosen = found[0]
    return accuracy_rows(found, [(name, first) for name in chosen])


def ablation_rows(found: Sequence[Verdicts]) -> list[Row]:
    """Accuracies, and what each ablation changes in Eq. 1-3."""
    whole, *ablated = ABLATIONS
    return accuracy_rows(found, [(whole, BASE), (whole, "sft"), *((name, whole) for name in ablated)])


def own_rows(found: Sequence[Verdicts]) -> list[Row]:
    """Accuracies of the objectives' own loops, each against the base, and region-NFT's against the others'."""
    names = [name for name in found[0] if name != BASE]
    *others, main = [name for name in names if name.rpartition(", ")[2] == names[-1].rpartition(", ")[2]]
    return accuracy_rows(found, [(name, BASE) for name in names] + [(main, name) for name in others])


def step_rows(found: Sequence[Mapping[str, Sequence[JudgedSteps]]]) -> list[Row]:
    """Means over the first half of the steps, which draft, and over the second, and the claimed differences.

    A prompt none of whose steps in the half was judged, of whatever arm or seed, is left out.
    """
    rows = []
    for quantity in ("layout", "detail", "correct"):
        values = {arm: step_values(found, arm, quantity) for arm in found[0]}
        middle = values[BASE].shape[2] // 2
        for half, steps in {"first": slice(0, middle), "second": slice(middle, None)}.items():
            halves = {arm: own[..., steps] for arm, own in values.items()}
            judged = [~np.isnan(own).all(axis=2).any(axis=0) for own in halves.values()]  # in every seed, at some step
            of_all = np.logical_and.reduce(judged)
            means = {arm: np.nanmean(own[:, of_all], axis=2) for arm, own in halves.items()}
            rows += [accuracy_row(f"{quantity}, {half} half: {arm}", own) for arm, own in means.items()]
            rows += [
                accuracy_row(f"{quantity}, {half} half: {a} - {b}", means[a] - means[b])
                for a, b in CLAIMED
                if a in means and b in means
            ]
    return rows


def step_values(found: Sequence[Mapping[str, Sequence[JudgedSteps]]], arm: str, quantity: str) -> np.ndarray:
    """(seeds, prompts, steps), NaN where the judge failed."""
    return np.array(
        [[[getattr(step, quantity) for step in one.steps] for one in by_seed[arm]] for by_seed in found], dtype=float
    )


def activation_rows(found: Sequence[Strengths]) -> list[Row]:
    """Sizes of the clusters, strengths times 1000, and what each arm changes in those of the base model."""
    sizes, *weights = found[0]
    rows = [mean_row(what, [by_seed[sizes][what] for by_seed in found]) for what in found[0][sizes]]
    for arm in weights:
        for what in found[0][arm]:
            rows.append(mean_row(f"{what}: {arm}", [1000 * by_seed[arm][what] for by_seed in found]))
    for arm in weights[1:]:
        for what in found[0][arm]:
            changes = [1000 * (by_seed[arm][what] - by_seed[BASE][what]) for by_seed in found]
            rows.append(mean_row(f"{what}: {arm} - {BASE}", changes))
    return rows


def mean_row(what: str, per_seed: list[float]) -> Row:
    """A row of one number per seed, with its interval over the seeds where there are several."""
    if len(per_seed) == 1:
        return Row(what, per_seed[0], per_seed)
    estimate = over_seeds(per_seed)
    return Row(what, estimate.value, per_seed, estimate.interval, estimate.covers)


def transfer_rows(found: Sequence[Transferred]) -> list[Row]:
    """The base model's accuracies, and what training on a domain gains on it and on the others."""

    def values(arm: str, trained: str, tested: str) -> np.ndarray:
        return np.array([by_seed[arm][trained][tested] for by_seed in found], dtype=float)

    base = {domain: values(BASE, "nothing", domain) for domain in DOMAINS}
    rows = [accuracy_row(f"{BASE} on {domain}", own) for domain, own in base.items()]
    for arm in [arm for arm in found[0] if arm != BASE]:
        gains = {(a, b): values(arm, a, b) - base[b] for a in DOMAINS for b in DOMAINS}
        rows += [accuracy_row(f"{arm} of {a} on {b} - {BASE}", gain) for (a, b), gain in gains.items()]
        seen = [gains[domain, domain] for domain in DOMAINS]
        unseen = [np.mean([gains[a, b] for a in DOMAINS if a != b], axis=0) for b in DOMAINS]
        for where, parts in {"its own domain": seen, "the others": unseen}.items():
            rows.append(accuracy_row(f"{arm} on {where} - {BASE}", np.concatenate(parts, axis=1)))
    return rows


def after_rows(found: Sequence[Mapping[str, Quality]]) -> list[Row]:
    """The judge's AUROCs and shares, weights by weights."""
    rows = {name: judge_rows([by_weights[name] for by_weights in found]) for name in found[0]}
    return [
        replace(row, what=f"{name}: {row.what}")
        for name, own in rows.items()
        for row in own
        if row.what.endswith((": auroc", ": rejected", ": accepted"))
    ]


def loop_rows(found: Sequence[Verdicts]) -> list[Row]:
    """Accuracies of the arms, and the two differences that are claimed."""
    return accuracy_rows(found, CLAIMED)


PARTS: dict[str, tuple[Callable[[Run], Any], Callable[[Sequence[Any]], list[Row]]]] = {
    "loop": (loop, loop_rows),
    "first": (first, loop_rows),
    "rounds": (rounds, accuracy_rows),
    "controls": (controls, control_rows),
    "rates": (rates, rate_rows),
    "best-of": (best_of, best_of_rows),
    "credit": (credit, accuracy_rows),
    "judge": (judge, judge_rows),
    "plan": (plan, accuracy_rows),
    "ablations": (ablations, ablation_rows),
    "own": (own, own_rows),
    "steps": (steps, step_rows),
    "activation": (activation, activation_rows),
    "transfer": (transfer, transfer_rows),
    "after": (after, after_rows),
}


def measure(part: str, configs: Sequence[RunConfig], out: Path) -> list[Row]:
    """The rows of one part, from a run per config in ``out/seed-N``."""
    work, rows_of = PARTS[part]
    found = []
    for config in configs:
        run = Run(out / f"seed-{config.seed}", config)
        claim_run(run.folder, config, resume=True)
        found.append(work(run))
    return rows_of(found)


def table_of(report: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """All parts measured so far."""
    table = Table("part", "what", "mean", "95% interval", "per seed", title="percent and points; exact checker")
    if any(len(row["per_seed"]) == 1 for rows in report.values() for row in rows):
        table.caption = "one seed: intervals cover prompts alone, another training may differ by more"
    for part, rows in report.items():
        for row in rows:
            interval = "[{:+.1f}, {:+.1f}]".format(*row["interval"]) if row["interval"] else ""
            per_seed = "  ".join(f"{value:.1f}" for value in row["per_seed"])
            table.add_row(part, row["what"], f"{row['mean']:.1f}", interval, per_seed)
        table.add_section()
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts, add them to ``lab.json`` and print the table of all that is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override; may be repeated")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args(argv)
    configs = [
        load_config(None, ["eval.count=600", *args.set, f"rounds={args.rounds}", f"seed={seed}"]) for seed in args.seeds
    ]
    path = args.out / "lab.json"
    for part in args.parts:
        rows = measure(part, configs, args.out)
        report = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, report | {part: [asdict(row) for row in rows]})
    console.print(table_of(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
