"""Steps without numbers take what steps with numbers take, as torch's allocator and flop counter have it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks.gpu_check import random_records
from benchmarks.real_size import SMALL, random_model
from benchmarks.stages import UNKNOWN, _attention_operations
from srum.cli import app
from srum.config import RunConfig, load_config
from srum.errors import ModelError
from srum.models import EMBEDDED
from srum.models.bagel.config import PUBLISHED
from srum.models.checkpoints import load_tokenizer
from srum.processes import Processes
from srum.run import find_method
from srum.train import lora
from srum.train.data import candidate_mix
from srum.train.dry_run import DryRun, described
from srum.train.ledger import Ledger, carried
from srum.train.trainer import Trainer
from srum.train.weights import recomputed, trainable_parameters

CHECKPOINT = Path(__file__).parents[1] / "golden" / "bagel" / "checkpoint"
CPU = lambda _: nullcontext()  # noqa: E731 (nothing is done otherwise than here)
SETTINGS = ["rollout.size=[128,128]", "rollout.batch_size=2", "rollout.plan=false", "rollout.guidance=4"]
SETTINGS += ["judge.batch_size=1", "judge.max_tokens=8", "ground.max_regions=2"]
SETTINGS += ["train.precision=bf16", "train.text_dropout=0"]
LORA = ["train.lora.rank=4", "train.memory.frozen=bf16", "train.memory.checkpoint_activations=true"]


def test_what_is_alive_is_held_and_what_is_multiplied_is_counted() -> None:
    """A (2, 3) x (3, 5) product is 60 operations; views are free; what is dropped is given back; numbers are ones."""
    with Ledger() as ledger:
        weight = torch.empty(3, 5)
        held = [ledger.held]
        made = torch.ones(2, 3) @ weight
        held += [ledger.held, ledger.peak]
        view = made.t()
        del made
        held.append(ledger.held)
        del view
        held.append(ledger.held)
        assert weight.sum().item() == 1 and bool(torch.isfinite(weight.sum()))
        chosen = weight[torch.tensor([True, False, True])]
    assert held == [60, 100, 124, 100, 60]
    assert ledger.operations == 60 and chosen.shape == (2, 5)


def test_what_a_ring_carries() -> None:
    """Of 80 bytes among 4: 60 gathered or scattered, 120 summed in every process."""
    tensors = [torch.zeros(20), torch.zeros(5)]
    c10d = torch.ops.c10d
    assert carried(c10d._allgather_base_.default, tensors, 4) == 60
    assert carried(c10d._reduce_scatter_base_.default, tensors, 4) == 60
    assert carried(c10d.allreduce_.default, tensors, 4) == 120
    assert carried(torch.ops._c10d_functional.wait_tensor.default, tensors, 4) == 0


def taken(work: Callable[[], object]) -> int:
    """The most bytes that the allocator had given out during ``work``, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        work()
    events = log.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return int(max(torch.tensor(sizes).cumsum(0)))


def operations(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(UNKNOWN, _attention_operations)) as counter:
        work()
    return int(counter.get_total_flops())


def test_a_published_name_is_known_without_weights() -> None:
    (name,) = PUBLISHED
    assert described("BAGEL-7B-MoT") == described(name) == (PUBLISHED[name], None)
    with pytest.raises(ModelError, match="no model 'nothing': give a folder of BAGEL's, or one of ByteDance-Seed"):
        described("nothing")


@pytest.mark.slow
def test_the_command_prints_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the golden checkpoint, with FSDP2 among two."""
    monkeypatch.setenv("COLUMNS", "160")
    settings = [word for setting in [*SETTINGS, "rollout.size=[64,64]"] for word in ("--set", setting)]
    done = CliRunner().invoke(app, ["doctor", str(CHECKPOINT), "--dry-run", "--processes", "2", *settings])
    assert done.exit_code == 0, done.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.output.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["rollout", "judge", "train, region_nft"] and rows[2][2] == "2"


def real_step(run: RunConfig) -> tuple[int, int]:
    """Bytes beyond what is resident, and operations, of the third step of the same training with numbers."""
    model, config, method = random_model(SMALL, torch.device("cpu")), run.train, find_method(run.method)
    for _, parameter in model.named_parameters():
        parameter.requires_grad_()
    if config.memory.frozen == "fp32":
        model.network.float()
    records = random_records(model, config.batch_size, run.rollout.size)
    mix = candidate_mix(records, method.credits(records, run), config, 0)  # type: ignore[attr-defined]
    with (
        trainable_parameters(model, config.trainable) as chosen,
        recomputed(model.layers() if config.memory.checkpoint_activations else []),
    ):
        adapted = lora.adapted(model, list(chosen), config.lora) if config.lora.rank else nullcontext(list(chosen))
        with adapted as trained:
            feed = mix.feed(model, config, 0, Processes())
            trainer = Trainer(model, feed, method.objective(run), config, 0, trained)
            trainer.step(0)
            counted = operations(lambda: trainer.step(1))
            return taken(lambda: trainer.step(2)), counted


@pytest.mark.parametrize(
    "own", [[*LORA, "train.batch_size=6"], ["train.trainable=all", "method=srum", "train.batch_size=4"]]
)
def test_a_step_of_training_takes_what_it_takes_with_numbers(own: list[str]) -> None:
    run = load_config(None, [*SETTINGS, *own])
    cost = DryRun(SMALL, run, load_tokenizer(EMBEDDED["srum-tiny"]), CPU).training(1)
    peak, counted = real_step(run)
    assert cost.operations == pytest.approx(counted, rel=0.02)
    assert cost.peak - cost.resident == pytest.approx(peak, rel=0.15)
