"""The stage that judges: region proposals -> scores and reasons, by the model itself or whom the config names."""

from __future__ import annotations

from collections.abc import Mapping

from judging.base import Writer
from judging.remote import Server
from judging.self_judge import SelfJudge
from srum.config import RunConfig
from srum.models.base import Decoding, TrainableModel
from srum.records import Candidate, Failure, Grounding, Judgement, LayoutJudgement
from srum.run import Run, load_model
from srum.run_dir import ImageError, finished, open_image, read_by_id, run_stage
from srum.seeding import seed_for


def judge_stage(run: Run, k: int) -> None:
    """judgements.jsonl: what the judge, by default the model that made the images, says of every region and layout."""
    folder, config = run.round(k), run.config.judge
    if finished(folder, "judgements"):
        return
    candidates = read_by_id(folder / "candidates.jsonl", Candidate)
    groundings = read_by_id(folder / "regions.jsonl", Grounding, candidates)
    judge = load_judge(run.config, run.newest(k), seed_for(run.config.seed, k, "judge"))

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


def load_judge(config: RunConfig, weights: str | TrainableModel, seed: int) -> SelfJudge:
    """The judge that the config names: ``weights``, or the model that has them, those that entered the run, another
    model, or a server."""
    judge = config.judge
    if judge.server.url:
        model: Writer = Server(**judge.server.model_dump())
    else:
        chosen = {"self": weights, "start": config.model}.get(judge.model, judge.model)
        model = load_model(config, chosen) if isinstance(chosen, str) else chosen
    options = judge.model_dump(include={"instructions", "soft", "retries", "view", "think", "reply"})
    return SelfJudge(model, decoding=Decoding(max_tokens=judge.max_tokens), seed=seed, **options)
