"""Draw and judge the held-out prompts of one's own file, for base and every arm (``srum.own``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from srum.evaluation.accuracy import drawn
from srum.images import open_image, save_image
from srum.own import OWN, Drawn, JudgedImage, lowest
from srum.progress import part
from srum.records import Prompt
from srum.run import BASE, Run, load_model
from srum.run_dir import finished, read_records, run_stage
from srum.stages.reward_map import reason_to_skip, sample_score
from srum.train.refining import image_judge
from srum.views import plots

DRAW, JUDGE = "own prompts - draw {}", "own prompts - judge {}"


def judge_own(run: Run, held_out: Sequence[Prompt]) -> dict[str, Sequence[JudgedImage]]:
    """The images of base and of every arm after the last round, on the held-out prompts and the same seeds, with their
    scores.

    All are drawn before the first is judged, so that no two models are in memory at once.
    """
    prompts = {prompt.id: prompt for prompt in held_out}
    weights = {arm: run.weights(arm, run.config.rounds) for arm in (BASE, *run.arms)}
    for arm in weights:
        with run.timed(f"{OWN} {arm} draw"), part(DRAW.format(arm)):
            _draw(run, arm, weights[arm], prompts)
    return _judge(run, list(weights), prompts)


def _draw(run: Run, arm: str, weights: str, prompts: Mapping[str, Prompt]) -> None:
    """As the evaluation draws: noise by the run's seed and the prompt's id."""
    folder, config = run.folder / OWN / arm, run.config
    if finished(folder, "drawn"):
        return
    model = load_model(config, weights)

    def work(batch: Mapping[str, Prompt]) -> list[Drawn]:
        for name, made in zip(batch, drawn(model, batch, config.eval, config.seed), strict=True):
            save_image(made.image, folder / "images" / f"{name}.png")
        return [Drawn(prompt_id=name) for name in batch]

    run_stage(folder, "drawn", Drawn, prompts, config.eval.batch_size, work)


def _judge(run: Run, arms: list[str], prompts: Mapping[str, Prompt]) -> dict[str, Sequence[JudgedImage]]:
    folders = {arm: run.folder / OWN / arm for arm in arms}
    if all(finished(folder, "scores") for folder in folders.values()):
        return {arm: read_records(folder / "scores.jsonl", JudgedImage) for arm, folder in folders.items()}
    frozen = run.config.model_copy(update={"judge": run.config.judge.frozen()})
    if frozen.judge.model == "start":  # the model that is loaded here, once
        frozen = frozen.model_copy(update={"judge": frozen.judge.model_copy(update={"model": "self"})})
    judge = image_judge(load_model(run.config, run.config.model), frozen, run.seed(OWN, "judge"))
    scores: dict[str, Sequence[JudgedImage]] = {}
    for arm, folder in folders.items():

        def work(batch: Mapping[str, Prompt], place: str = arm) -> list[JudgedImage]:
            images = [open_image(folders[place] / "images" / f"{name}.png") for name in batch]
            judged = judge(images, [prompt.text for prompt in batch.values()], [p.metadata for p in batch.values()])
            made = []
            for (name, prompt), (grounding, judgement) in zip(batch.items(), judged, strict=True):
                failed = reason_to_skip(grounding, judgement, run.config.reward.on_failure)
                score = None if failed else sample_score(judgement)
                said = lowest(plots.said_of(grounding.regions, judgement))
                made.append(JudgedImage(prompt_id=name, prompt=prompt.text, score=score, said=said))
            return made

        with run.timed(f"{OWN} {arm} judge"), part(JUDGE.format(arm)):
            scores[arm] = run_stage(folder, "scores", JudgedImage, prompts, run.config.judge.batch_size, work)
    return scores
