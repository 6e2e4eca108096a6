"""The trainer: one loop, in which an objective is data (segments) and per-token weights.

Time runs from 0 (clean) to 1 (noise), the target is u = eps - x (``srum.flow``). A step's samples run in packs, one
after the other and side by side in several processes; the loss is the mean over all tokens of the step, so that
neither changes it (``train.sequences``, ``train.sharding``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from srum.config import TrainConfig
from srum.models import native_bfloat16
from train.checkpoint import Checkpoints, State, optimizer_state
from train.data import TrainingRecord
from train.metrics import append_row, keep_rows, token_means, token_sums
from train.objectives import Terms, region_nft_terms, sft_terms, srum_terms, srum_weight
from train.sequences import (
    Pack,
    TrainingError,
    cut,
    draw,
    draw_order,
    generator_for,
    make_pack,
    segments,
    token_credits,
)
from train.sharding import Processes, shard, whole
from train.weights import Copy, TrainableModel, digest, publish, trainable_parameters

__all__ = [
    "NonFiniteError",
    "TrainResult",
    "Trainer",
    "TrainingError",
    "token_credits",
    "train",
    "trainable_parameters",
]


class NonFiniteError(TrainingError):
    """A loss or gradient is NaN or infinite; ``candidate_ids`` are the samples it came from. No weight has taken it."""

    def __init__(self, what: str, step: int, candidate_ids: Sequence[str]) -> None:
        super().__init__(f"non-finite {what} in step {step}, candidates {', '.join(candidate_ids)}")
        self.candidate_ids = list(candidate_ids)


@dataclass(frozen=True)
class TrainResult:
    """``steps`` done in all, ``start`` of them before this call; the loss of every step; the folder of the weights."""

    steps: int
    start: int
    losses: list[float]
    model: Path


def train(
    model: TrainableModel,
    records: Sequence[TrainingRecord],
    config: TrainConfig,
    folder: Path | str,
    seed: int,
    progress: bool = True,
) -> TrainResult:
    """Train ``model`` in place and write ``metrics.jsonl``, ``checkpoints/`` and at the end ``model/`` into ``folder``.

    An interrupted folder goes on from its newest checkpoint as if it had not stopped, bit for bit where the device's
    kernels are deterministic and the number of processes is the same; ``model`` must again be the one that entered,
    since region_nft compares with it. A finished folder returns at once, its weights in ``model``.

    In several processes (a process group of torch) all call this alike, with a folder that they share; the network of
    ``model`` is then shared among them, and only ``model/`` has it whole.

    Raises NonFiniteError, TrainingError (no records, a map that does not fit its latent, no weight changed) and
    CheckpointMismatch.
    """
    if not records:
        raise TrainingError("there is nothing to train on: no candidate has a reward map")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics, processes = folder / "metrics.jsonl", Processes.here()
    with trainable_parameters(model, config.trainable) as chosen:
        trainer = Trainer(model, records, config, seed, list(chosen), processes)
        before = digest(trainer.parameters, processes)
        identity = {
            "config": hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
            "seed": str(seed),
            "records": records_digest(records),
            "model": before,
        }
        checkpoints = Checkpoints(folder / "checkpoints", identity, processes, background=model.device.type == "cuda")
        start = checkpoints.resume(trainer.state(), trainer.parameters, trainer.optimizer)
        first = processes.rank == 0
        losses = [row["loss"] for row in keep_rows(metrics, start)] if first else []
        hidden = not (progress and first)
        for step in tqdm(range(start, config.steps), "train", config.steps, initial=start, disable=hidden):
            row = trainer.step(step)
            if first:
                append_row(metrics, row)
                losses.append(row["loss"])
            done, last = step + 1, step + 1 == config.steps
            if last and digest(trainer.parameters, processes) == before:
                raise TrainingError(f"{config.steps} steps changed no weight: every gradient was zero")
            if last or done % config.checkpoint_every == 0:
                checkpoints.save(done, trainer.state(with_optimizer=not last), finished=last)
    unpublished = processes.joined([not (folder / "model").exists()] if first else [])
    if start < config.steps or any(unpublished):
        publish(model, folder / "model", processes)
    return TrainResult(steps=config.steps, start=start, losses=losses, model=folder / "model")


class Trainer:
    """A model on its way: the trained ``parameters`` by name, the optimiser, and what entered, where it is needed.

    The model must require gradients of the parameters ``trained`` alone. In several processes it is sharded here.
    """

    def __init__(
        self,
        model: TrainableModel,
        records: Sequence[TrainingRecord],
        config: TrainConfig,
        seed: int,
        trained: Sequence[str],
        processes: Processes = Processes(),  # noqa: B008 (frozen)
    ) -> None:
        self.model, self.records, self.config, self.seed, self.processes = model, records, config, seed, processes
        self.credits = token_credits(records, config)
        self.lengths = [model.length(segments(record, config.plan_in_context)) for record in records]
        auto = native_bfloat16(model.device)
        self.bfloat16 = auto if config.precision == "auto" else config.precision == "bf16"
        self.root = shard(model, processes, self.bfloat16) if processes.count > 1 else None
        named = dict(model.named_parameters())
        self.parameters = {name: named[name] for name in trained}
        self.entered = Copy(self.parameters) if config.objective == "region_nft" else None
        # foreach: the fused loops over many tensors do not take sharded ones
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), config.lr, config.betas, config.eps, config.weight_decay, foreach=False
        )

    def state(self, with_optimizer: bool = False) -> State:
        """What a checkpoint holds: the trained weights, which it shares, and the optimiser's tensors."""
        state: State = {"weights": {name: parameter.detach() for name, parameter in self.parameters.items()}}
        return state | {"optimizer": optimizer_state(self.optimizer, self.parameters)} if with_optimizer else state

    def step(self, step: int) -> dict[str, Any]:
        """One optimiser step; the row of metrics. Raises NonFiniteError before any weight has changed."""
        lr = self.config.lr * lr_factor(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        size = self.config.batch_size
        order = draw_order(len(self.records), step * size, (step + 1) * size, self.seed)
        tokens = sum(self.credits[index].numel() for _, index in order)
        self.optimizer.zero_grad()
        sums: Tensor | float = 0.0
        for members, counted in self.own_packs(order):
            parts, weight, pack = self.terms(members)
            terms = torch.stack(list(parts.values())).sum(dim=0)
            loss = terms.sum() / tokens
            bad = [] if torch.isfinite(loss) else pack.sample[~torch.isfinite(terms)].unique().tolist()
            if named := self.processes.joined([pack.ids[index] for index in bad]):
                raise NonFiniteError("loss", step, named)
            (loss * (self.processes.count * counted)).backward()  # gradients become means over the processes
            sums = sums + counted * token_sums(parts, weight, pack.t)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip, foreach=False))
        if not torch.isfinite(norm):
            raise NonFiniteError("gradient", step, [self.records[index].candidate.id for _, index in order])
        self.optimizer.step()
        assert isinstance(sums, Tensor)
        means = token_means(self.processes.total(sums), list(parts))
        return {"step": step + 1, "loss": means.pop("loss"), "grad_norm": norm.item(), "lr": lr} | means

    def own_packs(self, order: Sequence[tuple[int, int]]) -> list[tuple[list[tuple[int, int]], bool]]:
        """This process's packs of a step, (epoch, record) of each sample, and whether a pack counts.

        All processes have the same number, since they gather weights and sum gradients together; where there are fewer
        samples than processes, a pack of another stands in that does not count.
        """
        packs = cut([self.lengths[index] for _, index in order], self.config.memory.pack_tokens, self.processes.count)
        own = packs[self.processes.rank :: self.processes.count]
        return [([order[k] for k in pack or packs[0]], bool(pack)) for pack in own]

    def terms(self, members: Sequence[tuple[int, int]]) -> tuple[Terms, Tensor, Pack]:
        """The parts of the objective and the weight of the squared error in it, (N,) each, and the pack they are of."""
        config = self.config
        samples = [
            draw(
                self.model, record := self.records[index], self.credits[index], config,
                generator_for(self.seed, epoch, record.candidate.id),
            )
            for epoch, index in members
        ]  # fmt: skip
        pack = make_pack(self.model, samples, config.use_layout)
        v_old = None
        if self.entered is not None:
            with torch.no_grad(), self.entered.in_place():
                v_old = self.predict(pack)
        return *objective_terms(self.predict(pack), v_old, pack, config), pack

    def predict(self, pack: Pack) -> Tensor:
        """The model's velocity (N, D) in float32."""

        def velocity() -> Tensor:
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16):
                return self.model.velocity(pack.packed).velocity.float()

        return velocity() if self.root is None else self.root(velocity)


def objective_terms(v_pred: Tensor, v_old: Tensor | None, pack: Pack, config: TrainConfig) -> tuple[Terms, Tensor]:
    """The parts of the objective and the weight of the squared error in it, each (N,)."""
    if config.objective == "sft":
        return sft_terms(v_pred, pack.v_target), pack.credit
    if config.objective == "srum":
        parts = srum_terms(v_pred, pack.v_target, pack.credit, pack.alpha, config.constraint_weight)
        return parts, srum_weight(pack.credit, pack.alpha, config.constraint_weight)
    assert v_old is not None, "region_nft compares with the model that entered"
    return region_nft_terms(v_pred, v_old, pack.v_target, pack.credit, config.beta), pack.credit


def lr_factor(step: int, config: TrainConfig) -> float:
    """Share of the learning rate in step 0, 1, ...: linear warm-up, then constant, or down towards 0 after the last."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))


def records_digest(records: Sequence[TrainingRecord]) -> str:
    """A checksum of which candidates there are, in order, and what was judged of them."""
    total = hashlib.sha256()
    for record in records:
        total.update(repr((record.candidate.id, record.alpha, record.sample_score, record.mapping)).encode())
        total.update(record.reward_map.numpy().tobytes())
    return total.hexdigest()
