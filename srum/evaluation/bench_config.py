"""What a benchmark's images are made from: the config of their folder, and how it is chosen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from pydantic import ValidationError

from srum.config import CONFIG, ConfigError, Section
from srum.drawing import checked_sampling
from srum.evaluation.benchmark import Benchmark, Item, limited
from srum.models.base import Sampling
from srum.plugins import find
from srum.run_dir import RunError, write_text
from srum.yaml_files import YamlError, parse_yaml, read_yaml


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
        values[name] = parse_yaml(text, name)
    return checked_sampling(values)


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
        return BenchConfig.model_validate(read_yaml(path))
    except (YamlError, ValidationError) as error:
        raise RunError(f"{path} is not the config of a benchmark: {' '.join(str(error).split())[:200]}") from None


def file_name(evaluator: str) -> str:
    """What the files of an evaluator with this name are called after."""
    return re.sub(r"[^\w.-]+", "_", evaluator.partition(",")[0].rpartition("/")[2]).strip("_.")[:80]
