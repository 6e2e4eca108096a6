"""What training made of the judge, where it trains what judges: the newest weights judge the first round's candidates
again, and the truth of the embedded world says whose scores tell right from wrong better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from srum.evaluation.judge_quality import JudgeQuality, judge_quality
from srum.images import open_image
from srum.judging.stage import judging_work, load_judging
from srum.processes import Processes
from srum.records import Candidate, Grounding, Judgement, Prompt
from srum.run import Run
from srum.run_dir import read_by_id, run_stage, write_json
from srum.shapes.prompts import is_checkable

FOLDER, QUALITY = "judge", "quality.json"  # of the last round, in its folder


def judge_again(run: Run) -> None:
    """judge/ in the last round's folder: the judgements of the newest weights on what the first judgements were of, and
    ``quality.json``, how well both separate right from wrong. Nothing where the judge was not frozen, or cannot be
    compared with the truth."""
    first, last = run.round(0), run.config.rounds - 1
    folder = run.round(last) / FOLDER
    if not Processes.here().once(lambda: _is_frozen(run) and not (folder / QUALITY).exists()):
        return
    prompts = read_by_id(first / "prompts.jsonl", Prompt)
    candidates = read_by_id(first / "candidates.jsonl", Candidate)
    if not all(is_checkable(prompts[one.prompt_id].metadata, one.size) for one in candidates.values()):
        return
    groundings = read_by_id(first / "regions.jsonl", Grounding, candidates)
    newest = run.config.model_copy(update={"judge": run.config.judge.model_copy(update={"model": "self"})})
    work = judging_work(load_judging(newest, run.newest(last + 1), run.seed(0, "judge")), first, groundings, prompts)
    after = run_stage(folder, "judgements", Judgement, candidates, run.config.judge.batch_size, work)
    before = read_by_id(first / "judgements.jsonl", Judgement, candidates)

    def compare() -> None:
        said = {"before": before, "after": {one.candidate_id: one for one in after}}
        found = {name: asdict(_quality(first, candidates, groundings, own, prompts)) for name, own in said.items()}
        write_json(folder / QUALITY, found)

    Processes.here().once(compare)


def _is_frozen(run: Run) -> bool:
    """Whether the weights that entered judge, while training changes what judges."""
    judge = run.config.judge
    own = judge.by == "self" and not judge.reward and not judge.server.url
    judged = all((run.round(0) / f"{name}.jsonl").exists() for name in ("candidates", "regions", "judgements"))
    return own and judge.model == "start" and run.config.train.trainable == "all" and judged


def _quality(
    folder: Path,
    candidates: Mapping[str, Candidate],
    groundings: Mapping[str, Grounding],
    judgements: Mapping[str, Judgement],
    prompts: Mapping[str, Prompt],
) -> JudgeQuality:
    images = (open_image(folder / candidate.image) for candidate in candidates.values())
    metadata = {name: dict(prompt.metadata) for name, prompt in prompts.items()}
    return judge_quality(
        list(candidates.values()), list(groundings.values()), list(judgements.values()), metadata, images
    )
