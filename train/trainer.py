"""The trainer: one loop, in which an objective is data (segments) and per-token weights.

Time runs from 0 (clean) to 1 (noise), the target is u = eps - x (``srum.flow``). Every sample draws its noise, timestep
and text dropout from its own seed (run, epoch, candidate), so that the batch size and an interruption change none of
them. Left out on purpose: gradient accumulation, weight averaging, several processes.
"""

from __future__ import annotations

import copy
import hashlib
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from srum.config import TrainConfig
from srum.flow import sample_timesteps, velocity_target
from srum.models import native_bfloat16
from srum.models.base import Segment, TrainingForward
from srum.seeding import seed_for
from train.checkpoint import resume, save_checkpoint
from train.data import TrainingRecord
from train.metrics import append_row, keep_rows, loss_by_timestep
from train.objectives import (
    Terms,
    region_nft_terms,
    sample_advantages,
    sft_terms,
    spread_by_blame,
    srum_terms,
    srum_weight,
)


class TrainableModel(Protocol):
    """What the trainer asks of a model; the first four are those of ``srum.models.base.UnifiedModel``."""

    @property
    def device(self) -> torch.device: ...

    def tokens(self, latent: Tensor) -> Tensor: ...

    def pack(self, samples: Sequence[Sequence[Segment]], noise: Sequence[Tensor], t: Sequence[float]) -> object: ...

    def velocity(self, batch: Any) -> TrainingForward: ...

    def named_parameters(self) -> Iterable[tuple[str, Parameter]]: ...

    def generation_parameters(self) -> Iterable[tuple[str, Parameter]]:
        """The generation expert: what ``trainable: generation`` trains."""
        ...

    def save(self, folder: Path) -> None:
        """Write the weights in the model's published layout."""
        ...


class TrainingError(RuntimeError):
    """Training cannot go on, or has done nothing."""


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


@dataclass(frozen=True)
class Batch:
    """Samples of one step. Per-token tensors have the order of ``TrainingForward.velocity``."""

    ids: list[str]
    packed: object
    v_target: Tensor  # (N, D)
    credit: Tensor  # (N,): the reward R (srum), the advantage A (region_nft), one (sft)
    alpha: Tensor  # (N,): the layout factor of Eq. 1
    t: Tensor  # (N,)
    sample: Tensor  # (N,): which sample of the batch the token belongs to


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
    kernels are deterministic; ``model`` must again be the one that entered, since region_nft compares with it. A
    finished folder returns at once, its weights in ``model``. Raises NonFiniteError, TrainingError (no records, a map
    that does not fit its latent, no weight changed) and CheckpointMismatch.
    """
    if not records:
        raise TrainingError("there is nothing to train on: no candidate has a reward map")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    with trainable_parameters(model, config.trainable) as parameters:
        old = frozen_copy(model) if config.objective == "region_nft" else None
        before = digest(parameters)
        identity = {
            "config": hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
            "seed": str(seed),
            "records": records_digest(records),
            "model": before,
        }
        optimizer = torch.optim.AdamW(
            list(parameters.values()), config.lr, config.betas, config.eps, config.weight_decay, foreach=False
        )
        start = resume(checkpoints, identity, parameters, optimizer)
        losses = [row["loss"] for row in keep_rows(metrics, start)]
        credits = token_credits(records, config)
        for step in tqdm(range(start, config.steps), "train", config.steps, initial=start, disable=not progress):
            batch = make_batch(model, records, credits, config, seed, step)
            row = update(model, old, batch, list(parameters.values()), optimizer, config, step)
            append_row(metrics, row)
            losses.append(row["loss"])
            done, last = step + 1, step + 1 == config.steps
            if last and digest(parameters) == before:
                raise TrainingError(f"{config.steps} steps changed no weight: every gradient was zero")
            if last or done % config.checkpoint_every == 0:
                save_checkpoint(checkpoints, done, identity, parameters, None if last else optimizer)
    if start < config.steps or not (folder / "model").exists():
        publish(model, folder / "model")
    return TrainResult(steps=config.steps, start=start, losses=losses, model=folder / "model")


@contextmanager
def trainable_parameters(model: TrainableModel, scope: str) -> Iterator[dict[str, Parameter]]:
    """The trained parameters by name; until the end of the block, the others require no gradients.

    What the model itself holds fixed (position tables, the autoencoder) stays so under either scope.
    """
    free = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    generation = {id(parameter) for _, parameter in model.generation_parameters()}
    chosen = {name: p for name, p in free.items() if scope == "all" or id(p) in generation}
    try:
        for name, parameter in free.items():
            parameter.requires_grad_(name in chosen)
        yield chosen
    finally:
        for parameter in free.values():
            parameter.requires_grad_(True)
            parameter.grad = None


def frozen_copy(model: TrainableModel) -> TrainableModel:
    """The model as it is now, sharing with it the parameters that are not trained."""
    shared = {id(parameter): parameter for _, parameter in model.named_parameters() if not parameter.requires_grad}
    old = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    for _, parameter in old.named_parameters():
        parameter.requires_grad_(False)
    return old


def token_credits(records: Sequence[TrainingRecord], config: TrainConfig) -> list[Tensor]:
    """What each record's tokens are weighted with, (h, w) each: R of Eq. 1, the advantage of region_nft, or one.

    With ``credit: sample`` the candidate's one score, on the map's scale, stands in every cell.
    """
    maps = [record.reward_map for record in records]
    if config.objective == "sft":
        return [torch.ones_like(values) for values in maps]
    if config.objective == "srum":
        return maps if config.credit == "region" else [torch.full_like(r.reward_map, r.mapped_score) for r in records]
    scores = torch.tensor([record.sample_score for record in records])
    groups = [record.candidate.prompt_id for record in records]
    advantages = sample_advantages(scores, groups, config.advantage_offset).tolist()
    if config.credit == "sample":
        return [torch.full_like(values, a) for values, a in zip(maps, advantages, strict=True)]
    return [spread_by_blame(a, r.reward_map, r.mapping) for a, r in zip(advantages, records, strict=True)]


def draw_order(count: int, start: int, stop: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, record) of the samples start <= k < stop of the endless stream of seeded permutations of the records."""
    epochs = range(start // count, (stop - 1) // count + 1)
    stream = [
        (epoch, int(index))
        for epoch in epochs
        for index in torch.randperm(count, generator=generator_for(seed, "order", epoch))
    ]
    return stream[start - epochs[0] * count : stop - epochs[0] * count]


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by ``parts``: the same numbers on every device."""
    return torch.Generator().manual_seed(seed_for(*parts))


def make_batch(
    model: TrainableModel,
    records: Sequence[TrainingRecord],
    credits: Sequence[Tensor],
    config: TrainConfig,
    seed: int,
    step: int,
) -> Batch:
    """The samples of one step, packed by the model."""
    order = draw_order(len(records), step * config.batch_size, (step + 1) * config.batch_size, seed)
    samples, noises, times, targets = [], [], [], []
    for epoch, index in order:
        record = records[index]
        clean = model.tokens(record.latent)
        if len(clean) != credits[index].numel():
            grid = tuple(credits[index].shape)
            raise TrainingError(f"candidate {record.candidate.id}: reward map {grid} on {len(clean)} latent tokens")
        generator = generator_for(seed, epoch, record.candidate.id)
        drop_text = torch.rand((), generator=generator).item() < config.text_dropout
        times.append(sample_timesteps(1, config.timestep_shift, generator).item())
        noises.append(torch.randn(clean.shape, generator=generator))
        targets.append(velocity_target(clean, noises[-1]))
        samples.append([s for s in segments(record, config.plan_in_context) if not (s.droppable and drop_text)])
    counts = torch.tensor([len(target) for target in targets])
    alphas = [records[index].alpha if config.use_layout else 1.0 for _, index in order]
    return Batch(
        ids=[records[index].candidate.id for _, index in order],
        packed=model.pack(samples, noises, times),
        v_target=torch.cat(targets).to(model.device),
        credit=torch.cat([credits[index].flatten() for _, index in order]).to(model.device),
        alpha=torch.tensor(alphas).repeat_interleave(counts).to(model.device),
        t=torch.tensor(times).repeat_interleave(counts).to(model.device),
        sample=torch.arange(len(order)).repeat_interleave(counts).to(model.device),
    )


def segments(record: TrainingRecord, plan_in_context: bool) -> list[Segment]:
    """Text -> image: the prompt, its plan where wanted and made, and the latent with its loss. Texts drop together."""
    texts = [record.candidate.prompt]
    if plan_in_context and record.candidate.plan is not None:
        texts.append(record.candidate.plan)
    return [
        *(Segment("text", text=text, droppable=True) for text in texts),
        Segment("noisy", latent=record.latent, loss=True),
    ]


def update(
    model: TrainableModel,
    old: TrainableModel | None,
    batch: Batch,
    parameters: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
) -> dict[str, Any]:
    """One optimiser step; the row of metrics. Raises NonFiniteError before any weight has changed."""
    lr = config.lr * lr_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    parts, weight = objective_terms(model, old, batch, config)
    terms = torch.stack(list(parts.values())).sum(dim=0)
    loss = terms.sum() / len(terms)
    if not torch.isfinite(loss):
        bad = batch.sample[~torch.isfinite(terms)].unique().tolist()
        raise NonFiniteError("loss", step, [batch.ids[index] for index in bad])
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip, foreach=False)
    if not torch.isfinite(norm):
        raise NonFiniteError("gradient", step, batch.ids)
    optimizer.step()
    return {
        "step": step + 1,
        "loss": loss.item(),
        "parts": {name: part.mean().item() for name, part in parts.items()},
        "grad_norm": norm.item(),
        "lr": lr,
        "mean_weight": weight.mean().item(),
        "loss_by_timestep": loss_by_timestep(batch.t, terms.detach()),
    }


def objective_terms(
    model: TrainableModel, old: TrainableModel | None, batch: Batch, config: TrainConfig
) -> tuple[Terms, Tensor]:
    """The parts of the objective and the weight of the squared error in it, each (N,)."""
    v_pred = predict(model, batch, config.precision)
    if config.objective == "sft":
        return sft_terms(v_pred, batch.v_target), batch.credit
    if config.objective == "srum":
        parts = srum_terms(v_pred, batch.v_target, batch.credit, batch.alpha, config.constraint_weight)
        return parts, srum_weight(batch.credit, batch.alpha, config.constraint_weight)
    assert old is not None, "region_nft compares with the model that entered"
    with torch.no_grad():
        v_old = predict(old, batch, config.precision)
    return region_nft_terms(v_pred, v_old, batch.v_target, batch.credit, config.beta), batch.credit


def predict(model: TrainableModel, batch: Batch, precision: str) -> Tensor:
    """The model's velocity (N, D) in float32."""
    bf16 = native_bfloat16(model.device) if precision == "auto" else precision == "bf16"
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        return model.velocity(batch.packed).velocity.float()


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


def publish(model: TrainableModel, folder: Path) -> None:
    """Save the model beside ``folder``, then put it in its place."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def digest(parameters: Mapping[str, Tensor]) -> str:
    """A checksum of the bits of some tensors, the same on every device."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {
        name: int(parameter.detach().contiguous().view(bits[parameter.element_size()]).sum(dtype=torch.int64))
        for name, parameter in sorted(parameters.items())
    }
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def records_digest(records: Sequence[TrainingRecord]) -> str:
    """A checksum of which candidates there are, in order, and what was judged of them."""
    total = hashlib.sha256()
    for record in records:
        total.update(repr((record.candidate.id, record.alpha, record.sample_score, record.mapping)).encode())
        total.update(record.reward_map.numpy().tobytes())
    return total.hexdigest()
