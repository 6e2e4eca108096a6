"""The trainer: one loop, in which an objective is data (segments) and per-token weights.

Time runs from 0 (clean) to 1 (noise), the target is u = eps - x (``srum.flow``). A step's samples run in packs, one
after the other and side by side in several processes; the loss is the mean over all tokens of the step, so that
neither changes it (``train.sequences``, ``train.sharding``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from srum.config import TrainConfig
from srum.models import native_bfloat16
from srum.models.base import Generated
from srum.processes import Processes
from srum.run_dir import open_image
from train import lora
from train.checkpoint import Checkpoints, State
from train.data import Reply, TrainingRecord, hold_out
from train.metrics import TIMESTEP_BINS, Log, token_means, token_sums
from train.objectives import Terms, region_nft_terms, sft_terms, srum_terms, srum_weight
from train.optimizer import make_optimizer, optimizer_state, set_rate
from train.probes import check_reproduction, probed, sample_again, save_samples, shown
from train.sequences import (
    Pack,
    Sample,
    TrainingError,
    at_every_timestep,
    cut,
    draw,
    draw_order,
    generator_for,
    make_pack,
    segments,
    token_credits,
)
from train.sharding import shard, whole
from train.tracking import tracked
from train.weights import Copy, TrainableModel, digest, publish, recomputed, trainable_parameters

__all__ = [
    "NonFiniteError",
    "TrainResult",
    "Trainer",
    "TrainingError",
    "token_credits",
    "train",
    "trainable_parameters",
]


T = TypeVar("T")
IN_BACKGROUND = frozenset({"cuda"})  # devices that compute while a checkpoint is written
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NonFiniteError(TrainingError):
    """A loss or gradient is NaN or infinite; ``candidate_ids`` are the samples it came from. No weight has taken it."""

    def __init__(self, what: str, step: int, candidate_ids: Sequence[str]) -> None:
        super().__init__(f"non-finite {what} in step {step}, candidates {', '.join(candidate_ids)}")
        self.candidate_ids = list(candidate_ids)


@dataclass(frozen=True)
class TrainResult:
    """``steps`` done in all, ``start`` of them before this call, and the folder of the weights.

    ``losses`` of every step, in process 0; None where the step was left out (``on_nonfinite: skip``).
    """

    steps: int
    start: int
    losses: list[float | None]
    model: Path


def train(
    model: TrainableModel,
    records: Sequence[TrainingRecord],
    config: TrainConfig,
    folder: Path | str,
    seed: int,
    progress: bool = True,
    replies: Sequence[Reply] = (),
    reproduces: bool = False,
) -> TrainResult:
    """Train ``model`` in place and write ``metrics.jsonl``, ``checkpoints/`` and at the end ``model/`` into ``folder``.

    Where asked for, ``validation.jsonl``, ``samples/step-00000050/ID.png``, and ``adapter/``, the LoRA updates in
    PEFT's format, which ``model/`` has merged. A network that was loaded empty is filled here.

    An interrupted folder goes on from its newest checkpoint as if it had not stopped, bit for bit where the device's
    kernels are deterministic and the number of processes is the same; ``model`` must again be the one that entered,
    since region_nft compares with it. A finished folder returns at once, its weights in ``model``.

    ``replies`` are learned as text where ``replies.weight`` is above zero. ``reproduces``: these weights made the
    candidates, and have to make the probes again.

    In several processes (a process group of torch) all call this alike, with a folder that they share; the network of
    ``model`` is then shared among them, and only ``model/`` has it whole.

    Raises NonFiniteError, TrainingError (no records, a map that does not fit its latent, probes that come out
    otherwise, no weight changed, nor what is sampled) and CheckpointMismatch.
    """
    training, held_out = hold_out(records, config.validation.share, seed)
    if not training:
        raise TrainingError("there is nothing to train on: no candidate has a reward map")
    if config.replies.weight and not replies:
        raise TrainingError("train.replies.weight: there is no reply to learn; the judge's were unreadable, or forced")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    processes = Processes.here()
    first = processes.rank == 0
    probes, pictured = probed(records, config.probes), shown(records, config.samples.count)
    with ExitStack() as stack:
        tell = stack.enter_context(tracked(config.tracker, folder / "tracker")) if config.tracker and first else None
        log = Log(folder if first else None, tell)
        chosen = list(stack.enter_context(trainable_parameters(model, config.trainable)))
        trained = chosen
        if config.lora.rank:
            trained = stack.enter_context(lora.adapted(model, chosen, config.lora))
        if config.memory.checkpoint_activations:
            stack.enter_context(recomputed(model.layers()))
        trainer = Trainer(model, training, config, seed, trained, held_out, replies, processes)
        sampled = trainer.sample(probes)
        if reproduces:
            check_reproduction(probes, sampled)
        identity = {
            "config": hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
            "seed": str(seed),
            "records": records_digest(records, replies if config.replies.weight else ()),
            "model": digest({n: p for n, p in lora.beneath(model.network).items() if n in chosen}, processes),
        }
        before = digest(trainer.parameters, processes)
        checkpoints = Checkpoints(folder / "checkpoints", identity, processes, model.device.type in IN_BACKGROUND)
        start = checkpoints.resume(trainer.state(), trainer.parameters, trainer.optimizer)
        losses = [row["loss"] for row in log.keep("metrics", start)]
        after_the_last = start == config.steps  # one more than those before a step
        log.keep("validation", -(-start // config.validation.every) + after_the_last)

        def look(done: int, last: bool) -> None:
            """What is wanted of the weights after so many steps: validation, samples."""
            if held_out and (last or done % config.validation.every == 0):
                log.append("validation", {"step": done} | trainer.validate())
            if pictured and (last or done % config.samples.every == 0):
                made = trainer.sample(pictured)
                if first:
                    save_samples(pictured, made, folder / "samples" / f"step-{done:08d}")

        for step in tqdm(
            range(start, config.steps), "train", config.steps, initial=start, disable=not (progress and first)
        ):
            look(step, last=False)
            row = trainer.step(step)
            log.append("metrics", row)
            losses.append(row["loss"])
            done, last = step + 1, step + 1 == config.steps
            if last and digest(trainer.parameters, processes) == before:
                raise TrainingError(f"{config.steps} steps changed no weight: every gradient was zero or left out")
            if last:
                look(done, last)
            if last or done % config.checkpoint_every == 0:
                checkpoints.save(done, trainer.state(with_optimizer=not last), finished=last)
        adapter = trainer.settle()
        after = trainer.sample(probes)
    unpublished = processes.joined([not (folder / "model").exists()] if first else [])
    if start < config.steps or any(unpublished):
        if probes and all(torch.equal(a.latent, b.latent) for a, b in zip(sampled, after, strict=True)):
            raise TrainingError(f"{config.steps} steps changed weights, but nothing that is sampled")
        if adapter and first:
            lora.save_adapter(adapter, config.lora, folder / "adapter")
        publish(model, folder / "model", DTYPES[config.memory.frozen], processes)
    return TrainResult(steps=config.steps, start=start, losses=losses, model=folder / "model")


class Trainer:
    """A model on its way: the trained ``parameters`` by name, the optimiser, the weights of v_old and the average.

    The model must require gradients of the parameters ``trained`` alone, which become float32 here; in several
    processes it is sharded here, and where it is empty, filled: each process reads its own part.
    """

    def __init__(
        self,
        model: TrainableModel,
        records: Sequence[TrainingRecord],
        config: TrainConfig,
        seed: int,
        trained: Sequence[str],
        held_out: Sequence[TrainingRecord] = (),
        replies: Sequence[Reply] = (),
        processes: Processes = Processes(),  # noqa: B008 (frozen)
    ) -> None:
        self.model, self.records, self.config, self.seed, self.processes = model, records, config, seed, processes
        self.replies = replies
        credits = token_credits([*records, *held_out], config)
        self.credits = credits[: len(records)]
        self.lengths = [model.length(segments(record, config.plan_in_context)) for record in records]
        self.held_out = [
            sample
            for record, credit in zip(held_out, credits[len(records) :], strict=True)
            for sample in at_every_timestep(model, record, credit, config, seed)
        ]
        auto = native_bfloat16(model.device)
        self.bfloat16 = auto if config.precision == "auto" else config.precision == "bf16"
        named = dict(model.named_parameters())
        for name in trained:
            named[name].data = named[name].data.float()
        self.root = shard(model, processes, self.bfloat16) if processes.count > 1 else None
        if next(model.network.parameters()).is_meta:
            (model.network if self.root is None else self.root).to_empty(device=model.device)
            model.read_weights()
        if config.lora.rank:
            lora.start(model.network, seed)
        named = dict(model.named_parameters())
        self.parameters = {name: named[name] for name in trained}
        self.average = Copy(self.parameters) if config.ema else None
        self.old: Copy | None = None
        self.as_old: Callable[[], AbstractContextManager[None]] | None = None
        if config.objective == "region_nft":
            if config.lora.rank and config.old_decay == 1:
                self.as_old = partial(lora.disabled, model.network)
            else:
                self.old = Copy(self.parameters)
                self.as_old = self.old.in_place
        self.optimizer = make_optimizer(list(self.parameters.values()), config)

    def state(self, with_optimizer: bool = False) -> State:
        """What a checkpoint holds: the trained weights and those that follow them, shared, the optimiser's tensors."""
        state: State = {"weights": {name: parameter.detach() for name, parameter in self.parameters.items()}}
        state |= {name: copy.values for name, (copy, _) in self.followers().items()}
        return state | {"optimizer": optimizer_state(self.optimizer, self.parameters)} if with_optimizer else state

    def followers(self) -> dict[str, tuple[Copy, float]]:
        """The second sets of weights that follow the trained ones, and the decay of each."""
        copies = {"average": (self.average, self.config.ema), "old": (self.old, self.config.old_decay)}
        return {name: (copy, decay) for name, (copy, decay) in copies.items() if copy is not None and decay < 1}

    def settle(self) -> dict[str, Tensor]:
        """Give the network the weights that are published; the LoRA updates, whole, where there are any."""
        if self.average is not None:
            self.average.exchange()
        if not self.config.lora.rank:
            return {}
        updates = {name: whole(parameter.detach()) for name, parameter in self.parameters.items()}
        lora.merge(self.model.network)
        return updates

    def step(self, step: int) -> dict[str, Any]:
        """One optimiser step; the row of metrics.

        Where a loss or gradient is not finite no weight changes: NonFiniteError, or a row that says what was left out.
        """
        config, size = self.config, self.config.batch_size
        lr = config.lr * lr_factor(step, config)
        set_rate(self.optimizer, lr)
        order = draw_order(len(self.records), step * size, (step + 1) * size, self.seed)
        tokens = sum(self.credits[index].numel() for _, index in order)
        self.optimizer.zero_grad()
        sums: Tensor | float = 0.0
        for members, counted in self.own_packs([self.lengths[index] for _, index in order]):
            parts, weight, pack = self.terms([self.draw(*order[k]) for k in members])
            terms = torch.stack(list(parts.values())).sum(dim=0)
            loss = terms.sum() / tokens
            bad = [] if torch.isfinite(loss) else pack.sample[~torch.isfinite(terms)].unique().tolist()
            if named := self.processes.joined([pack.ids[index] for index in bad]):
                return self.leave_out("loss", step, named)
            (loss * (self.processes.count * counted)).backward()  # gradients become means over the processes
            sums = sums + counted * token_sums(parts, weight, pack.t)
        of_replies = self.learn_replies(step) if config.replies.weight else {}
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip, foreach=False))
        if not torch.isfinite(norm):
            return self.leave_out("gradient", step, [self.records[index].candidate.id for _, index in order])
        self.optimizer.step()
        for copy, decay in self.followers().values():
            copy.follow(decay)
        assert isinstance(sums, Tensor)
        means = token_means(self.processes.total(sums), list(parts))
        return {"step": step + 1, "loss": means.pop("loss"), "grad_norm": norm.item(), "lr": lr} | of_replies | means

    def learn_replies(self, step: int) -> dict[str, float]:
        """Gradients of the cross-entropy of the step's replies, a mean over their tokens, times its weight."""
        settings = self.config.replies
        order = draw_order(len(self.replies), step * settings.batch_size, (step + 1) * settings.batch_size, self.seed)
        chosen = [self.replies[index] for _, index in order]
        samples = [reply.segments(self.model.resized(open_image(reply.image))) for reply in chosen]
        tokens = sum(self.model.length(sample[-1:]) - 1 for sample in samples)  # every token but the first is a target
        total = torch.zeros(1, dtype=torch.float64)
        for members, counted in self.own_packs([self.model.length(sample) for sample in samples]):
            _, logits, labels = self.forward(self.model.pack([samples[k] for k in members], [], []))
            loss = cross_entropy(logits, labels, reduction="sum") / tokens
            (loss * (settings.weight * self.processes.count * counted)).backward()
            total += counted * loss.detach().double().cpu()
        return {"cross_entropy": self.processes.total(total).item()}

    def leave_out(self, what: str, step: int, candidates: list[str]) -> dict[str, Any]:
        """The row of a step that was left out, or NonFiniteError."""
        if self.config.on_nonfinite == "stop":
            raise NonFiniteError(what, step, candidates)
        self.optimizer.zero_grad()
        nothing = {"loss": None, "loss_by_timestep": [None] * TIMESTEP_BINS}
        return {"step": step + 1, "non_finite": what, "candidates": candidates} | nothing

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Means of the objective over the samples that are held out, each at one timestep of every bin."""
        sums: Tensor | float = 0.0
        for start in range(0, len(self.held_out), self.config.batch_size):
            samples = self.held_out[start : start + self.config.batch_size]
            for members, counted in self.own_packs([self.model.length(sample.segments) for sample in samples]):
                parts, weight, pack = self.terms([samples[k] for k in members])
                sums = sums + counted * token_sums(parts, weight, pack.t)
        assert isinstance(sums, Tensor)
        return token_means(self.processes.total(sums), list(parts))

    def own_packs(self, lengths: Sequence[int]) -> list[tuple[list[int], bool]]:
        """This process's packs of samples of ``lengths``, the places of each, and whether a pack counts.

        All processes have the same number, since they gather weights and sum gradients together; where there are fewer
        samples than processes, a pack of another stands in that does not count.
        """
        packs = cut(lengths, self.config.memory.pack_tokens, self.processes.count)
        own = packs[self.processes.rank :: self.processes.count]
        return [(pack or packs[0], bool(pack)) for pack in own]

    def draw(self, epoch: int, index: int) -> Sample:
        """The record as this epoch sees it."""
        record = self.records[index]
        generator = generator_for(self.seed, epoch, record.candidate.id)
        return draw(self.model, record, self.credits[index], self.config, generator)

    def terms(self, samples: Sequence[Sample]) -> tuple[Terms, Tensor, Pack]:
        """The parts of the objective and the weight of the squared error in it, (N,) each, and the pack they are of."""
        pack = make_pack(self.model, samples, self.config.use_layout)
        v_old = None
        if self.as_old is not None:
            with torch.no_grad(), self.as_old():
                v_old = self.predict(pack)
        return *objective_terms(self.predict(pack), v_old, pack, self.config), pack

    def predict(self, pack: Pack) -> Tensor:
        """The model's velocity (N, D) in float32."""
        return self.forward(pack.packed)[0]

    def forward(self, packed: object) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity (N, D) and logits (M, V) in float32, and the labels (M,) of these."""

        def work() -> tuple[Tensor, Tensor, Tensor]:
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16):
                found = self.model.velocity(packed)
                return found.velocity.float(), found.logits.float(), found.labels

        return self.run(work)

    @torch.no_grad()
    def sample(self, records: Sequence[TrainingRecord]) -> list[Generated]:
        """What the present weights make of the candidates' prompts, seeds and settings."""
        return self.run(lambda: sample_again(self.model, records)) if records else []

    def run(self, work: Callable[[], T]) -> T:
        """Do ``work`` with the network, gathered where it is sharded."""
        return work() if self.root is None else self.root(work)


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


def records_digest(records: Sequence[TrainingRecord], replies: Sequence[Reply] = ()) -> str:
    """A checksum of which candidates there are, in order, and what was judged of them."""
    total = hashlib.sha256()
    for record in records:
        total.update(repr((record.candidate.id, record.alpha, record.sample_score, record.mapping)).encode())
        total.update(record.reward_map.numpy().tobytes())
    for reply in replies:
        total.update(repr((reply.id, reply.question, reply.text)).encode())
    return total.hexdigest()
