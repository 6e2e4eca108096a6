"""What two processes do together for ``test_sharding``: trainings of a small BAGEL, each into a folder of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from srum import tensors
from srum.config import RolloutConfig, RunConfig, config_class, parse_config
from srum.models.bagel import Bagel
from srum.models.base import Segment, TrainableModel
from srum.processes import Processes
from srum.records import Candidate
from srum.run import find_method
from srum.run_dir import atomic
from srum.train.data import TrainingRecord, candidate_mix
from srum.train.examples import Example
from srum.train.feed import Mix
from srum.train.methods.base import CandidateMethod
from srum.train.objective import Objective
from srum.train.sharding import local
from srum.train.trainer import DTYPES, Trainer, TrainResult, train

CHECKPOINT = Path(__file__).parents[1] / "golden" / "bagel" / "checkpoint"
PROMPTS = ("a red square", "a blue circle left of a green star", "two dogs", "three yellow triangles above a cat")
SIZES = ((32, 48), (64, 64), (16, 80))
# eps: else Adam makes a step of what is a rounding error of the gradient
SMOOTH = {"steps": 4, "batch_size": 4, "lr": 1e-3, "precision": "fp32", "eps": 1e-6, "checkpoint_every": 2}
CONFIGS: dict[str, dict[str, Any]] = {  # fields of train, and the method with fields of its own
    "generation": {"method": "region_nft", "old_decay": 0.6},
    "all": {"method": "srum", "trainable": "all", "replies": 3, "text_weight": 0.3},
    "odd": {"method": "sft", "batch_size": 1},  # fewer samples than processes
    "packs": {"method": "srum", "memory": {"pack_tokens": 60}},
    "seen": {"method": "region_nft", "batch_size": 2},  # some after an image: what rows begin with runs apart
    "lora": {
        "method": "region_nft",
        "lora": {"rank": 3},
        "old_decay": 0.6,
        "ema": 0.5,
        "samples": {"count": 2, "every": 2},
        "probes": 1,
        "memory": {"checkpoint_activations": True},
        "validation": {"share": 0.4, "every": 2},
    },
}

BFLOAT16 = CONFIGS["lora"] | {"steps": 2, "precision": "bf16", "memory": {"frozen": "bf16"}}


def records(model: Bagel, count: int = 6) -> list[TrainingRecord]:
    """Candidates of three sizes, judged at random."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for number in range(count):
        h, w = grid = model.latent_grid(size := SIZES[number % 3])
        candidate = Candidate(
            id=f"c{number}", prompt_id=f"p{number // 2}", prompt=PROMPTS[number % 4], index=number % 2, seed=number,
            image="images/c.png", latent="latents/c.safetensors", size=size,
        )  # fmt: skip
        latent = torch.randn(16, 2 * h, 2 * w, generator=generator)
        reward_map = torch.rand(grid, generator=generator) * 2 - 1
        score = torch.rand((), generator=generator).item() * 2 - 1
        made.append(TrainingRecord(candidate, latent, reward_map, mapping="signed", alpha=0.75, sample_score=score))
    return made


def sampled(records: list[TrainingRecord]) -> list[TrainingRecord]:
    """The records, as if a rollout had sampled them in three steps each at its size."""
    facts = RolloutConfig(timesteps=4, plan=False).model_dump(mode="json", exclude={"batch_size"})
    return [
        replace(r, candidate=r.candidate.model_copy(update={"sampling": facts | {"size": list(r.candidate.size)}}))
        for r in records
    ]


def replies(folder: Path) -> list[Example]:
    """What a judge said of three images, which are made in ``folder``, by every process its own."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, size in enumerate(((28, 42), (56, 28), (42, 42))):
        with atomic(folder / f"{os.getpid()}-{number}.png") as partial:
            Image.new("RGB", size, (60 * number, 90, 120)).save(partial, format="png")
        segments = [
            Segment("seen", image=folder / f"{os.getpid()}-{number}.png"),
            Segment("text", text=f"Is it {PROMPTS[number]}?"),
            Segment("text", text=f"Score: 0.{number}" * (number + 1), loss=True),
        ]
        made.append(Example(id=str(number), segments=segments))
    return made


def config_of(**values: Any) -> RunConfig:
    """The config of a method (region_nft) with these fields: its own, and those of ``train``."""
    own = config_class(values.get("method", "region_nft")).model_fields.keys() - {"train"}
    return parse_config(
        {name: value for name, value in values.items() if name in own}
        | {"train": {name: value for name, value in values.items() if name not in own}}
    )


def learn(
    model: TrainableModel,
    records: Sequence[TrainingRecord],
    config: RunConfig,
    folder: Path,
    seed: int = 3,
    replies: Sequence[Example] = (),
    seen: bool = False,
    **options: Any,
) -> TrainResult:
    """A training by the config's method on these records, ``seen``: of which every other one comes after an image."""
    mix, objective = learned(records, config, seed, replies)
    mix = looking(mix) if seen else mix
    return train(model, mix, objective, config.train, folder, seed, progress=False, candidates=records, **options)


def looking(mix: Mix) -> Mix:
    """The examples, and before every other one an image."""
    image = Segment("seen", image=torch.rand(3, 28, 42, generator=torch.Generator().manual_seed(2)) * 2 - 1)
    part, *others = mix.parts
    examples = [replace(e, segments=[image] * (n % 2) + [*e.segments]) for n, e in enumerate(part.examples)]
    return replace(mix, parts=[replace(part, examples=examples), *others])


def learned(
    records: Sequence[TrainingRecord], config: RunConfig, seed: int, replies: Sequence[Example] = ()
) -> tuple[Mix, Objective]:
    """What the config's method makes of these records."""
    method = find_method(config.method)
    assert isinstance(method, CandidateMethod)
    mix = candidate_mix(records, method.credits(records, config), config.train, seed, replies)
    return mix, method.objective(config)


def run(folder: Path, name: str, **changes: Any) -> TrainResult:
    """A training of ``CONFIGS``, or of ``changes`` alone, in this process or, where they are connected, in all."""
    config = config_of(**SMOOTH | CONFIGS.get(name, {}) | changes)
    precision = "bf16" if config.train.precision == "bf16" else "fp32"
    model = Bagel.load(CHECKPOINT, precision=precision, dtype=DTYPES[config.train.memory.frozen], empty=True)
    spoken = replies(folder / "images") if config.train.replies else []
    return learn(model, sampled(records(model)), config, folder, replies=spoken, seen=name == "seen")


@contextmanager
def interrupted(at: int) -> Iterator[None]:
    """Within the block a training stops before step ``at``."""
    step = Trainer.step

    def stopping(self: Trainer, number: int) -> dict[str, Any]:
        if number == at:
            raise KeyboardInterrupt
        return step(self, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", stopping)
        yield


@contextmanager
def reading() -> Iterator[list[int]]:
    """Within the block what is read of weight files is noted: the bytes of every piece."""
    read: list[int] = []

    class Noted:
        def __init__(self, source: Any) -> None:
            self.source = source

        def __enter__(self) -> Noted:
            return Noted(self.source.__enter__())

        def __exit__(self, *error: Any) -> None:
            self.source.__exit__(*error)

        def keys(self) -> list[str]:
            return self.source.keys()

        def get_slice(self, name: str) -> Noted:
            return Noted(self.source.get_slice(name))

        def __getitem__(self, part: Any) -> torch.Tensor:
            read.append((piece := self.source[part]).nbytes)
            return piece

    with pytest.MonkeyPatch.context() as patch:
        opened = tensors.safe_open
        patch.setattr(tensors, "safe_open", lambda *args, **options: Noted(opened(*args, **options)))
        yield read


def load_parts(file: Path) -> None:
    """Write what this process reads and holds of a network that is shared, in bytes."""
    model = Bagel.load(CHECKPOINT, empty=True)
    with reading() as read:
        config = config_of(method="sft")
        mix, objective = learned(records(model), config, 0)
        feed = mix.feed(model, config.train, 0, Processes.here())
        Trainer(model, feed, objective, config.train, 0, ["llm2vae.bias"], Processes.here())
    held = [local(parameter).untyped_storage().nbytes() for parameter in model.network.parameters()]
    file.write_text(json.dumps({"read": read, "held": held}))


def work(folder: Path) -> None:
    """What each of two processes does; ``folder / "from one"`` is a training that one process began."""
    load_parts(folder / f"parts-{Processes.here().rank}.json")
    for name in CONFIGS:
        run(folder / name, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srum.processes._here", replace(Processes.here(), whole=True))
        for name in CONFIGS:
            run(folder / f"whole {name}", name)
        with interrupted(at=3):
            run(folder / "whole to one", "generation")
    run(folder / "bfloat16", "bfloat16", **BFLOAT16)
    for part in ("again", "to one"):
        with interrupted(at=3):
            run(folder / part, "generation")
    run(folder / "again", "generation")
    run(folder / "from one", "generation")
