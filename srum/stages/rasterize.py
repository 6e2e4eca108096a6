"""The stage that rasterizes: judgements -> reward maps, and what became of the candidates of a round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor

from srum import models
from srum.processes import Processes
from srum.records import Candidate, Grounding, Judgement, RewardMap
from srum.run import Run, console
from srum.run_dir import atomic, finished, read_by_id, run_stage, write_json
from srum.stages.outcomes import count_outcomes, in_words
from srum.stages.reward_map import NEUTRAL, Skipped, binarized, centred, rasterize, sample_score, usual_scores

RASTERIZE_BATCH = 64  # candidates per shard


def rasterize_stage(run: Run, k: int) -> None:
    """rewards.jsonl, rewards/, counts.json: a reward map for every candidate whose judgement allows one."""
    folder, config = run.round(k), run.config.reward
    processes = Processes.here()
    if finished(folder, "rewards") and processes.once((folder / "counts.json").exists):
        return
    candidates = read_by_id(folder / "candidates.jsonl", Candidate)
    groundings = read_by_id(folder / "regions.jsonl", Grounding, candidates)
    judgements = read_by_id(folder / "judgements.jsonl", Judgement, candidates)
    model = models.load(run.newest(k), run.config.device, empty=True)  # it only knows its grid
    prompts = (candidate.prompt_id for candidate in candidates.values())
    usual = usual_scores(map(judgements.__getitem__, candidates), prompts) if config.centred else {}
    scale: Literal["signed", "unit"] = "signed" if config.mapping == "signed" else "unit"

    def in_map(candidate: Candidate, judgement: Judgement) -> Judgement:
        if config.centred:
            judgement = centred(judgement, usual.get(candidate.prompt_id, NEUTRAL))
        return binarized(judgement) if config.binary else judgement

    def outcome(candidate: Candidate, judgement: Judgement) -> tuple[Tensor, float] | Skipped:
        grid = model.latent_grid(candidate.size)
        return rasterize(candidate, groundings[candidate.id], in_map(candidate, judgement), grid, **config.rules())

    def work(batch: Mapping[str, Candidate]) -> list[RewardMap]:
        judged = {name: judgements[name] for name in batch}
        outcomes = {name: outcome(candidate, judged[name]) for name, candidate in batch.items()}
        return [
            _keep_reward(folder, batch[name], judged[name], scale, *made)
            for name, made in outcomes.items()
            if not isinstance(made, Skipped)
        ]

    rewards = run_stage(folder, "rewards", RewardMap, candidates, RASTERIZE_BATCH, work, gaps=True)

    def count() -> None:
        rewarded = {reward.candidate_id for reward in rewards}
        left = (candidates[name] for name in candidates if name not in rewarded)
        skipped = [str(outcome(candidate, judgements[candidate.id])) for candidate in left]
        counts = count_outcomes(groundings.values(), judgements.values(), skipped)
        write_json(folder / "counts.json", counts)
        console.print(f"{folder.name}: {in_words(counts)}", soft_wrap=True, highlight=False)

    processes.once(count)


def _keep_reward(
    folder: Path,
    candidate: Candidate,
    judgement: Judgement,
    mapping: Literal["signed", "unit"],
    values: Tensor,
    alpha: float,
) -> RewardMap:
    below = PurePosixPath(candidate.latent).parent.parts[1:]  # the sub-folder of its latent
    name = str(PurePosixPath("rewards", *below, f"{candidate.id}.safetensors"))
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
