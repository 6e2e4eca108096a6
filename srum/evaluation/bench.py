"""A benchmark's run: images in the official layout, verdicts by an evaluator, a table. Each resumes by batches.

OUT/bench/NAME/SETTING/
  config.yaml                     what the images are made from
  images.jsonl  images/           in the official layout, with the files that the official scorer reads beside them
  verdicts-EVALUATOR.jsonl        a file per evaluator, over the same images
  table-EVALUATOR.json  .md       columns, figures, intervals, failures; both ways of counting
OUT/bench/NAME/replies/           of judges at temperature 0, by what was asked
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from srum import models
from srum.config import ConfigError, ServerConfig
from srum.disk import require_room_for_images
from srum.drawing import draw_planned
from srum.evaluation.bench_config import (
    BenchConfig,
    chosen_items,
    chosen_sampling,
    claim,
    file_name,
    folder_of,
    load_benchmark,
)
from srum.evaluation.bench_tables import write_table
from srum.evaluation.benchmark import Benchmark, Drawn, Evaluator, Failure, Item, Verdict
from srum.evaluation.judges import ChatJudge, load_evaluator
from srum.evaluation.leakage import Leakage, leakage
from srum.exchange.chat import Server
from srum.images import ImageError, open_image, save_image
from srum.models.base import Generated, Sampling, Segment, UnifiedModel, to_edit
from srum.processes import Processes
from srum.prompt_files import read_prompts
from srum.run_dir import RunError, alone_in, forget, inside, run_stage, write_text

AGAIN = (Failure.NO_IMAGE, Failure.NO_REPLY)  # failures that a later call tries again


# --- images


def make_images(
    benchmark: Benchmark, items: Sequence[Item], model: UnifiedModel, config: BenchConfig, folder: Path, batch_size: int
) -> list[Drawn]:
    """The images of the items in the official layout, and what is read beside them.

    An image has a seed of the config's and its item alone (``Benchmark.seed``), so that models compare image by image,
    and no number of processes and no interruption changes it (in bfloat16 the batch size does, by rounding). Raises
    RunError for a size that the model cannot draw, and MissingAbility.
    """
    try:
        model.latent_grid(config.sampling.size)
    except ValueError as error:
        raise RunError(f"size: {error}; set another one, such as --set size=[512,512]") from None
    Processes.here().once(lambda: _write_side_files(benchmark, items, folder / "images"))
    tiles = [item.path for item in items for _ in range(item.tiles)]
    Processes.here().once(lambda: require_room_for_images(folder / "images", config.sampling.size, tiles))

    def work(batch: Mapping[str, Item]) -> list[Drawn]:
        drawn = []
        made = _drawn(benchmark, list(batch.values()), model, config)
        for item, (image, plan, seed) in zip(batch.values(), made, strict=True):
            save_image(image, folder / "images" / item.path)
            drawn.append(Drawn(item_id=item.id, path=item.path, prompt=item.prompt, seed=seed, plan=plan))
        return drawn

    return list(run_stage(folder, "images", Drawn, {item.id: item for item in items}, batch_size, work))


def _write_side_files(benchmark: Benchmark, items: Sequence[Item], folder: Path) -> None:
    for name, text in benchmark.side_files(items).items():
        if not (folder / name).exists():
            write_text(folder / name, text)
    for item in items:
        place = benchmark.source_path(item)
        if place and not (folder / place).exists() and (image := benchmark.source(item)):
            save_image(image, folder / place)


def _drawn(
    benchmark: Benchmark, items: Sequence[Item], model: UnifiedModel, config: BenchConfig
) -> list[tuple[Image.Image, str | None, int]]:
    """Image, plan and seed of each item; of one with tiles, those of the first."""
    tiles = [(item, number) for item in items for number in range(item.tiles)]
    prompts = [item.prompt for item, _ in tiles]
    seeds, plan_seeds = (
        [benchmark.seed(config.seed, item, purpose, *([number] if item.tiles > 1 else [])) for item, number in tiles]
        for purpose in ("eval", "plan")
    )
    made: list[tuple[Generated, str | None]]
    if (sources := [benchmark.source(item) for item, _ in tiles]) and sources[0] is not None:
        made = [(one, None) for one in _edited(model, prompts, sources, config.sampling, seeds)]
    else:
        made = draw_planned(model, prompts, config.sampling, seeds, plan_seeds if config.think else [None] * len(tiles))
    each = ((one.image, plan, seed) for (one, plan), seed in zip(made, seeds, strict=True))
    return [_joined(list(islice(each, item.tiles))) for item in items]


def _edited(
    model: UnifiedModel, instructions: Sequence[str], sources: Sequence[Any], sampling: Sampling, seeds: Sequence[int]
) -> list[Generated]:
    begun = [to_edit(model, source) for source in sources]
    contexts = [
        [*image, Segment("text", text=instruction, droppable=True)]
        for (image, _), instruction in zip(begun, instructions, strict=True)
    ]
    return model.draw(contexts, sampling, seeds, sizes=[size for _, size in begun])


def _joined(tiles: Sequence[tuple[Image.Image, str | None, int]]) -> tuple[Image.Image, str | None, int]:
    """One image, or a square of several in reading order."""
    image, plan, seed = tiles[0]
    side = round(len(tiles) ** 0.5)
    grid = Image.new("RGB", (side * image.width, side * image.height))
    for number, (tile, _, _) in enumerate(tiles):
        grid.paste(tile, (number % side * image.width, number // side * image.height))
    return grid, plan, seed


# --- verdicts


def judge_images(
    benchmark: Benchmark, items: Sequence[Item], evaluator: Evaluator, images: Path, folder: Path, batch_size: int
) -> list[Verdict]:
    """The evaluator's verdicts on the ``images`` of the items, in a file of its own.

    Images that were not there and questions without a reply are tried again by the next call. Raises RunError for
    verdicts of another evaluator under the same name, and for a folder that has none of the images.
    """
    name = f"verdicts-{file_name(evaluator.name)}"
    Processes.here().once(lambda: _require_images(items, images))
    forget(folder, name, Verdict, lambda verdict: verdict.failure in AGAIN)

    def score(item: Item) -> Verdict:
        try:
            image = open_image(inside(images, item.path))
        except ImageError as error:
            return benchmark.missing(item, evaluator, str(error))
        return benchmark.score(item, image, evaluator)

    def work(batch: Mapping[str, Item]) -> list[Verdict]:
        with ThreadPoolExecutor(evaluator.concurrency) as pool:
            verdicts = list(pool.map(score, batch.values()))
        if isinstance(evaluator, ChatJudge):
            evaluator.require_answers(verdicts)
        return verdicts

    verdicts = list(run_stage(folder, name, Verdict, {item.id: item for item in items}, batch_size, work))
    others = {verdict.evaluator for verdict in verdicts} - {evaluator.name}
    if others:
        raise RunError(f"{folder / name}.jsonl has verdicts by {', '.join(others)}, not {evaluator.name}; delete it")
    return verdicts


def _require_images(items: Sequence[Item], images: Path) -> None:
    """RunError where no image is there at all, a warning where some are not."""
    absent = [item.path for item in items if not (images / item.path).is_file()]
    if len(absent) == len(items):
        raise RunError(f"{images} has none of the {len(items)} images of the layout, such as {absent[0]}")
    if absent:
        warnings.warn(f"{images} lacks {len(absent)} of {len(items)} images, such as {absent[0]}", stacklevel=2)


# --- the command


@dataclass(frozen=True)
class Request:
    """What ``srum bench`` was asked for; empty texts and None stand for the benchmark's own choice."""

    name: str
    model: str
    images: Path | None
    out: Path
    data: Path | None
    variant: str
    preset: str
    overrides: tuple[str, ...]
    think: bool
    samples: int | None
    limit: int | None
    seed: int
    evaluator: str
    judge: ServerConfig
    training: tuple[Path, ...]
    batch_size: int
    device: str


def run(request: Request) -> str:
    """Images, verdicts, table, as far as asked for; the table, or where the images are.

    Raises the errors of all steps, those of inputs before any image is made.
    """
    if bool(request.model) == (request.images is not None):
        raise ConfigError("give either --model, which draws the images, or --images, which are there")
    benchmark = load_benchmark(request.name, request.variant, request.data)
    items = chosen_items(benchmark, request.samples or benchmark.samples, request.limit)
    config = _config(request, benchmark)
    folder = folder_of(request.out, config, request.overrides)
    evaluator = None
    if (kind := request.evaluator or benchmark.evaluators[0]) != "none":
        evaluator = load_evaluator(kind, benchmark, _server(request, folder), request.device)
    with alone_in(folder):
        Processes.here().once(lambda: claim(folder, config))
        if request.model:
            model = models.load(request.model, request.device)
            make_images(benchmark, items, model, config, folder, request.batch_size)
            del model
        images = request.images or folder / "images"
        if evaluator is None:
            return f"{images}: {len(items)} images in the official layout"
        verdicts = judge_images(benchmark, items, evaluator, images, folder, request.batch_size)
        met = _leakage(request.training, items)
        return Processes.here().once(lambda: write_table(benchmark, config, verdicts, folder, met))


def _config(request: Request, benchmark: Benchmark) -> BenchConfig:
    preset = request.preset or next(iter(benchmark.presets))
    drawn: dict[str, Any] = {}
    if request.model:
        sampling = chosen_sampling(benchmark, preset, request.overrides)
        drawn = {"preset": preset, "seed": request.seed, "think": request.think, "sampling": sampling}
        drawn["batch_size"] = request.batch_size
    return BenchConfig(
        benchmark=request.name,
        variant=benchmark.variant,
        model=request.model,
        images=str(request.images or ""),
        samples=request.samples or benchmark.samples,
        limit=request.limit,
        data=benchmark.data.fingerprint,
        **drawn,
    )


def _server(request: Request, folder: Path) -> Server | None:
    return Server(**request.judge.model_dump(), cache=folder.parent / "replies") if request.judge.url else None


def _leakage(places: Sequence[Path], items: Sequence[Item]) -> Leakage | None:
    """What of the prompts in these files and runs the benchmark asks for; None without any."""
    if not places:
        return None
    files = [file for place in places for file in (sorted(place.glob("round-*/prompts.jsonl")) or [place])]
    prompts = [prompt.text for file in files for prompt in read_prompts(file)]
    return leakage(prompts, [item.prompt for item in items])
