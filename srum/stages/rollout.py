"""Rollout: prompts -> candidates, each an image, its clean latent and its planning text."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor

from srum import models
from srum.config import RunConfig
from srum.disk import require_room_for_images
from srum.drawing import draw_planned
from srum.exchange.chat import NoReply, Picture, Server, Wish
from srum.images import save_image
from srum.models.base import Sampling, UnifiedModel
from srum.processes import Processes
from srum.prompt_files import PROMPT_FILES, read_prompts
from srum.records import Candidate, Prompt
from srum.run import Run, console, load_model
from srum.run_dir import RunError, atomic, finished, read_records, run_stage, write_json, write_records
from srum.seeding import seed_for
from srum.shapes.prompts import SPLITS, prompt_set

CROWD = 10_000  # files of a folder; where a round has more candidates, they are in sub-folders of so many


def choose_prompts(source: str, count: int, seed: int, besides: Collection[str] = ()) -> list[Prompt]:
    """``count`` prompts of a set of the embedded world, or of a .jsonl or .txt file, drawn by ``seed``.

    A file that has no more gives all of its prompts, ``besides`` those of these texts; those drawn stay in the order of
    the file. Raises RunError for a file that cannot be read or has none left, and for what is neither a set nor such a
    file.
    """
    if source in SPLITS:
        return prompt_set(source, count, seed)
    prompts = [prompt for prompt in _of_file(source) if prompt.text not in besides]
    if not prompts:
        raise RunError(f"{source}: every prompt is held out; set eval.own_share=0, or bring prompts that differ")
    return _drawn(prompts, count, seed)


def own_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts of the config's file that no round has: a share of them, the same for every seed of the run.

    Of a set of the embedded world none. Raises as ``choose_prompts``.
    """
    if config.prompts in SPLITS or not config.eval.own_share:
        return []
    prompts = _of_file(config.prompts)
    return _drawn(prompts, min(config.eval.own_limit, int(config.eval.own_share * len(prompts))), 0)


def _of_file(source: str) -> list[Prompt]:
    if not source.endswith(PROMPT_FILES):
        sets, files = ", ".join(SPLITS), " or ".join(PROMPT_FILES)
        raise RunError(f"prompts: {source!r} is neither a set ({sets}) nor a {files} file")
    return read_prompts(Path(source))


def _drawn(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    drawn = random.Random(seed).sample(range(len(prompts)), min(count, len(prompts)))
    return [prompts[index] for index in sorted(drawn)]


@dataclass(frozen=True)
class Wanted:
    """An image that is to be drawn: of which prompt, the seed of its noise, and that of its plan where it plans."""

    prompt: str
    seed: int
    plan_seed: int | None


@dataclass(frozen=True)
class Made:
    """What came of it: the image, its clean latent, the plan that it was drawn after."""

    image: Image
    latent: Tensor
    plan: str | None


def rollout(
    model: UnifiedModel, prompts: Sequence[Prompt], config: RunConfig, round_index: int, folder: Path
) -> Sequence[Candidate]:
    """``candidates_per_prompt`` images of each prompt: ``candidates.jsonl``, ``images/``, ``latents/`` in ``folder``.

    The first ``rollout.planned`` of a prompt's candidates plan. A candidate's noise and plan have a seed each, of the
    run's seed, the round and its id. Finished batches of an interrupted rollout are kept. With ``rollout.server``, that
    draws and ``model`` only encodes; what it left undrawn is no candidate and is counted in ``rollout_counts.json``.
    Raises DiskFullError where the rest will not fit, RunError for a size that the model cannot draw and where a server
    drew nothing, and ServerError. Files of more than ``CROWD`` candidates are in sub-folders.
    """
    wanted = {
        f"{prompt.id}-{index}": (prompt, index) for prompt in prompts for index in range(config.candidates_per_prompt)
    }
    server = Server(**config.rollout.server.model_dump()) if config.rollout.server.url else None
    sampling = Sampling(**config.rollout.sampling())
    facts = config.rollout.model_dump(mode="json", exclude={"batch_size", "server"})
    if server:
        facts["server"] = {"url": server.url, "model": server.model}
    stems = {
        name: f"{number // CROWD:04d}/{name}" if len(wanted) > CROWD else name for number, name in enumerate(wanted)
    }
    planned = config.rollout.planned(config.candidates_per_prompt)
    undrawn: dict[str, str] = {}

    def work(batch: Mapping[str, tuple[Prompt, int]]) -> list[Candidate]:
        images = [
            Wanted(
                prompt.text,
                seed_for(config.seed, round_index, name, "rollout"),
                seed_for(config.seed, round_index, name, "plan") if index < planned else None,
            )
            for name, (prompt, index) in batch.items()
        ]
        made = drawn_by(server, model, images, sampling) if server else drawn(model, images, sampling)
        undrawn.update({name: one.why for name, one in zip(batch, made, strict=True) if isinstance(one, NoReply)})
        return [
            _keep(folder, one, name, stems[name], *batch[name], image.seed, facts)
            for one, name, image in zip(made, batch, images, strict=True)
            if isinstance(one, Made)
        ]

    try:
        model.latent_grid(config.rollout.size)
    except ValueError as error:
        raise RunError(f"rollout.size: {error}") from None
    latents = [f"latents/{stem}.safetensors" for stem in stems.values()]
    Processes.here().once(lambda: require_room_for_images(folder, config.rollout.size, latents, kinds=2))
    candidates = run_stage(
        folder, "candidates", Candidate, wanted, config.rollout.batch_size, work, gaps=server is not None
    )
    if server:
        whys = Processes.here().joined(list(undrawn.values()))
        Processes.here().once(lambda: _count(folder, len(wanted), len(candidates), whys))
    return candidates


def drawn(model: UnifiedModel, images: Sequence[Wanted], sampling: Sampling) -> list[Made]:
    """The images as ``model`` draws them, those that plan after their plans, all in one batch."""
    prompts, seeds = [image.prompt for image in images], [image.seed for image in images]
    made = draw_planned(model, prompts, sampling, seeds, [image.plan_seed for image in images])
    return [Made(one.image, one.latent, plan) for one, plan in made]


def drawn_by(server: Server, model: UnifiedModel, images: Sequence[Wanted], sampling: Sampling) -> list[Made | NoReply]:
    """The images as ``server`` draws them, resized as ``model`` encodes them; NoReply where none came.

    Beside OpenAI's fields it is told the seeds and the sampler's settings by the names of ``Sampling``, and ``plan``;
    ``srum serve`` knows them all. Raises ServerError.
    """
    settings = {name: value for name, value in asdict(sampling).items() if name != "size"}
    wishes = [
        Wish(
            image.prompt,
            sampling.size,
            image.seed,
            settings if image.plan_seed is None else settings | {"plan": True, "plan_seed": image.plan_seed},
        )
        for image in images
    ]
    replies = server.draw_all(wishes)
    resized = [model.resized(reply.image) for reply in replies if isinstance(reply, Picture)]
    encoded = iter(zip(resized, model.encode(resized) if resized else [], strict=True))
    return [reply if isinstance(reply, NoReply) else Made(*next(encoded), reply.text) for reply in replies]


def _count(folder: Path, asked: int, drawn: int, whys: Sequence[str]) -> None:
    """How many images a server drew, and for what reasons it did not draw the others. Raises RunError for none at all,
    after which the stage is as if it had not been."""
    if not drawn:
        (folder / "candidates.jsonl").unlink()
        raise RunError(
            f"rollout.server drew none of {len(whys)} images; of the first: {whys[0] if whys else 'nothing'}"
        )
    kinds = Counter(why.partition(":")[0] for why in whys)
    write_json(folder / "rollout_counts.json", {"asked": asked, "drawn": drawn, "not_drawn": kinds})
    if whys:
        console.print(f"{folder.name}: {len(whys)} images were not drawn; of the first: {' '.join(whys[0].split())}")


def _keep(
    folder: Path, made: Made, name: str, stem: str, prompt: Prompt, index: int, seed: int, facts: dict[str, Any]
) -> Candidate:
    candidate = Candidate(
        id=name,
        prompt_id=prompt.id,
        prompt=prompt.text,
        index=index,
        seed=seed,
        plan=made.plan,
        image=f"images/{stem}.png",
        latent=f"latents/{stem}.safetensors",
        size=(made.image.height, made.image.width),
        sampling=facts,
    )
    save_image(made.image, folder / candidate.image)
    with atomic(folder / candidate.latent) as partial:
        save_file({"latent": made.latent.detach().cpu().contiguous()}, partial)
    return candidate


def rollout_stage(run: Run, k: int) -> None:
    """prompts.jsonl, candidates.jsonl, images/, latents/: made with the newest weights, or by a server."""
    folder, config = run.round(k), run.config
    if finished(folder, "prompts") and finished(folder, "candidates"):
        return
    weights = run.newest(k)
    if not finished(folder, "prompts"):
        Processes.here().once(lambda: write_records(folder / "prompts.jsonl", round_prompts(run.pinned, k)))
    prompts = read_records(folder / "prompts.jsonl", Prompt)
    by_server = bool(config.rollout.server.url)
    model = models.load(weights, config.device, empty=True) if by_server else load_model(config, weights)
    rollout(model, prompts, config, k, folder)


def round_prompts(config: RunConfig, k: int) -> list[Prompt]:
    """The prompts of round ``k``: drawn anew each round, of a file besides those that are held out."""
    held_out = {prompt.text for prompt in own_prompts(config)}
    return choose_prompts(config.prompts, config.prompt_count, seed_for(config.seed, k, "prompts"), held_out)
