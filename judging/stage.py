"""The stage that judges: region proposals -> scores and reasons, by the model itself or whom the config names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from srum.config import RunConfig
from srum.images import ImageError, open_image
from srum.judging.base import Judge
from srum.judging.remote import Server
from srum.judging.rewards import Judging, Reward
from srum.judging.self_judge import SelfJudge
from srum.models.base import Decoding, TrainableModel
from srum.plugins import construct, find_class
from srum.records import Candidate, Failure, Grounding, Judgement, LayoutJudgement, Prompt
from srum.run import Run, load_model
from srum.run_dir import finished, forget, read_by_id, require_use, run_stage


def judge_stage(run: Run, k: int) -> None:
    """judgements.jsonl: what the judge, by default the model that made the images, says of every region and layout.

    What a server left without a reply is asked again, as long as nothing was made of the judgements. Raises RunError
    where it left everything so.
    """
    folder, config = run.round(k), run.config.judge
    if config.server.url and not finished(folder, "rewards"):
        forget(folder, "judgements", Judgement, lambda judgement: Failure.NO_REPLY in _failures(judgement))
    if finished(folder, "judgements"):
        return
    candidates = read_by_id(folder / "candidates.jsonl", Candidate)
    groundings = read_by_id(folder / "regions.jsonl", Grounding, candidates)
    prompts = read_by_id(folder / "prompts.jsonl", Prompt)
    judge = load_judging(run.config, run.newest(k), run.seed(k, "judge"))
    work = judging_work(judge, folder, groundings, prompts)
    judgements = run_stage(folder, "judgements", Judgement, candidates, config.batch_size, work)

    def fault() -> str | None:
        first = next((one.layout.raw for one in judgements if one.layout.failure != Failure.NO_IMAGE), None)
        if first is None or any(set(_failures(one)) - {Failure.NO_REPLY, Failure.NO_IMAGE} for one in judgements):
            return None
        return f"{config.server.url} answered no question; to the first: {first}"

    require_use(folder / "judgements.jsonl", fault)


def judging_work(
    judge: Judging, folder: Path, groundings: Mapping[str, Grounding], prompts: Mapping[str, Prompt]
) -> Callable[[Mapping[str, Candidate]], list[Judgement]]:
    """What ``judge`` says of a batch of the candidates in ``folder``."""

    def work(batch: Mapping[str, Candidate]) -> list[Judgement]:
        images, judgements = {}, {}
        for name, candidate in batch.items():
            try:
                images[name] = open_image(folder / candidate.image)
            except ImageError as error:
                layout = LayoutJudgement(score=None, failure=Failure.NO_IMAGE, raw=str(error))
                judgements[name] = Judgement(candidate_id=name, regions=[], layout=layout)
        texts, proposed = [batch[name].prompt for name in images], [groundings[name].regions for name in images]
        asked = [prompts.get(batch[name].prompt_id) for name in images]
        facts = [prompt.metadata if prompt else {} for prompt in asked]
        outcomes = judge(list(images.values()), texts, facts, proposed)
        for name, (of_regions, of_layout) in zip(images, outcomes, strict=True):
            judgements[name] = Judgement(candidate_id=name, regions=of_regions, layout=of_layout)
        return [judgements[name] for name in batch]

    return work


def _failures(judgement: Judgement) -> list[Failure | None]:
    return [judged.failure for judged in (*judgement.regions, judgement.layout)]


def load_judging(config: RunConfig, weights: str | TrainableModel, seed: int) -> Judging:
    """The reward function that the config names, or its judge."""
    if config.judge.reward:
        return Reward(config.judge.reward).judge
    judge = load_judge(config, weights, seed)
    return lambda images, prompts, _, regions: judge.judge(images, prompts, regions)


def load_judge(config: RunConfig, weights: str | TrainableModel, seed: int) -> Judge:
    """The judge that the config names: a user's own, or the model with ``weights``, or which has them, those that
    entered the run, another model, or a server."""
    judge, model = config.judge, load_answering(config, weights)
    if judge.by != "self":
        made: Judge = construct("judge", judge.by, find_class("judge", judge.by, "judge"), model, judge.options)
        return made
    options = judge.model_dump(include={"instructions", "soft", "retries", "view", "think", "reply"})
    return SelfJudge(model, decoding=Decoding(max_tokens=judge.max_tokens), seed=seed, **options)


def load_answering(config: RunConfig, weights: str | TrainableModel) -> Any:
    """Who answers a judge's questions: the model with ``weights``, or which has them, those that entered the run,
    another model, or a server."""
    judge = config.judge
    if judge.server.url:
        return Server(**judge.server.model_dump())
    chosen = {"self": weights, "start": config.model}.get(judge.model, judge.model)
    return load_model(config, chosen) if isinstance(chosen, str) else chosen
