"""The trainer: one loop for every method, which hands it examples (segments, credit) and per-token terms.

A step's examples run in packs, one after the other and side by side in several processes. The loss is the mean of the
terms over all image tokens of the step plus that over all its text tokens, so that neither changes it
(``train.packs``, ``train.sharding``). What a model predicts, and how that is wrong, is the model's to say.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from srum.config import TrainConfig
from srum.disk import require_room
from srum.errors import TrainingError
from srum.models import native_bfloat16
from srum.models.base import Generated, TrainingForward
from srum.processes import Processes
from srum.progress import counting
from srum.run_dir import write_json
from srum.train import lora
from srum.train.checkpoint import MOMENTS, Checkpoints, State, room
from srum.train.data import TrainingRecord
from srum.train.feed import Feed, Source, Step
from srum.train.metrics import TIMESTEP_BINS, Log, image_sums, step_means, text_sums
from srum.train.objective import Objective, Terms, Tokens
from srum.train.optimizer import make_optimizer, optimizer_state, set_rate
from srum.train.packs import Pack
from srum.train.probes import check_reproduction, probed, sample_again, save_samples, shown
from srum.train.sharding import shard, sum_gradients, whole
from srum.train.tracking import Tracker
from srum.train.weights import Copy, TrainableModel, digest, publish, recomputed, trainable_parameters

T = TypeVar("T")
IN_BACKGROUND = frozenset({"cuda"})  # devices that compute while a checkpoint is written
NAMED = 8  # examples that an error names
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NonFiniteError(TrainingError):
    """A loss or gradient is NaN or infinite; ``ids`` are the examples it came from. No weight has taken it."""

    def __init__(self, what: str, step: int, ids: Sequence[str]) -> None:
        self.ids = list(dict.fromkeys(ids))
        named = ", ".join(self.ids[:NAMED]) + (f" and {len(self.ids) - NAMED} more" if len(self.ids) > NAMED else "")
        super().__init__(f"non-finite {what} in step {step}, examples {named}")


@dataclass(frozen=True)
class TrainResult:
    """``steps`` done in all, ``start`` of them before this call, and the folder of the weights.

    ``losses`` of every step; None where the step was left out (``on_nonfinite: skip``). ``stopped``: why before
    its last one, by the method's own rule (``Objective.stop``).
    """

    steps: int
    start: int
    losses: list[float | None]
    model: Path
    stopped: str = ""


def train(
    model: TrainableModel,
    source: Source,
    objective: Objective,
    config: TrainConfig,
    folder: Path | str,
    seed: int,
    progress: bool = True,
    candidates: Sequence[TrainingRecord] = (),
    reproduces: bool = False,
    tracker: Tracker | None = None,
    remark: Callable[[Mapping[str, float]], None] | None = None,
) -> TrainResult:
    """Train ``model`` in place and write ``metrics.jsonl``, ``checkpoints/`` and at the end ``model/`` into ``folder``.

    Where asked for, ``validation.jsonl``, ``samples/step-00000050/ID.png``, and ``adapter/``, the LoRA updates in
    PEFT's format, which ``model/`` has merged. A network that was loaded empty is filled here.

    An interrupted folder goes on from its newest checkpoint as if it had not stopped, bit for bit where the device's
    kernels are deterministic and the number of processes is the same; ``model`` must again be the one that entered,
    since an objective may compare with it. A finished folder returns at once, its weights in ``model``.

    ``candidates`` are those that probes and samples are of. ``reproduces``: these weights made the candidates, and have
    to make the probes again. ``remark`` hears the losses of what is compared before the first step; they are kept in
    ``compared.json``. ``tracker``: is told of every row and shown the samples.

    In several processes (a process group of torch) all call this alike, with a folder that they share; the network of
    ``model`` is then shared among them, and only ``model/`` has it whole.

    Raises NonFiniteError, TrainingError (credit that does not fit its latent, probes that come out otherwise, no weight
    changed, nor what is sampled) and CheckpointMismatch.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    processes = Processes.here()
    first = processes.rank == 0
    probes, pictured = probed(candidates, config.probes), shown(candidates, config.samples.count)
    with ExitStack() as stack:
        log = Log(folder if first else None, tracker.tell if tracker and first else None)
        chosen = list(stack.enter_context(trainable_parameters(model, config.trainable)))
        trained = chosen
        if config.lora.rank:
            trained = stack.enter_context(lora.adapted(model, chosen, config.lora))
        if config.memory.checkpoint_activations:
            stack.enter_context(recomputed(model.layers()))
        feed = source.feed(model, config, seed, processes)
        trainer = Trainer(model, feed, objective, config, seed, trained, processes)
        sampled = trainer.sample(probes)
        if reproduces:
            check_reproduction(probes, sampled)
        settings = (objective.name, dict(objective.settings), config.model_dump_json(exclude={"keep_checkpoints"}))
        identity = {
            "config": hashlib.sha256(repr(settings).encode()).hexdigest(),
            "seed": str(seed),
            "examples": processes.once(source.digest),
            "model": digest({n: p for n, p in lora.beneath(model.network).items() if n in chosen}, processes),
        }
        before = digest(trainer.parameters, processes)
        checkpoints = Checkpoints(folder / "checkpoints", identity, processes, model.device.type in IN_BACKGROUND)
        start = checkpoints.resume(trainer.state(), trainer.parameters, trainer.optimizer)
        if start < config.steps:
            processes.once(
                lambda: require_room(folder, trainer.room(start), "the weights and checkpoints of this training")
            )
        kept = log.keep("metrics", start)
        rows = processes.once(lambda: kept)
        done, stopped = start, objective.why_stop(rows)
        ended = bool(stopped) or done == config.steps
        log.keep("validation", -(-start // config.validation.every) + ended)  # one more than those before a step

        def look(done: int, last: bool) -> None:
            """What is wanted of the weights after so many steps: validation, samples."""
            if (last or done % config.validation.every == 0) and (means := trainer.means(feed.validation())):
                log.append("validation", {"step": done} | means)
            if pictured and (last or done % config.samples.every == 0):
                made = trainer.sample(pictured)
                if first:
                    save_samples(pictured, made, folder / "samples" / f"step-{done:08d}")
                if tracker and first:
                    tracker.show(
                        "samples", {r.candidate.id: m.image for r, m in zip(pictured, made, strict=True)}, done
                    )

        if start == 0 and (losses_of := {name: trainer.means(steps) for name, steps in feed.compared().items()}):
            found = {name: means["loss"] for name, means in losses_of.items() if means}
            if first:
                write_json(folder / "compared.json", found)
                if remark is not None:
                    remark(found)
        advance = stack.enter_context(counting("train", config.steps, start, told=progress and first))
        while not ended:
            look(done, last=False)
            row = trainer.step(done)
            log.append("metrics", row)
            rows.append(row)
            advance(1, "left out" if row["loss"] is None else f"loss {row['loss']:.3g}")
            done += 1
            stopped = processes.once(lambda: objective.why_stop(rows))
            ended = bool(stopped) or done == config.steps
            if ended and digest(trainer.parameters, processes) == before:
                raise TrainingError(f"{done} steps changed no weight: every gradient was zero or left out")
            if ended:
                look(done, last=True)
            if ended or done % config.checkpoint_every == 0:
                checkpoints.save(done, trainer.state(with_optimizer=not ended), finished=ended)
        adapter = trainer.settle()
        after = trainer.sample(probes)
    unpublished = processes.joined([not (folder / "model").exists()] if first else [])
    if done > start or any(unpublished):
        if probes and all(torch.equal(a.latent, b.latent) for a, b in zip(sampled, after, strict=True)):
            raise TrainingError(f"{config.steps} steps changed weights, but nothing that is sampled")
        if adapter and first:
            lora.save_adapter(adapter, config.lora, folder / "adapter")
        publish(model, folder / "model", DTYPES[config.memory.frozen], processes)
    return TrainResult(done, start, [row["loss"] for row in rows], folder / "model", stopped)


@dataclass(frozen=True)
class Losses:
    """The terms of a pack's tokens, image (N,) and text (M,) by name, and what they were computed from."""

    image: Terms
    text: Terms
    forward: TrainingForward
    pack: Pack
    credit: Tensor  # (N,)
    figures: tuple[Terms, Terms] = ({}, {})  # what is written down besides

    def mean(self, step: Step) -> Tensor:
        """The pack's share of the loss of a step."""
        of_images = torch.stack(list(self.image.values())).sum() / max(1, step.image_tokens)
        return of_images + torch.stack(list(self.text.values())).sum() / max(1, step.text_tokens)

    def non_finite(self) -> list[str]:
        """The examples of which a term is not a finite number."""
        bad: set[int] = set()
        for terms, credits, segment in (
            (self.image, self.pack.image, self.forward.image_segment),
            (self.text, self.pack.text, self.forward.text_segment),
        ):
            wrong = ~torch.isfinite(torch.stack(list(terms.values())).sum(dim=0))
            bad |= set(credits.sample[segment[wrong]].tolist())
        return [self.pack.ids[number] for number in sorted(bad)]


class Sums:
    """The sums that the metrics are made of, over packs and processes."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.added: list[Tensor] = []  # of images, of texts
        self.names: tuple[list[str], list[str]] = [], []
        self.figures: dict[str, Tensor] = {}  # name -> sum, number of tokens

    def add(self, losses: Losses, counted: bool) -> None:
        """Add those of a pack, if it counts."""
        own = [image_sums(losses.image, losses.credit, losses.forward.timestep), text_sums(losses.text)]
        own = [counted * sums for sums in own]
        self.added = [a + b for a, b in zip(self.added, own, strict=True)] if self.added else own
        self.names = list(losses.image), list(losses.text)
        for kind in losses.figures:
            for name, values in kind.items():
                sums = counted * torch.stack([values.detach().double().sum(), values.new_tensor(len(values))])
                self.figures[name] = self.figures[name] + sums if name in self.figures else sums

    def means(self, text_tokens: int) -> dict[str, Any]:
        """The metrics of all processes."""
        images, texts = (self.processes.total(sums) for sums in self.added)
        totals = {name: self.processes.total(sums.cpu()).tolist() for name, sums in self.figures.items()}
        figures = {name: total / count for name, (total, count) in totals.items() if count}
        return step_means(images, texts, self.names, text_tokens) | figures


class Trainer:
    """A model on its way: the trained ``parameters`` by name, the optimiser, the old weights and the average.

    The model must require gradients of the parameters ``trained`` alone, which become float32 here; in several
    processes it is sharded here, and where it is empty, filled: each process reads its own part.
    """

    def __init__(
        self,
        model: TrainableModel,
        feed: Feed,
        objective: Objective,
        config: TrainConfig,
        seed: int,
        trained: Sequence[str],
        processes: Processes = Processes(),  # noqa: B008 (frozen)
    ) -> None:
        self.model, self.feed, self.objective = model, feed, objective
        self.config, self.processes = config, processes
        shares = processes.count > 1 and not processes.whole
        self.foreach = not shares and model.device.type == "cuda"  # loops over tensors do not take shards
        auto = native_bfloat16(model.device)
        self.bfloat16 = auto if config.precision == "auto" else config.precision == "bf16"
        named = dict(model.named_parameters())
        for name in trained:
            named[name].data = named[name].data.float()
        self.root = shard(model, processes, self.bfloat16) if shares else None
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
        if objective.old_decay is not None:
            if config.lora.rank and objective.old_decay == 1 and not objective.old_every:
                self.as_old = partial(lora.disabled, model.network)
            else:
                self.old = Copy(self.parameters)
                self.as_old = self.old.in_place
        self.optimizer = make_optimizer(self.parameters, config)

    def state(self, with_optimizer: bool = False) -> State:
        """What a checkpoint holds: the trained weights and those that follow them, shared, the optimiser's tensors."""
        state: State = {"weights": {name: parameter.detach() for name, parameter in self.parameters.items()}}
        state |= {name: copy.values for name, (copy, _) in self.followers().items()}
        return state | {"optimizer": optimizer_state(self.optimizer, self.parameters)} if with_optimizer else state

    def room(self, start: int) -> int:
        """Bytes that this training takes on the disk from step ``start`` on (``checkpoint.room``)."""
        numbers = sum(parameter.numel() for parameter in self.parameters.values())
        network = sum(parameter.numel() for parameter in self.model.network.parameters())
        published = network * torch.finfo(DTYPES[self.config.memory.frozen]).bits // 8
        moments = 4 if self.config.optimizer == "muon" else MOMENTS[self.config.memory.optimizer]
        return room(4 * numbers * (1 + len(self.followers())), moments * numbers, published, self.config, start)

    def followers(self) -> dict[str, tuple[Copy, float]]:
        """The second sets of weights that a checkpoint has to hold, and the decay by which each follows the trained
        ones: all but those that entered, or that are taken anew after every checkpoint."""
        copies = {"average": (self.average, self.config.ema), "old": (self.old, self.objective.old_decay or 0.0)}
        every = self.objective.old_every
        within = bool(every and self.config.checkpoint_every % every)
        return {
            name: (copy, decay)
            for name, (copy, decay) in copies.items()
            if copy is not None and (decay < 1 or (name == "old" and within))
        }

    def settle(self) -> dict[str, Tensor]:
        """Give the network the weights that are published; the LoRA updates, whole, where there are any."""
        if self.average is not None:
            self.average.exchange()
        if not self.config.lora.rank:
            return {}
        updates = {name: whole(parameter.detach()) for name, parameter in self.parameters.items()}
        lora.merge(self.model.network)
        return updates

    def step(self, number: int) -> dict[str, Any]:
        """One optimiser step; the row of metrics.

        Where a loss or gradient is not finite no weight changes: NonFiniteError, or a row that says what was left out.
        """
        config, feed = self.config, self.feed
        step = self.run(lambda: feed.step(number)) if feed.draws else feed.step(number)
        if self.objective.old_every and number % self.objective.old_every == 0 and self.old is not None:
            self.old.follow(0.0)
        lr = config.lr * lr_factor(number, config)
        set_rate(self.optimizer, lr)
        self.optimizer.zero_grad()
        sums = Sums(self.processes)
        for pack, counted in step.packs:
            losses = self.losses(pack)
            loss = losses.mean(step)
            bad = [] if torch.isfinite(loss) else losses.non_finite()
            if named := self.processes.joined(bad):
                return self.leave_out("loss", number, named)
            if loss.requires_grad:  # a pack of texts alone has no gradient where only what draws is trained
                # gradients of shares become means over the processes, and those of whole networks their sums
                (loss * (counted * (1 if self.root is None else self.processes.count))).backward()
            sums.add(losses, counted)
        if self.processes.whole:
            sum_gradients(self.parameters.values(), self.processes)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip, foreach=self.foreach))
        if not torch.isfinite(norm):
            return self.leave_out("gradient", number, step.ids)
        self.optimizer.step()
        for copy, decay in self.followers().values():
            if decay < 1:
                copy.follow(decay)
        means = sums.means(step.text_tokens)
        row = {"step": number + 1, "loss": means.pop("loss"), "grad_norm": norm.item(), "lr": lr}
        return row | means | dict(step.facts)

    def leave_out(self, what: str, number: int, ids: Sequence[str]) -> dict[str, Any]:
        """The row of a step that was left out, or NonFiniteError."""
        if self.config.on_nonfinite == "stop":
            raise NonFiniteError(what, number + 1, ids)
        self.optimizer.zero_grad()
        nothing = {"loss": None, "loss_by_timestep": [None] * TIMESTEP_BINS}
        return {"step": number + 1, "non_finite": what, "examples": list(ids)} | nothing

    @torch.no_grad()
    def means(self, steps: Iterable[Step]) -> dict[str, Any] | None:
        """Means of the objective over steps of which nothing is learned; None where there is none."""
        sums, text_tokens = Sums(self.processes), 0
        for step in steps:
            text_tokens += step.text_tokens
            for pack, counted in step.packs:
                sums.add(self.losses(pack), counted)
        return sums.means(text_tokens) if sums.added else None

    def losses(self, pack: Pack) -> Losses:
        """The terms of the objective on a pack."""
        old = None
        if self.as_old is not None:
            with torch.no_grad(), self.as_old():
                old = self.forward(pack.packed)
        new = self.forward(pack.packed)
        credit = pack.image_credit(new)
        change, drift = (None, None) if old is None else new.distance(old)
        image = Tokens(
            "image",
            new.image_error,
            credit,
            old_error=None if old is None else old.image_error,
            change=change,
            drift=drift,
            draws=pack.image_draws(new),
        )
        text = Tokens(
            "text",
            new.text_error,
            pack.text_credit(new),
            old_error=None if old is None else old.text_error,
            draws=pack.text_draws(new),
        )
        terms, figures = self.objective.terms, self.objective.figures
        written = ({}, {}) if figures is None else (figures(image), figures(text))
        return Losses(terms(image) | new.extra, terms(text), new, pack, credit, written)

    def forward(self, packed: object) -> TrainingForward:
        """What the model predicts of a pack, in float32."""
        kinds: list[type[TrainingForward]] = []

        def work() -> tuple[Tensor, ...]:  # FSDP notices the backward pass of tensors in tuples alone
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16):
                predicted = self.model.forward(packed)
            kinds.append(type(predicted))
            return tuple(getattr(predicted, field.name) for field in fields(predicted))

        values = self.run(work)
        return kinds[0](*values)

    @torch.no_grad()
    def sample(self, records: Sequence[TrainingRecord]) -> list[Generated]:
        """What the present weights make of the candidates' prompts, seeds and settings."""
        return self.run(lambda: sample_again(self.model, records)) if records else []

    def run(self, work: Callable[[], T]) -> T:
        """Do ``work`` with the network, gathered where it is sharded."""
        return work() if self.root is None else self.root(work)


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
