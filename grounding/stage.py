"""The stage that grounds: images -> region proposals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

from srum.config import RunConfig
from srum.grounding.base import ground, load_grounder
from srum.grounding.relevance import RelevanceFilter
from srum.models.base import TrainableModel
from srum.records import Candidate, Grounding, Region
from srum.run import Run, load_model
from srum.run_dir import finished, read_by_id, require_use, run_stage

Propose: TypeAlias = Callable[..., list[tuple[list[Region], str | None]]]


def ground_stage(run: Run, k: int) -> None:
    """regions.jsonl: the region proposals of every candidate. Raises RunError where all of them failed."""
    folder, config = run.round(k), run.config.ground
    if finished(folder, "regions"):
        return
    candidates = read_by_id(folder / "candidates.jsonl", Candidate)
    propose = load_proposer(run.config, run.newest(k))

    def work(batch: Mapping[str, Candidate]) -> list[Grounding]:
        files = [folder / candidate.image for candidate in batch.values()]
        prompts = [candidate.prompt for candidate in batch.values()]
        found = propose(files, prompts)
        return [
            Grounding(candidate_id=name, regions=regions, error=error)
            for name, (regions, error) in zip(batch, found, strict=True)
        ]

    found = run_stage(folder, "regions", Grounding, candidates, config.batch_size, work)

    def fault() -> str | None:
        if not all(grounding.error for grounding in found):
            return None
        return f"the grounder {config.grounder} failed on every image; on the first: {found[0].error}"

    require_use(folder / "regions.jsonl", fault)


def load_proposer(config: RunConfig, weights: str | TrainableModel) -> Propose:
    """``ground`` of images and prompts with the grounder, the limits and the filter that the config names.

    ``weights``: of the model that may be asked, or that model.
    """
    model = load_model(config, weights) if isinstance(weights, str) else weights
    grounder = load_grounder(config.ground.grounder, model, **config.ground.options)
    relevant = RelevanceFilter(model, config.ground.min_relevance) if config.ground.min_relevance > 0 else None
    return partial(ground, grounder, **config.ground.limits(), relevant=relevant)
