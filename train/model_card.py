"""The model card of an arm, written from its run: method, data, config, results with intervals, limits, licence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

import srum
from srum import models
from srum.config import RunConfig, differing_fields, parse_config
from srum.json_files import read_json
from srum.provenance import read_entries
from srum.records import Candidate
from srum.run import Run
from srum.run_dir import MADE_WITH, read_records

TEMPLATES = Path(__file__).parent / "templates"
CARD = "README.md"
# Not of the recipe, said elsewhere on the card, or nobody's business.
LEFT_OUT = {"prompts", "model", "method", "compare", "rounds", "device", "judge.server.url", "eval.prompts"}
SNIPPET = """\
from srum import models
from srum.drawing import draw_prompts
from srum.models.base import Sampling

model = {load}
sampling = Sampling({sampling})
(made,) = draw_prompts(model, [{prompt!r}], sampling, seeds=[{seed}])
made.image.save("image.png")"""


def model_card(run: Run, arm: str, k: int, name: str, prompt: str, seed: int, adapter: bool) -> ModelCard:
    """The card of what ``arm`` is after round ``k``, to be loaded by ``name``; ``prompt`` and ``seed`` are those of its
    example."""
    config, method = run.arms[arm].config, run.arms[arm].method
    base, licence = base_of(config.model), licence_of(config.model)
    results = read_json(run.folder / "summary.json") if (run.folder / "summary.json").exists() else {}
    data = ModelCardData(
        base_model=base,
        license=licence or "other",
        license_name=None if licence else "unknown",
        library_name="peft" if adapter else "srum",
        pipeline_tag="text-to-image",
        tags=["srum", method.name],
        model_name=Path(name).name,
        eval_results=[_accuracy(results[arm], config)] if arm in results else None,
    )
    template = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined)
    page = template.get_template("model_card.md.j2").render(
        name=Path(name).name,
        base=base,
        licence=licence,
        adapter=adapter,
        config=config,
        label=method.label,
        rounds=f"{k + 1} rounds" if k else "one round",
        prompts=_named(config.prompts),
        candidates=sum(_candidates(run, number) for number in range(k + 1)),
        judge=judge_of(config),
        made_with=_made_with(run),
        changed=_changed(config),
        results={row: results[row] for row in ("base", arm) if arm in results},
        eval_prompts=_named(config.eval.prompts),
        prompt=prompt,
        snippet=snippet(name, base, prompt, seed, config, adapter),
        version=srum.__version__,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{page}\n")


def snippet(name: str, base: str, prompt: str, seed: int, config: RunConfig, adapter: bool) -> str:
    """Code that draws the example again."""
    sampling = example_sampling(config)
    settings = ", ".join(f"{field}={value!r}" for field, value in sampling.items())
    load = f"models.load({(base if adapter else name)!r})"
    code = SNIPPET.format(load=load, sampling=settings, prompt=prompt, seed=seed)
    if not adapter:
        return code
    code = code.replace("import Sampling\n", "import Sampling\nfrom srum.train.lora import add_adapter\n")
    return code.replace("\nsampling =", f'\nadd_adapter(model.network, "{name}")\nsampling =')


def example_sampling(config: RunConfig) -> dict[str, Any]:
    """How the example is drawn: as the evaluation draws, or where there is none the rollout."""
    return (config.eval if config.eval.count else config.rollout).sampling()


def base_of(model: str) -> str:
    """The name of the model that entered: of a published folder what its card names as base, of another its own."""
    named = _card_of(model).get("base_model")
    return str(named) if named else Path(model).name if Path(model).is_dir() else model


def licence_of(model: str) -> str | None:
    """What the card of the model that entered says of its licence; None where nothing does."""
    if model in models.EMBEDDED:
        return "apache-2.0"  # the package's own
    said = _card_of(model).get("license")
    return str(said) if said else None


def judge_of(config: RunConfig) -> str:
    """Who judged, in words."""
    judge = config.judge
    if judge.reward or judge.by != "self":
        return f"`{judge.reward or judge.by}`"
    if judge.server.url:
        return f"{judge.server.model}, on a server"
    return {"self": "the model itself", "start": "the base model"}.get(judge.model, base_of(judge.model))


def _card_of(model: str) -> dict[str, Any]:
    """The front matter of the card in the model's folder, or in the hub's cache of it; nothing is fetched."""
    folder = models.EMBEDDED.get(model, Path(model))
    if not folder.is_dir() and models.HUB_ID.fullmatch(model):
        folder = models.find(model)
    card = folder / CARD
    return (metadata_load(card) or {}) if card.is_file() else {}


def _accuracy(result: dict[str, Any], config: RunConfig) -> EvalResult:
    return EvalResult(
        task_type="text-to-image",
        dataset_type="srum-shapes",
        dataset_name=f"embedded world, {_named(config.eval.prompts)}",
        metric_type="accuracy",
        metric_value=round(result["accuracy"], 1),
        metric_name="percent right by the exact checker",
    )


def _changed(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The fields of the recipe that are not at their defaults."""
    for line in differing_fields(parse_config({"method": config.method}), config, besides=LEFT_OUT):
        name, _, values = line.partition(": ")
        yield name, values.partition(" != ")[2]


def _candidates(run: Run, k: int) -> int:
    path = run.round(k) / "candidates.jsonl"
    return len(read_records(path, Candidate)) if path.exists() else 0


def _made_with(run: Run) -> str:
    entries = read_entries(run.folder / MADE_WITH)
    kept = ("srum", "commit", "torch", "transformers", "device")
    return ", ".join(f"{name} {str(entries[-1][name])[:40]}" for name in kept if entries and name in entries[-1])


def _named(prompts: str) -> str:
    """The name of a set or file of prompts, without its folder."""
    return Path(prompts).name
