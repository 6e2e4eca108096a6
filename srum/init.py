"""What ``srum init`` asks, and the config that it makes of the answers: a YAML file with a comment beside each field.

For srum-tiny that is the defaults with the answers; for a large model the settings of ``configs/``, which a test keeps
equal to these, by the number of GPUs: LoRA on few of them, the whole generation expert on more.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srum.config import RunConfig, Section, config_class
from srum.errors import SrumError
from srum.explain import meanings, plain, section_of
from srum.plugins import find
from srum.stages import GROUND

WIDTH = 110  # of a line
SMALL = 64  # pixels of the side of an image, up to which the defaults are right
SHARDED = 4  # GPUs from which the generation expert is trained whole (docs/training.md)
ASKED_OF_A_SERVER = {"soft": False, "reply": "free"}  # it gives no log-probabilities

# Those of configs/bagel-7b-lora-1gpu.yaml and bagel-7b-fsdp.yaml.
LARGE: dict[str, Any] = {
    "rounds": 1,
    "compare": [],
    "prompt_count": 1000,
    "candidates_per_prompt": 4,
    "rollout": {"timesteps": 50, "timestep_shift": 3.0, "guidance": 1.0, "plan": True, "batch_size": 4},
    "ground": {"min_relevance": 0.5},
    "judge": {"instructions": "paper", "max_tokens": 512, "batch_size": 8},
    "eval": {
        "count": 0,
        "timesteps": 50,
        "timestep_shift": 3.0,
        "guidance": 4.0,
        "guidance_interval": [0.4, 1.0],
        "batch_size": 4,
    },
    "train": {"steps": 200, "warmup_steps": 10, "precision": "bf16"},
}
OF_CANDIDATES = {"probes": 2, "validation": {"share": 0.02}, "samples": {"count": 4}}
MEMORY = {"checkpoint_activations": True, "frozen": "bf16"}
LORA = {"batch_size": 32, "lr": 1e-4, "lora": {"rank": 64, "alpha": 64}, "memory": MEMORY | {"pack_tokens": 9216}}
WHOLE = {"batch_size": 64, "lr": 1e-5, "memory": MEMORY | {"pack_tokens": 18432}}
SHOWN: Any = {
    "rounds": True,
    "compare": True,
    "prompt_count": True,
    "candidates_per_prompt": True,
    "train": {"steps", "batch_size", "lr"},
    "eval": {"count"},
}  # of the defaults, what is changed most often


@dataclass(frozen=True)
class Answers:
    """What is asked; ``judge`` is self, start, a model, an address of a server, or module:MyJudge."""

    model: str
    gpus: int
    prompts: str
    grounder: str
    judge: str
    judge_model: str
    method: str


def settings(answers: Answers, side: int) -> dict[str, Any]:
    """The nested values of a config for a model whose usual images have a ``side`` of so many pixels."""
    kind = config_class(answers.method)
    if side <= SMALL:
        values: dict[str, Any] = kind().model_dump(mode="json", include=SHOWN)
    else:
        values = _merged(LARGE, {"rollout": {"size": [side, side]}, "eval": {"size": [side, side]}})
        whole = answers.gpus >= SHARDED and kind().train.trainable == "generation"
        values = _merged(values, {"train": WHOLE if whole else LORA})
        values = _merged(values, {"train": OF_CANDIDATES} if GROUND in find("method", answers.method).stages else {})
    named = {"method": answers.method, "model": answers.model, "prompts": answers.prompts}
    return _merged(named | values, {"ground": {"grounder": answers.grounder}, "judge": judging(answers)})


def judging(answers: Answers) -> dict[str, Any]:
    """The section ``judge`` of that answer."""
    if answers.judge.startswith(("http://", "https://")):
        return {"server": {"url": answers.judge, "model": answers.judge_model}} | ASKED_OF_A_SERVER
    return {"by": answers.judge} if ":" in answers.judge else {"model": answers.judge}


def launch(path: Path, gpus: int) -> str:
    """The command that runs a config on so many GPUs."""
    command = f"srum run --config {path} --out runs/{path.stem}"
    return f"torchrun --nproc-per-node {gpus} --no-python {command}" if gpus > 1 else command


def usual_side(model: str) -> int:
    """The side in pixels of the model's usual images; of a repository of the hub, which is not fetched here, 1024."""
    from srum.doctor import Machine
    from srum.doctor import usual_side as side_of
    from srum.models import EMBEDDED, find

    return side_of(find(model), Machine.here("cpu")) if is_here(model, EMBEDDED) else 1024


def is_here(model: str, shipped: Mapping[str, Path]) -> bool:
    """Whether the model is shipped or a folder, so that it can be asked at once."""
    return model in shipped or Path(model).is_dir()


def write(path: Path, values: Mapping[str, Any], command: str) -> None:
    """The commented file. Raises SrumError where there is one already or it cannot be written."""
    head = f"# {command}\n#\n# What is left out has its default: srum config --config {path} prints it all, and\n"
    head += "# srum config --explain train.lr says what a field is.\n"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(head + "\n".join(commented(values, config_class(values["method"]))) + "\n")
    except FileExistsError:
        raise SrumError(f"{path} is there already; choose another name") from None
    except OSError as error:
        raise SrumError(f"cannot write {path}: {error.strerror}") from None


def commented(values: Mapping[str, Any], kind: type[Section], indent: str = "") -> Iterator[str]:
    """The lines of a YAML file of nested values, each field with its meaning beside it, or above where that is long."""
    said = meanings(kind)
    for name, value in values.items():
        if (section := section_of(kind.model_fields[name].annotation)) is not None:
            yield f"{indent}{name}:"
            yield from commented(value, section, f"{indent}  ")
            continue
        line, comment = f"{indent}{name}: {plain(value)}", said.get(name, "")
        if len(line) + len(comment) > WIDTH:
            yield from textwrap.wrap(comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            comment = ""
        yield f"{line}  # {comment}" if comment else line


def _merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with others over them, in the order of a config's fields."""
    both = dict(values)
    for name, value in more.items():
        both[name] = _merged(both.get(name, {}), value) if isinstance(value, Mapping) else value
    order = list(RunConfig.model_fields)
    return dict(sorted(both.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
