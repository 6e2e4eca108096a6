"""Rollout: prompts -> candidates, each an image, its clean latent and its planning text."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from srum.config import RunConfig
from srum.disk import require_room_for_images
from srum.drawing import contexts_of, write_plans
from srum.models.base import Generated, Sampling, UnifiedModel
from srum.processes import Processes
from srum.records import Candidate, Prompt
from srum.run import Run, load_model
from srum.run_dir import (
    PROMPT_FILES,
    RunError,
    atomic,
    finished,
    read_prompts,
    read_records,
    run_stage,
    save_image,
    write_records,
)
from srum.seeding import seed_for
from srum.shapes.prompts import SPLITS, prompt_set


def choose_prompts(source: str, count: int, seed: int) -> list[Prompt]:
    """``count`` prompts of a set of the embedded world, or of a .jsonl or .txt file, drawn by ``seed``.

    A file that has no more gives all of its prompts; those drawn stay in the order of the file. Raises RunError for a
    file that cannot be read and for what is neither a set nor such a file.
    """
    if source in SPLITS:
        return prompt_set(source, count, seed)
    if not source.endswith(PROMPT_FILES):
        sets, files = ", ".join(SPLITS), " or ".join(PROMPT_FILES)
        raise RunError(f"prompts: {source!r} is neither a set ({sets}) nor a {files} file")
    prompts = read_prompts(Path(source))
    drawn = random.Random(seed).sample(range(len(prompts)), min(count, len(prompts)))
    return [prompts[index] for index in sorted(drawn)]


def rollout(
    model: UnifiedModel, prompts: Sequence[Prompt], config: RunConfig, round_index: int, folder: Path
) -> list[Candidate]:
    """``candidates_per_prompt`` images of each prompt: ``candidates.jsonl``, ``images/``, ``latents/`` in ``folder``.

    The first ``rollout.planned`` of a prompt's candidates plan. A candidate's noise and plan have a seed each, of the
    run's seed, the round and its id. Finished batches of an interrupted rollout are kept. Raises DiskFullError where
    the rest will not fit, and RunError for a size that the model cannot draw.
    """
    wanted = {
        f"{prompt.id}-{index}": (prompt, index) for prompt in prompts for index in range(config.candidates_per_prompt)
    }
    sampling = Sampling(**config.rollout.sampling())
    facts = config.rollout.model_dump(mode="json", exclude={"batch_size"})
    planned = config.rollout.planned(config.candidates_per_prompt)

    def seeds(names: Sequence[str], purpose: str) -> list[int]:
        return [seed_for(config.seed, round_index, name, purpose) for name in names]

    def work(batch: Mapping[str, tuple[Prompt, int]]) -> list[Candidate]:
        planning = [name for name, (_, index) in batch.items() if index < planned]
        asked = [batch[name][0].text for name in planning]
        written = write_plans(model, asked, sampling, seeds(planning, "plan")) if planning else []
        plans = dict(zip(planning, written, strict=True))
        contexts = contexts_of(
            model, [prompt.text for prompt, _ in batch.values()], [plans.get(name) for name in batch]
        )
        noise = seeds(list(batch), "rollout")
        return [
            _keep(folder, made, plans.get(name), name, *batch[name], seed, facts)
            for made, name, seed in zip(model.draw(contexts, sampling, noise), batch, noise, strict=True)
        ]

    try:
        model.latent_grid(config.rollout.size)
    except ValueError as error:
        raise RunError(f"rollout.size: {error}") from None
    latents = [f"latents/{name}.safetensors" for name in wanted]
    Processes.here().once(lambda: require_room_for_images(folder, config.rollout.size, latents, kinds=2))
    return run_stage(folder, "candidates", Candidate, wanted, config.rollout.batch_size, work)


def _keep(
    folder: Path,
    generated: Generated,
    plan: str | None,
    name: str,
    prompt: Prompt,
    index: int,
    seed: int,
    facts: dict[str, Any],
) -> Candidate:
    candidate = Candidate(
        id=name,
        prompt_id=prompt.id,
        prompt=prompt.text,
        index=index,
        seed=seed,
        plan=plan,
        image=f"images/{name}.png",
        latent=f"latents/{name}.safetensors",
        size=(generated.image.height, generated.image.width),
        sampling=facts,
    )
    save_image(generated.image, folder / candidate.image)
    with atomic(folder / candidate.latent) as partial:
        save_file({"latent": generated.latent.detach().cpu().contiguous()}, partial)
    return candidate


def rollout_stage(run: Run, k: int) -> None:
    """prompts.jsonl, candidates.jsonl, images/, latents/: made with the newest weights."""
    folder, config = run.round(k), run.config
    if finished(folder, "prompts") and finished(folder, "candidates"):
        return
    weights = run.newest(k)
    if not finished(folder, "prompts"):
        Processes.here().once(lambda: write_records(folder / "prompts.jsonl", round_prompts(config, k)))
    prompts = read_records(folder / "prompts.jsonl", Prompt)
    rollout(load_model(config, weights), prompts, config, k, folder)


def round_prompts(config: RunConfig, k: int) -> list[Prompt]:
    """The prompts of round ``k``: drawn anew each round."""
    return choose_prompts(config.prompts, config.prompt_count, seed_for(config.seed, k, "prompts"))
