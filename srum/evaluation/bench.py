"""A benchmark's run: images in the official layout, verdicts by an evaluator, a table. Each resumes by batches.

OUT/bench/NAME/SETTING/
  config.yaml                     what the images are made from
  images.jsonl  images/           in the official layout, with the files that the official scorer reads beside them
  verdicts-EVALUATOR.jsonl        a file per evaluator, over the same images
  table-EVALUATOR.json  .md       columns, figures, intervals, failures; both ways of counting
  replies/                        of judges at temperature 0, by what was asked
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from srum import models
from srum.chat import Server
from srum.config import CONFIG, ConfigError, Section, ServerConfig
from srum.drawing import contexts_of, write_plans
from srum.evaluation.benchmark import Benchmark, Drawn, Evaluator, Failure, Item, Verdict, limited
from srum.evaluation.judges import ChatJudge, load_evaluator
from srum.evaluation.leakage import Leakage, leakage
from srum.evaluation.statistics import Estimate
from srum.evaluation.tables import Table, combined, differences, published_rows, same_evaluator, table_of
from srum.models.base import Generated, Sampling, Segment, UnifiedModel, to_edit
from srum.plugins import find, names
from srum.processes import Processes
from srum.run_dir import (
    PARTS,
    ImageError,
    RunError,
    alone_in,
    inside,
    open_image,
    read_prompts,
    read_records,
    run_stage,
    save_image,
    write_json,
    write_records,
    write_text,
)
from srum.seeding import seed_for

AGAIN = (Failure.NO_IMAGE, Failure.NO_REPLY)  # failures that a later call tries again


class BenchConfig(Section):
    """What the images of a folder are made from. ``images``: they are a user's; ``data``: what tells the benchmark's
    files from others; ``limit``: so many prompts of each category; ``batch_size``: of the images that are drawn."""

    benchmark: str
    variant: str = ""
    preset: str = ""
    model: str = ""
    images: str = ""
    seed: int = 0
    samples: int = 1
    limit: int | None = None
    think: bool = False
    sampling: Sampling = Sampling()
    data: str = ""
    batch_size: int = 0

    @property
    def setting(self) -> str:
        """What the row of a table says."""
        parts = [self.preset or "given images", self.variant, "think" if self.think else ""]
        parts.append(f"first {self.limit} prompts per category" if self.limit else "")
        return ", ".join(part for part in parts if part)


# --- what is asked for


def load_benchmark(name: str, variant: str = "", checkout: Path | None = None) -> Benchmark:
    """The benchmark of that name, or ``module:Name``. Raises PluginError, ConfigError and DataError."""
    kind: type[Benchmark] = find("benchmark", name)
    if variant and variant not in kind.variants:
        raise ConfigError(f"variant: {name} has no {variant!r}; it has {', '.join(kind.variants)}")
    return kind(variant, checkout)


def chosen_sampling(benchmark: Benchmark, preset: str, overrides: Sequence[str]) -> Sampling:
    """The preset's settings with overrides such as ``guidance=3``. Raises ConfigError."""
    if preset not in benchmark.presets:
        raise ConfigError(f"preset: {benchmark.name} has no {preset!r}; it has {', '.join(benchmark.presets)}")
    values = asdict(benchmark.presets[preset])
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or name not in values:
            raise ConfigError(f"{override!r} sets nothing; expected name=value, with a name of {', '.join(values)}")
        values[name] = yaml.safe_load(text)
    try:
        return TypeAdapter(Sampling).validate_python(values)
    except ValidationError as error:
        detail = error.errors()[0]
        raise ConfigError(f"{detail['loc'][0]}: {detail['msg']}, got {detail['input']!r}") from None


def chosen_items(benchmark: Benchmark, samples: int, limit: int | None) -> list[Item]:
    """The items, of which a ``limit`` keeps the first prompts of every category. Raises DataError."""
    items = benchmark.items(samples)
    return limited(items, limit) if limit else items


def folder_of(out: Path, config: BenchConfig, overrides: Sequence[str] = ()) -> Path:
    """Where such images are kept."""
    parts = [config.preset or "given", config.variant, "think" if config.think else ""]
    parts += [f"limit={config.limit}" if config.limit else "", *overrides]
    name = "-".join(re.sub(r"[^\w.=-]+", "_", part).strip("_") for part in parts if part)
    return out / "bench" / config.benchmark.rpartition(":")[2] / name


def claim(folder: Path, config: BenchConfig) -> None:
    """Make ``folder`` that of the config, or go on in it. Raises RunError, naming the fields, where it has another."""
    path = folder / CONFIG
    if path.exists():
        old, new = read_config(folder).model_dump(mode="json"), config.model_dump(mode="json")
        changes = [f"{name}: {old[name]} != {new[name]}" for name in new if old[name] != new[name]]
        if changes:
            raise RunError(f"{folder} has images of another config ({'; '.join(changes)}); choose another --out")
        return
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def read_config(folder: Path) -> BenchConfig:
    """The config of a folder. Raises RunError."""
    path = folder / CONFIG
    try:
        return BenchConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not the config of a benchmark: {' '.join(str(error).split())[:200]}") from None


# --- images


def make_images(
    benchmark: Benchmark, items: Sequence[Item], model: UnifiedModel, config: BenchConfig, folder: Path, batch_size: int
) -> list[Drawn]:
    """The images of the items in the official layout, and what is read beside them.

    An image has a seed of the config's, the benchmark and its item alone, so that models compare image by image, and no
    number of processes and no interruption changes it (in bfloat16 the batch size does, by rounding). Raises
    RunError for a size that the model cannot draw, and MissingAbility.
    """
    try:
        model.latent_grid(config.sampling.size)
    except ValueError as error:
        raise RunError(f"size: {error}; set another one, such as --set size=[512,512]") from None
    Processes.here().once(lambda: _write_side_files(benchmark, items, folder / "images"))

    def work(batch: Mapping[str, Item]) -> list[Drawn]:
        drawn = []
        made = _drawn(benchmark, list(batch.values()), model, config)
        for item, (image, plan, seed) in zip(batch.values(), made, strict=True):
            save_image(image, folder / "images" / item.path)
            drawn.append(Drawn(item_id=item.id, path=item.path, prompt=item.prompt, seed=seed, plan=plan))
        return drawn

    return run_stage(folder, "images", Drawn, {item.id: item for item in items}, batch_size, work)


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
    tiles = [(item, _seed(config, item, number)) for item in items for number in range(item.tiles)]
    seeds = [seed for _, seed in tiles]
    if (sources := [benchmark.source(item) for item, _ in tiles]) and sources[0] is not None:
        plans: list[str | None] = [None] * len(tiles)
        made = _edited(model, [item.prompt for item, _ in tiles], sources, config.sampling, seeds)
    else:
        prompts = [item.prompt for item, _ in tiles]
        plans = _plans(model, prompts, config, seeds)
        made = model.draw(contexts_of(model, prompts, plans), config.sampling, seeds)
    each = zip([result.image for result in made], plans, seeds, strict=True)
    return [_joined(list(islice(each, item.tiles))) for item in items]


def _plans(model: UnifiedModel, prompts: Sequence[str], config: BenchConfig, seeds: Sequence[int]) -> list[str | None]:
    if not config.think:
        return [None] * len(prompts)
    return [*write_plans(model, prompts, config.sampling, [seed_for(seed, "plan") for seed in seeds])]


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


def _seed(config: BenchConfig, item: Item, number: int) -> int:
    name = config.benchmark, item.id
    return seed_for(config.seed, *name) if item.tiles == 1 else seed_for(config.seed, *name, number)


# --- verdicts


def judge_images(
    benchmark: Benchmark, items: Sequence[Item], evaluator: Evaluator, images: Path, folder: Path, batch_size: int
) -> list[Verdict]:
    """The evaluator's verdicts on the ``images`` of the items, in a file of its own.

    Images that were not there and questions without a reply are tried again by the next call. Raises RunError for
    verdicts of another evaluator under the same name, and for a folder that has none of the images.
    """
    name = f"verdicts-{file_name(evaluator.name)}"
    Processes.here().once(lambda: _prepare(folder, name, items, images))

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

    verdicts = run_stage(folder, name, Verdict, {item.id: item for item in items}, batch_size, work)
    others = {verdict.evaluator for verdict in verdicts} - {evaluator.name}
    if others:
        raise RunError(f"{folder / name}.jsonl has verdicts by {', '.join(others)}, not {evaluator.name}; delete it")
    return verdicts


def file_name(evaluator: str) -> str:
    """What the files of an evaluator with this name are called after."""
    return re.sub(r"[^\w.-]+", "_", evaluator.partition(",")[0].rpartition("/")[2]).strip("_.")[:80]


def _prepare(folder: Path, name: str, items: Sequence[Item], images: Path) -> None:
    """Put what shall be tried again out of a finished file; RunError where no image is there at all."""
    absent = [item.path for item in items if not (images / item.path).is_file()]
    if len(absent) == len(items):
        raise RunError(f"{images} has none of the {len(items)} images of the layout, such as {absent[0]}")
    if absent:
        warnings.warn(f"{images} lacks {len(absent)} of {len(items)} images, such as {absent[0]}", stacklevel=2)
    path = folder / f"{name}.jsonl"
    if not path.exists() or not path.read_bytes().endswith(b"\n"):  # none, or one that run_stage mends
        return
    verdicts = read_records(path, Verdict)
    kept = [verdict for verdict in verdicts if verdict.failure not in AGAIN]
    if len(kept) < len(verdicts):
        write_records(folder / f"{name}{PARTS}" / "00000.jsonl", kept)
        path.unlink()


# --- tables


def comparison(outs: Sequence[Path]) -> str:
    """One table for each benchmark, variant and evaluator of the runs, a row for each of their settings.

    Differences are to the first row, paired over prompts: images of the same item. Raises RunError where there is none.
    """
    groups: dict[tuple[str, str, str], list[tuple[Path, BenchConfig, list[Verdict]]]] = {}
    for out in outs:
        for path in sorted(out.glob("bench/*/*/verdicts-*.jsonl")):
            config, verdicts = read_config(path.parent), read_records(path, Verdict)
            key = config.benchmark, config.variant, verdicts[0].evaluator
            groups.setdefault(key, []).append((out, config, verdicts))
    if not groups:
        raise RunError(f"{', '.join(map(str, outs))}: no verdicts of a benchmark in there")
    return "\n".join(_compared(*key, rows) for key, rows in groups.items())


def _compared(name: str, variant: str, evaluator: str, rows: Sequence[tuple[Path, BenchConfig, list[Verdict]]]) -> str:
    benchmark: Benchmark = find("benchmark", name)(variant)
    title = f"# {name}{f', {variant}' if variant else ''}, by {evaluator}"
    lines = [title, "", "| run | model | setting | n | failures | figures | to the first |", "|---" * 7 + "|"]
    for out, config, verdicts in rows:
        table = table_of(benchmark, verdicts)
        moved = {} if verdicts is rows[0][2] else differences(benchmark, verdicts, rows[0][2])
        cells = [str(out), config.model or config.images, config.setting, str(table.n)]
        cells += [str(sum(table.failures.values())), _figures(table.figures, benchmark.digits)]
        lines.append("| " + " | ".join([*cells, _figures(moved, benchmark.digits, "+")]) + " |")
    return "\n".join([*lines, "", *_published_lines(benchmark, evaluator)]) + "\n"


def _figures(figures: Mapping[str, Estimate], digits: int, sign: str = "") -> str:
    form = f"{sign}.{digits}f"
    return ", ".join(f"{name} {e.value:{form}} [{e.low:{form}}, {e.high:{form}}]" for name, e in figures.items())


def write_table(
    benchmark: Benchmark, config: BenchConfig, verdicts: Sequence[Verdict], folder: Path, leakage: Leakage | None = None
) -> str:
    """table-EVALUATOR.json and .md in ``folder``; the latter is returned."""
    evaluator = verdicts[0].evaluator
    ours, official = (table_of(benchmark, verdicts, way) for way in (False, True))
    stem = file_name(evaluator)
    facts = {"model": config.model or config.images, "setting": config.setting, "evaluator": evaluator}
    values = facts | {"ours": ours.to_json(), "official": official.to_json()}
    text = markdown(benchmark, config, evaluator, ours, official)
    if leakage is not None:
        values["leakage"] = asdict(leakage)
        text += f"\n{leakage}\n"
    write_json(folder / f"table-{stem}.json", values)
    write_text(folder / f"table-{stem}.md", text)
    return text


def markdown(benchmark: Benchmark, config: BenchConfig, evaluator: str, ours: Table, official: Table) -> str:
    """The table of one model with published rows under it."""
    names = [*ours.figures, *(name for name in ours.columns if name not in ours.figures)]
    failed = ", ".join(f"{count} {name}" for name, count in ours.failures.items()) or "none"
    lines = [
        f"# {benchmark.name}: {config.model or config.images}",
        "",
        f"{config.setting}; evaluator {evaluator}; {ours.n} images; failures: {failed}. Intervals of 95% over prompts.",
        "",
        "| | value | 95% | n | as the original counts |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        estimate = ours.figures.get(name) or ours.columns[name]
        original = official.figures.get(name) or official.columns.get(name)
        low, high = (f"{end:.{benchmark.digits}f}" for end in estimate.interval)
        cells = [name, f"{estimate.value:.{benchmark.digits}f}", f"{low} to {high}", str(ours.counts.get(name, ours.n))]
        lines.append("| " + " | ".join([*cells, f"{original.value:.{benchmark.digits}f}" if original else ""]) + " |")
    return "\n".join([*lines, "", *_published_lines(benchmark, evaluator)]) + "\n"


def _published_lines(benchmark: Benchmark, evaluator: str) -> list[str]:
    rows = [row for row in published_rows() if row["benchmark"] == benchmark.published]
    if not rows:
        return []
    lines = ["| published | setting | evaluator | figures | |", "|---|---|---|---|---|"]
    for row in rows:
        figures = combined(benchmark, row["values"])
        derived = ", ".join(f"{name} {value:.{benchmark.digits}f}" for name, value in figures.items())
        printed = f"printed {row['overall']}" if row.get("overall") is not None else "no overall printed"
        marked = "" if same_evaluator(evaluator, row["evaluator"]) else "another evaluator: not to be compared"
        cells = [row["model"], row["setting"], row["evaluator"], f"{printed}; from its categories: {derived or '-'}"]
        lines.append("| " + " | ".join([*cells, marked]) + " |")
    return lines


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


def listing() -> str:
    """What ``srum bench --list`` says: the shipped and the installed benchmarks, a line each."""
    lines = []
    for name in names("benchmark"):
        kind: type[Benchmark] = find("benchmark", name)
        variants = ", ".join(variant for variant in kind.variants if variant)
        origin = f"; of {kind.origin}" if kind.origin.repository else ""
        lines.append(
            f"{name}: {kind.about}\n    variants: {variants or '-'}; scored by {', '.join(kind.evaluators)}{origin}"
        )
    return "\n".join(lines)


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
