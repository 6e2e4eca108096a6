"""``srum doctor --dry-run``: a step of each stage at its real size, on weights without numbers (``srum.train.ledger``).

The product's own code runs: rollout, judge and trainer, packs, LoRA, recomputation, FSDP2 among any number of
processes, of which this one is the first and the others are imagined. What a GPU does otherwise than the CPU, on which
this runs, is said in ``as_on_a_gpu``. A step of training runs its first two packs; those after them are as the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedTokenizerFast

from srum.config import RunConfig, TrainConfig, ValidationConfig, load_config
from srum.drawing import contexts_of, write_plans
from srum.errors import ModelError
from srum.judging.self_judge import SelfJudge
from srum.models import EMBEDDED
from srum.models.bagel import decoding, images, network
from srum.models.bagel.autoencoder import build_autoencoder
from srum.models.bagel.cache import Cache
from srum.models.bagel.config import PUBLISHED, BagelConfig
from srum.models.bagel.model import Bagel
from srum.models.bagel.network import BagelNetwork, Layout
from srum.models.bagel.sequence import Batch
from srum.models.base import Decoding, Sampling, branch_counts
from srum.models.checkpoints import load_tokenizer
from srum.models.texts import Row
from srum.processes import Processes
from srum.records import Region
from srum.run import find_method
from srum.train import lora
from srum.train.dry_examples import PROMPT, examples_of
from srum.train.examples import Example
from srum.train.feed import ExampleFeed, Mix, Step
from srum.train.ledger import Ledger
from srum.train.optimizer import start_optimizer
from srum.train.packs import Pack, Sample
from srum.train.reinforced import PolicyMethod
from srum.train.trainer import DTYPES, Trainer
from srum.train.weights import recomputed, trainable_parameters

T = TypeVar("T")
LETTERS = 4  # of a token, about
BOS = "<|im_start|>"
MARKERS = {BOS: 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652, "<|vision_end|>": 151653}
PLAN = "Two red cups stand beside each other on a table of wood, a window behind them lets in the light. " * 5
SAID = "Identified Object: a cup\nScore: 0.5\nReason: it is there, and red, as was asked for"
TAIL = 4  # tokens of a text that are written; those before them are as these
PACKS = 2  # of a step that run


@dataclass(frozen=True)
class Cost:
    """What a stage takes in one process: ``resident`` bytes between two steps and ``peak`` within one, floating-point
    ``operations`` and ``sent`` bytes of a step. A ``step`` is over so many ``tokens`` of all ``processes``."""

    stage: str
    step: str
    processes: int
    tokens: int
    resident: int
    peak: int
    operations: int
    sent: int = 0


class Reader:
    """A tokenizer whose ids, when read, are always ``reply``. Without another's ``words`` four letters are a token."""

    def __init__(self, words: PreTrainedTokenizerFast | None, reply: str = "") -> None:
        self.words, self.reply = words, reply

    def encode(self, text: str, add_special_tokens: bool = False) -> Sequence[int]:
        """As many ids as the text has tokens."""
        if self.words is None:
            return range(-(-len(text) // LETTERS))
        ids: list[int] = self.words.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The reply, after its marker."""
        return f"{BOS}{self.reply}" if ids else ""

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Of the four markers."""
        return MARKERS[token] if self.words is None else self.words.convert_tokens_to_ids(token)


class Sketch(Bagel):
    """BAGEL without numbers. Of a text it writes the last tokens alone, after as many columns as those before fill."""

    ledger: Ledger
    tokens_run = 0

    def _forward(self, batch: Batch, cache: Cache | None) -> tuple[Tensor, Tensor]:
        self.tokens_run += len(batch.layout.place)
        return super()._forward(batch, cache)

    def read_weights(self) -> None:
        """There are none."""

    def empty_context(self, rows: int) -> Cache:
        """Of keys and values without numbers, which what is written to them would not make them."""
        cache = super().empty_context(rows)
        cache.keys, cache.values = (
            [torch.empty(x.shape, dtype=x.dtype) for x in of] for of in (cache.keys, cache.values)
        )
        return cache

    def decode_tokens(
        self,
        context: Cache,
        decoding: Decoding,
        seeds: Sequence[int],
        starts: Sequence[Sequence[int]] | None = None,
        stop: int | None = None,
        logits_out: list[Tensor] | None = None,
    ) -> list[Row]:
        """As BAGEL's, every row to the limit, and as many operations as all tokens take."""
        skipped = max(0, decoding.max_tokens - 1 - TAIL)
        longer = context.select(range(context.rows))
        longer.reserve(skipped)
        longer.keep(torch.ones(context.rows, skipped, dtype=torch.bool), torch.full((context.rows,), skipped))
        before = self.ledger.operations
        rows = super().decode_tokens(longer, replace(decoding, max_tokens=decoding.max_tokens - skipped), seeds, starts)
        self.ledger.operations += (self.ledger.operations - before) * skipped // TAIL
        self.tokens_run += context.rows * (decoding.max_tokens - 1)
        return rows


def sketch(config: BagelConfig, ledger: Ledger, dtype: torch.dtype, reader: Reader) -> Sketch:
    """The network on the meta device, where ``Bagel.load(empty=True)`` has it, the autoencoder in the ledger."""
    with torch.device("meta"):
        made, autoencoder = BagelNetwork(config).to(dtype), build_autoencoder(config.autoencoder)
    with ledger:
        autoencoder.to_empty(device="cpu")
    tokenizer: Any = reader
    model = Sketch(Path(), config, made.eval(), autoencoder.eval().requires_grad_(False), tokenizer, "bf16")
    model.ledger = ledger
    return model


# --- what a GPU does otherwise


class Fused(torch.autograd.Function):
    """Attention as a fused kernel does it: no scores are kept, its backward pass computes them again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ledger: Ledger) -> Tensor:
        ledger.operations += 4 * q.numel() * k.shape[2]
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        ctx.ledger = ledger
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        ctx.ledger.operations += 10 * q.numel() * k.shape[2]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


@contextmanager
def as_on_a_gpu(ledger: Ledger) -> Iterator[None]:
    """Within the block attention is fused, long rows of training need no mask, texts are looked at every 16 tokens, and
    norms of groups and layers are float32, as CUDA's autocast has them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: object) -> Tensor:
        fused: Tensor = Fused.apply(q, k, v, ledger)
        return fused

    def takes_blocks(layout: Layout, cache: Cache | None) -> bool:
        return cache is None and layout.present.shape[1] >= network.BLOCKS

    with (
        patch.object(network, "attend", attend),
        patch.object(network, "takes_blocks", takes_blocks),
        patch.object(network.Layout, "blocks", lambda _: None),
        patch.object(decoding, "PACES", {}),
        patch.object(functional, "group_norm", _in_float32(functional.group_norm)),
        patch.object(functional, "layer_norm", _in_float32(functional.layer_norm)),
    ):
        yield


def _in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return norm(*args, **kwargs)

    return run


# --- what is asked for


def described(model: str) -> tuple[BagelConfig, PreTrainedTokenizerFast | None]:
    """The config of a published model, by its name or the last part of it, or of a folder; the tokenizer of a folder.

    Raises ModelError for what is neither, and for a folder of another architecture.
    """
    for name, config in PUBLISHED.items():
        if model in (name, name.rpartition("/")[2]):
            return config, None
    folder = EMBEDDED.get(model, Path(model))
    if not folder.is_dir():
        raise ModelError(f"--dry-run: no model {model!r}: give a folder of BAGEL's, or one of {', '.join(PUBLISHED)}")
    return BagelConfig.from_folder(folder), load_tokenizer(folder)


def usual(config: BagelConfig) -> dict[str, RunConfig]:
    """What is trained in three ways, where no config says it: images of the largest size, two in a pack."""
    side = config.vae_transform.max_image_size
    drawn = [f"rollout.size=[{side},{side}]", "rollout.timesteps=50", "rollout.guidance=4", "rollout.batch_size=4"]
    asked = ["judge.instructions=paper", "judge.max_tokens=512", "judge.batch_size=8"]
    saving = ["train.precision=bf16", "train.memory.checkpoint_activations=true", "train.batch_size=2"]
    ways = {
        "LoRA of rank 64": ["train.lora.rank=64", "train.memory.frozen=bf16"],
        "generation expert": ["train.memory.frozen=bf16"],
        "all weights": ["method=srum", "train.trainable=all"],
    }
    return {name: load_config(None, [*drawn, *asked, *saving, *own]) for name, own in ways.items()}


def costs(model: str, run: RunConfig | None, processes: Sequence[int]) -> Iterator[Cost]:
    """Of every stage in turn. Without ``run`` the three usual trainings, of a pack for each process."""
    config, words = described(model)
    runs = usual(config) if run is None else {run.method: run}
    first = DryRun(config, next(iter(runs.values())), words)
    yield first.rollout()
    yield first.judge()
    for name, own in runs.items():
        for count in processes:
            if run is None:
                own = own.model_copy(update={"train": own.train.model_copy(update={"batch_size": 2 * count})})
            yield replace(DryRun(config, own, words).training(count), stage=f"train, {name}")


def table_of(costs: Iterable[Cost]) -> Table:
    """For the command line, a row each."""
    names = ("stage", "a step", "processes", "tokens", "resident GB", "peak GB", "TFLOP", "GB sent")
    table = Table(*names, title="a step of the first process, on weights without numbers", title_justify="left")
    for cost in costs:
        giga = (f"{value / 1e9:,.1f}" for value in (cost.resident, cost.peak))
        numbers = (str(cost.processes), f"{cost.tokens:,}", *giga, f"{cost.operations / 1e12:,.1f}")
        table.add_row(cost.stage, cost.step, *numbers, f"{cost.sent / 1e9:,.1f}")
    return table


# --- the stages


@dataclass(frozen=True)
class DryRun:
    """Steps of BAGEL of this ``config`` under the settings ``run``.

    ``words``: the tokenizer of a folder, if there is one (``Reader``). ``elsewhere``: what the machine that is meant
    does otherwise than this CPU.
    """

    config: BagelConfig
    run: RunConfig
    words: PreTrainedTokenizerFast | None = None
    elsewhere: Callable[[Ledger], AbstractContextManager[None]] = as_on_a_gpu

    def rollout(self) -> Cost:
        """A batch of images: plans, where wanted, contexts, all steps, the autoencoder. Tokens are of a guided step."""
        settings, ledger = self.run.rollout, Ledger()
        model, sampling, count = self.loaded(ledger), Sampling(**settings.sampling()), settings.batch_size
        planned = count * settings.planned(self.run.candidates_per_prompt) // self.run.candidates_per_prompt
        branches, resident, draws = branch_counts(sampling), ledger.held, []
        with self.entered(ledger):
            ledger.start()
            if planned:
                write_plans(model, [PROMPT] * planned, sampling, range(planned))
            plans = [PLAN] * planned + [None] * (count - planned)
            contexts = contexts_of(model, [PROMPT] * count, plans)
            written = ledger.operations
            for timesteps in (2, 3):
                before = ledger.operations
                model.draw(contexts, replace(sampling, timesteps=timesteps, guidance_interval=(0, 1)), range(count))
                draws.append(ledger.operations - before)
        step = draws[1] - draws[0]
        operations = written + draws[0] - step + step * sum(branches) // max(branches)
        tokens = count * max(branches) * (math.prod(model.latent_grid(settings.size)) + 2)
        return Cost("rollout", f"{count} images", 1, tokens, resident, ledger.peak, operations)

    def judge(self) -> Cost:
        """A batch of images, each with as many regions as there may be. Tokens are all that are read or written."""
        settings, ledger, (height, width) = self.run.judge, Ledger(), self.run.rollout.size
        count, regions = settings.batch_size, range(1, self.run.ground.max_regions + 1)
        model = self.loaded(ledger, "\n\n".join([*(f"Region ID: {n}\n{SAID}" for n in regions), SAID]))
        resident = ledger.held
        options = settings.model_dump(include={"instructions", "soft", "retries", "view", "think", "reply"})
        judge = SelfJudge(model, decoding=Decoding(max_tokens=settings.max_tokens), **options)
        boxes = [Region(id=n, box=(0, 0, width / n, height / n), area=1, source="sam") for n in regions]
        pictures = [Image.new("RGB", (width, height), (n % 256, 0, 0)) for n in range(count)]
        with self.entered(ledger):
            ledger.start()
            judge.judge(pictures, [PROMPT] * count, [boxes] * count)
        return Cost("judge", f"{count} images", 1, model.tokens_run, resident, ledger.peak, ledger.operations)

    def training(self, processes: int) -> Cost:
        """An optimiser step, after the first, of the first of so many processes."""
        config, ledger = as_trained(self.run.train), Ledger(processes)
        method = find_method(self.run.method)
        imagined = Imagined(0, processes)
        with ExitStack() as stack:
            stack.enter_context(imagined_group(processes))
            model = sketch(self.config, ledger, DTYPES[config.memory.frozen], Reader(self.words))
            folder = Path(stack.enter_context(TemporaryDirectory()))
            mix = examples_of(method, model, self.run, config, folder)
            judge = self.loaded(ledger) if isinstance(method, PolicyMethod) else None  # beside what is trained
            trained = list(stack.enter_context(trainable_parameters(model, config.trainable)))
            if config.lora.rank:
                trained = stack.enter_context(lora.adapted(model, trained, config.lora))
            if config.memory.checkpoint_activations:
                stack.enter_context(recomputed(model.layers()))
            stack.enter_context(self.entered(ledger))
            feed = FirstPacks(model, mix, config, 0, imagined, ledger)
            trainer = Trainer(model, feed, method.objective(self.run), config, 0, trained, imagined)
            start_optimizer(trainer.optimizer, trainer.parameters)
            resident = ledger.held
            ledger.start()
            trainer.step(0)
            del judge
            stage = f"train, {'LoRA' if config.lora.rank else config.trainable}"
            return Cost(stage, feed.said, processes, feed.tokens, resident, ledger.peak, *feed.whole_step())

    def loaded(self, ledger: Ledger, reply: str = "") -> Sketch:
        """The model as a stage before training loads it on a GPU (``srum.models.held_dtype``)."""
        model = sketch(self.config, ledger, torch.bfloat16, Reader(self.words, reply))
        with ledger:
            model.network.to_empty(device="cpu")
        return model

    @contextmanager
    def entered(self, ledger: Ledger) -> Iterator[None]:
        """Within the block work is entered, as elsewhere; images that are drawn are blank."""
        with self.elsewhere(ledger), patch.object(images, "to_image", _blank), ledger:
            yield


def _blank(pixels: Tensor) -> Image.Image:
    return Image.new("RGB", (pixels.shape[2], pixels.shape[1]))


# --- training


class Imagined(Processes):
    """The first of many processes, of which the others do the same."""

    def once(self, work: Callable[[], T]) -> T:
        return work()

    def total(self, values: Tensor) -> Tensor:
        return values * self.count

    def joined(self, values: list[T]) -> list[T]:
        return values

    def wait(self) -> None:
        pass


@contextmanager
def imagined_group(processes: int) -> Iterator[None]:
    """torch's fake process group of so many. Raises ModelError where this torch has none."""
    if processes == 1:
        yield
        return
    try:
        import torch.distributed._tools.fake_collectives  # what collectives return of fakes
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise ModelError(f"--dry-run: torch {torch.__version__} cannot imagine processes: {error}") from None
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class FirstPacks(ExampleFeed):
    """Of a step the first packs of this process, and what each of them took."""

    def __init__(
        self, model: Any, mix: Mix, config: TrainConfig, seed: int, processes: Processes, ledger: Ledger
    ) -> None:
        super().__init__(model, mix, config, seed, processes)
        self.ledger, self.packs, self.tokens = ledger, 0, 0
        self.marks: list[tuple[int, int]] = []

    def own_packs(self, lengths: Sequence[int]) -> list[tuple[list[int], bool]]:
        packs = super().own_packs(lengths)
        self.packs, self.tokens = len(packs), sum(lengths)
        return packs[:PACKS]

    def step(self, number: int) -> Step:
        step = super().step(number)
        return replace(step, packs=self._marked(step.packs))

    def draw(self, epoch: int, example: Example) -> Sample:
        """As ever, by the host."""
        with self.ledger.aside():
            return super().draw(epoch, example)

    def _marked(self, packs: Iterable[tuple[Pack, bool]]) -> Iterator[tuple[Pack, bool]]:
        for pack in packs:
            self._mark()
            yield pack
        self._mark()

    def _mark(self) -> None:
        self.marks.append((self.ledger.operations, self.ledger.sent))

    def whole_step(self) -> tuple[int, int]:
        """Operations and bytes sent of all packs: those that did not run are as the last that did."""
        left = self.packs - len(self.marks) + 1
        now = self.ledger.operations, self.ledger.sent
        operations, sent = (n + left * (b - a) for n, a, b in zip(now, self.marks[-2], self.marks[-1], strict=True))
        return operations, sent

    @property
    def said(self) -> str:
        """What a step is."""
        return f"{self.config.batch_size} examples, {self.packs} packs each"


def as_trained(config: TrainConfig) -> TrainConfig:
    """The settings as a GPU has them, nothing held out."""
    precision = "bf16" if config.precision == "auto" else config.precision
    return config.model_copy(update={"precision": precision, "validation": ValidationConfig(), "text_dropout": 0.0})
