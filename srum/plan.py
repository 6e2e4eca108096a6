"""What a run will cost, before it starts: images, forward passes, seconds, memory, disk, and what will not fit.

What can be counted is counted from the config. The rest is measured: a miniature of the run, the same config with few
prompts and three training steps, goes through all its stages in a temporary folder; what its parts take per item and
once is multiplied by the items of the run. Where that is soon done, a second one, several times as large, makes up for
what first calls take, and for batches that the first did not fill. Memory is the peak of this process in a miniature,
with what the images take that a batch of the run has more: what the architecture says (``srum doctor``), or what the
second miniature took beyond the first.

Of processes that share the cores each makes its miniature, all at the same time, and none waits for another: how fast a
process is beside the others is measured, how much of the work is the first one's is counted.

A forward pass is one of the network over one image, or over one question about one: of drawing, every denoising step of
an image, twice where it is guided; of judging, every question about a region or a layout; of training, every example of
a step, twice where it is compared with the weights that entered. Tokens that are written one by one are not counted.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from rich.table import Table

from srum.config import RunConfig, changed
from srum.cores import can_be_started_again, quota
from srum.disk import GIGABYTE, free
from srum.doctor import Machine, asked
from srum.errors import SrumError
from srum.evaluation.comparison import EVAL, evaluate_arm
from srum.evaluation.compute import BACKWARD, passes_of
from srum.models import find, find_device
from srum.models.needs import BFLOAT, FLOAT, Need, Recipe
from srum.plugins import resolve
from srum.processes import Processes, alone
from srum.progress import Timed, in_words, part, timing
from srum.records import Judgement
from srum.run import BASE, Arm, Run, console
from srum.run_dir import RunError, claim_run, read_records
from srum.stages import GROUND, IMAGES, JUDGE, ROLLOUT, TRAIN
from srum.stages.rollout import choose_prompts, own_prompts, round_prompts
from srum.views.report import write_report

FEW = 4  # candidates of the first miniature, at least
STEPS = 3  # of a training in a miniature; the first is warming up
SHARE, LONGEST = 0.05, 20.0  # of the foretold time, and seconds: what the first miniature takes where a second is made
LARGER = 4  # times as large
WORTH = 32  # times as many images as the first miniature has: a run of fewer is not measured at its start
KEPT = 2  # checkpoints of a training that are kept while it goes on
STATE = 3  # times the weights that a checkpoint with the optimiser's averages takes
REPORT, BLANK, FIRST = "report", "report - blank", "report - first"  # of candidates shown before, of none, of new ones


@dataclass(frozen=True)
class Cost:
    """What a part of the run takes: images that are drawn, forward passes, and seconds where they were measured."""

    label: str
    images: int = 0
    passes: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will cost, part by part; ``memory`` and ``disk`` in bytes, where they were measured."""

    costs: list[Cost]
    warnings: list[str]
    memory: int | None = None
    disk: int | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """Of each part that was measured, by its label."""
        return {cost.label: cost.seconds for cost in self.costs if cost.seconds is not None}

    def table(self) -> Table:
        """The parts of all rounds together, and their sum."""
        table = Table("", "images", "forward passes", "time", title="what this run will take", title_justify="left")
        table.caption = "a backward pass counts as two"
        of_kind: dict[str, list[Cost]] = {}
        for cost in self.costs:
            of_kind.setdefault(cost.label.rpartition(" - ")[2], []).append(cost)
        for name, costs in of_kind.items():
            table.add_row(name, *_sums(costs))
        table.add_section()
        table.add_row("all", *_sums(self.costs))
        return table

    def lines(self) -> list[str]:
        """Memory, disk, and what is to be feared."""
        known = {"memory": self.memory, "disk": self.disk}
        sizes = [f"{name} {size / GIGABYTE:.2f} GB" for name, size in known.items() if size is not None]
        return [", ".join(sizes)] * bool(sizes) + [f"warning: {line}" for line in self.warnings]


def _sums(costs: Sequence[Cost]) -> list[str]:
    images, passes = sum(cost.images for cost in costs), sum(cost.passes for cost in costs)
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    return [f"{images:,}" if images else "", f"{passes:,}" if passes else "", in_words(sum(known)) if known else ""]


@dataclass
class Miniature:
    """What a run of the same config in little took: times by part, bytes on disk, the peak of the process."""

    run: Run
    times: dict[str, Timed]
    candidates: int
    questions: float  # about a candidate
    memory: int
    bytes: dict[str, int]
    notes: list[str] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)  # of the process after each stage but training, in bytes

    def of(self, name: str) -> Timed | None:
        """The times of a part, whatever the round."""
        found = [timed for label, timed in self.times.items() if label.rpartition(" - ")[2] == name]
        return found[0] if found and found[0].marks else None

    def grown(self, smaller: Miniature) -> float:
        """Bytes that a candidate more took in a stage, at most: of the stages that took more than all of ``smaller``,
        which was made before in this process."""
        before, most = smaller.memory, 0.0
        for stage, top in self.peaks.items():
            if top > before:
                most = max(most, (top - smaller.peaks[stage]) / (self.candidates - smaller.candidates))
                before = top
        return most


def foresee(config: RunConfig, folder: Path, always: bool = False) -> Plan:
    """What the run of this config in ``folder`` will cost.

    It is measured where it fits and, unless ``always``, where it is long enough to be worth that.
    """
    size = Size(config)
    warnings = list(what_does_not_fit(config))
    few = -(-FEW // config.candidates_per_prompt)
    worth = always or size.images > WORTH * few * config.candidates_per_prompt
    if any(warning.startswith("memory") for warning in warnings) or not worth:
        return Plan(list(size.costs(None)), warnings)
    few_of_each = _of_each(config)
    small = miniature(few_of_each, few)
    foretold = sum(cost.seconds or 0.0 for cost in size.costs(small))
    spent = sum(timed.seconds for timed in small.times.values())
    largest = -(-config.rollout.batch_size // config.candidates_per_prompt)
    smaller = small
    if spent < min(SHARE * foretold, LONGEST):
        small = miniature(few_of_each, max(few, min(LARGER * few, largest, size.prompts)))
    count = Processes.here().count
    memory, disk = count * size.memory(small, smaller), size.disk(small)
    available = Machine.here(config.device).memory + (0 if torch.cuda.is_available() else count * held())
    if available and memory > available:
        warnings.append(f"memory: {memory / GIGABYTE:.2f} GB are wanted, {available / GIGABYTE:.2f} GB are there")
    if disk > free(folder):
        warnings.append(f"disk: {disk / GIGABYTE:.2f} GB are wanted, {free(folder) / GIGABYTE:.2f} GB are free")
    return Plan(list(size.costs(small)), [*warnings, *small.notes], memory, disk)


def _of_each(config: RunConfig) -> RunConfig:
    """The config as one of the processes meets it: with its part of a step's examples."""
    return changed(config, [f"train.batch_size={-(-config.train.batch_size // Processes.here().count)}"])


# --- what is counted


@dataclass(frozen=True)
class Size:
    """How much there is to do in a run of this config."""

    config: RunConfig

    @cached_property
    def run(self) -> Run:
        """The run, without a folder."""
        return Run(Path(), self.config)

    @cached_property
    def prompts(self) -> int:
        """Of a round."""
        return len(round_prompts(self.config, 0))

    @property
    def candidates(self) -> int:
        """Of a round."""
        return self.prompts * self.config.candidates_per_prompt

    @property
    def tested(self) -> int:
        """Prompts of the evaluation."""
        config = self.config.eval
        return len(choose_prompts(config.prompts, config.count, 0)) if config.count else 0

    @property
    def images(self) -> int:
        """That are drawn in all."""
        own = len(own_prompts(self.config))
        return self.config.rounds * self.candidates + (1 + len(self.run.arms)) * (self.tested + own)

    def costs(self, small: Miniature | None) -> Iterator[Cost]:
        """Of every part of the run, in order; without seconds where there is no miniature."""
        for k in range(self.config.rounds):
            for stage in self.run.stages:
                if stage == TRAIN.name:
                    yield from self._trainings(k, small)
                else:
                    yield self._stage(k, stage, small)
        passes = self.tested * passes_of(self.config.eval)
        for arm in (BASE, *self.run.arms) if self.tested else ():
            share = own_items(self.tested, self.config.eval.batch_size) / small.run.config.eval.count if small else 1.0
            seconds = _scaled(small.of(f"eval {arm}"), share) if small else None
            yield Cost(EVAL.format(arm), self.tested, passes, seconds)
        yield from self._own(small)
        if small and REPORT in small.times:
            yield Cost(REPORT, seconds=self._reports(small))

    def _reports(self, small: Miniature) -> float:
        """One after each stage, of all candidates so far, whose pictures are made once."""
        rounds, stages = self.config.rounds, len(self.run.stages)
        blank, first, again = (small.times[name].seconds for name in (BLANK, FIRST, REPORT))
        share = self.candidates / small.candidates
        in_all = share * max(0.0, again - blank) * stages * rounds * (rounds + 1) / 2
        return rounds * stages * blank + in_all + rounds * share * max(0.0, first - again)

    def _own(self, small: Miniature | None) -> Iterator[Cost]:
        """Own prompts: drawn and judged as fast per image as the candidates of the miniature, for a pass."""
        count, passes = len(own_prompts(self.config)), passes_of(self.config.eval)
        if not count:
            return
        rollout, judge = (small.of(stage.name) if small else None for stage in (ROLLOUT, JUDGE))
        slower = passes / passes_of(self.config.rollout)
        share = own_items(count, self.config.eval.batch_size) / small.candidates if small else 1.0
        questions = round(count * small.questions) if small else 0
        for arm in (BASE, *self.run.arms):
            yield Cost(f"own prompts - draw {arm}", count, count * passes, _scaled(rollout, share * slower))
            yield Cost(f"own prompts - judge {arm}", 0, questions, _scaled(judge, share))

    def _stage(self, k: int, name: str, small: Miniature | None) -> Cost:
        drawn = self.candidates if name == ROLLOUT.name else 0
        passes = drawn * passes_of(self.config.rollout)
        if name == JUDGE.name and small:
            passes = round(self.candidates * small.questions)
        share = self._share(name, small) if small else 1.0
        return Cost(self.run.named(k, name), drawn, passes, _scaled(small.of(name), share) if small else None)

    def _share(self, stage: str, small: Miniature) -> float:
        if stage == IMAGES.name:
            return own_items(self.config.images.count, self.config.images.batch_size) / small.run.config.images.count
        sizes = {ROLLOUT.name: self.config.rollout.batch_size, GROUND.name: self.config.ground.batch_size}
        return own_items(self.candidates, sizes.get(stage, self.config.judge.batch_size)) / small.candidates

    def _trainings(self, k: int, small: Miniature | None) -> Iterator[Cost]:
        for name, arm in self.run.arms.items():
            steps = arm.config.train.steps
            compares = arm.method.objective(arm.config).old_decay is not None
            timed = small.of(f"train {name}") if small else None
            passes = steps * arm.config.train.batch_size * ((2 if compares else 1) + BACKWARD)
            yield Cost(self.run.named(k, f"train {name}"), 0, passes, _scaled(timed, steps / STEPS))

    def memory(self, small: Miniature, smaller: Miniature) -> int:
        """The peak of the process in bytes: that of the miniature, and the images that a batch has more.

        They take what the architecture says, or what the miniature took more than one with fewer candidates.
        """
        batches = {"rollout": self.config.rollout.batch_size, "judging": self.config.judge.batch_size}
        lacking = {stage: max(0, min(batch, self.candidates) - small.candidates) for stage, batch in batches.items()}
        needs = _needs(self.config)
        said = [needs[stage].per_image * images for stage, images in lacking.items() if stage in needs]
        return small.memory + max([*said, round(small.grown(smaller) * max(lacking.values()))])

    def disk(self, small: Miniature) -> int:
        """Bytes in the end, and of the checkpoints of a round's trainings, which stay until all are done."""
        rounds, train = self.config.rounds, self.config.train
        share = self.candidates / small.candidates
        kept = small.bytes["checkpoints"] * (1 + STATE * min(KEPT, (train.steps - 1) // train.checkpoint_every))
        tested = small.bytes["eval"] * self.tested // max(1, small.run.config.eval.count)
        of_round = int(share * small.bytes["round"]) + small.bytes["models"]
        return rounds * of_round + kept * (rounds if train.keep_checkpoints else 1) + tested


def own_items(count: int, batch_size: int) -> int:
    """How many of ``count`` items in batches process 0 has, which has the most."""
    starts = range(0, count, batch_size)[:: Processes.here().count]
    return sum(min(batch_size, count - start) for start in starts)


def _scaled(timed: Timed | None, share: float) -> float | None:
    return None if timed is None else timed.once + timed.each * timed.items * share


# --- what fits


def what_does_not_fit(config: RunConfig) -> Iterator[str]:
    """What the architecture says of memory, before anything is loaded: a line for each stage that has too little."""
    machine = Machine.here(config.device)
    sizes = {"rollout": ("rollout.batch_size", config.rollout.batch_size)}
    sizes |= {"judging": ("judge.batch_size", config.judge.batch_size)}
    for stage, need in _needs(config).items():
        fitting = need.images(machine.memory) if machine.memory else 1
        if not fitting:
            wanted = need.once + need.per_image
            yield (
                f"memory: {stage} needs {wanted / GIGABYTE:.1f} GB, {machine.memory / GIGABYTE:.1f} GB are free "
                f"on {machine.name}; srum doctor {config.model} says what fits"
            )
        elif stage in sizes and fitting < sizes[stage][1]:
            name, batch = sizes[stage]
            yield f"{name}={batch}: about {fitting} images at a time fit on {machine.name}"


def _needs(config: RunConfig) -> dict[str, Need]:
    """Of rollout, judging, and a training of the run's own arm; nothing for a model that cannot be asked."""
    bfloat16 = Machine.here(config.device).bfloat16
    try:
        folder = find(config.model)
        model = asked(folder)
    except SrumError:
        return {}
    of_stages = model.memory(folder, config.rollout.size, bfloat16)
    needs = {stage: of_stages[stage] for stage in ("rollout", "judging") if stage in of_stages}
    own = list(Run(Path(), config).arms.values())[-1]
    return needs | {"training": model.training_memory(folder, config.rollout.size, bfloat16, _recipe(own))}


def _recipe(arm: Arm) -> Recipe:
    train = arm.config.train
    return Recipe(
        everything=train.trainable == "all",
        lora_rank=train.lora.rank,
        frozen=BFLOAT if train.memory.frozen == "bf16" else FLOAT,
        recompute=train.memory.checkpoint_activations,
        averages=2 if train.memory.optimizer == "int8" else 2 * FLOAT,
        compares=arm.method.objective(arm.config).old_decay is not None,
    )


# --- what shares the cores

LIGHT = ("classical", "grid", "native")  # grounders that load no model
SPARE = 2 * 10**9  # bytes of a process beside what the architecture says: libraries, memory kept for the next tensor


def sharing(config: RunConfig) -> int:
    """How many processes the command starts for the cores of this machine, itself among them (``processes``).

    By itself as many as there are cores, full batches in a stage, and memory for; one where the memory cannot be told
    because something is loaded that is no part of the model, where a server does the work, and where training draws its
    images, which every process would. Raises RunError for several on a GPU, which torchrun starts.
    """
    if not can_be_started_again():
        return 1
    on_cpu = find_device(config.device).type == "cpu"
    if config.processes != "auto":
        if config.processes > 1 and not on_cpu:
            raise RunError("processes: they share the cores of a CPU; several GPUs are used by torchrun")
        return config.processes
    if not on_cpu or not _is_known(config):
        return 1
    drawn = -(-config.prompt_count * config.candidates_per_prompt // config.rollout.batch_size)
    tested = -(-config.eval.count // config.eval.batch_size)
    return max(1, min(int(min(torch.get_num_threads(), quota())), max(drawn, tested), _fitting(config)))


def _is_known(config: RunConfig) -> bool:
    """Whether what a run loads and does is the model's and ours alone."""
    judge = config.judge
    try:
        arms = Run(Path(), config).arms.values()
    except ValueError:  # a contradiction, which is said where the run begins
        return False
    return (
        not (judge.server.url or config.rollout.server.url or judge.reward)
        and judge.by == "self"
        and judge.model in ("self", "start")
        and config.ground.grounder in LIGHT
        and not any(":" in name for name in (config.method, *config.compare))
        and not any(arm.method.images_drawn(arm.config) for arm in arms)
    )


def _fitting(config: RunConfig) -> int:
    """How many processes find the memory of their largest stage."""
    in_a_pack = 1 if config.train.memory.pack_tokens else config.train.batch_size
    sizes = {"rollout": config.rollout.batch_size, "judging": config.judge.batch_size, "training": in_a_pack}
    needs = [need.once + need.per_image * sizes[stage] for stage, need in _needs(config).items()]
    return Machine.here("cpu").memory // (SPARE + max(needs)) if needs else 1


# --- what is measured


def miniature(config: RunConfig, prompts: int) -> Miniature:
    """Go through all stages of a round, its trainings and the evaluation with so many prompts, and measure them."""
    tested = min(config.eval.count, max(1, prompts * config.candidates_per_prompt // 2))
    small = changed(
        config,
        [
            "rounds=1",
            f"prompt_count={prompts}",
            f"images.count={min(config.images.count, max(FEW, prompts))}",
            f"eval.count={tested}",
            f"train.steps={STEPS}",
            "train.warmup_steps=0",
            "train.probes=0",
            "train.samples.count=0",
            "train.validation.share=0",
            "train.tracker=null",
            "train.keep_checkpoints=true",
        ],
    )
    with tempfile.TemporaryDirectory() as place, alone(), _quiet(), timing() as times:
        run = Run(Path(place), small)
        claim_run(run.folder, small)
        peaks: dict[str, int] = {}
        notes = list(_perform(run, peaks))
        folder = run.round(0)
        judged = folder / "judgements.jsonl"
        judgements = read_records(judged, Judgement) if judged.exists() else []
        models = {name: run.train_dir(name, 0) for name in run.arms}
        return Miniature(
            run=run,
            times=times,
            candidates=Size(small).candidates,
            questions=sum(len(one.regions) + 1 for one in judgements) / max(1, len(judgements)),
            memory=peak(),
            bytes={
                "round": size_of(folder) - size_of(folder / "train"),
                "models": sum(size_of(place) - size_of(place / "checkpoints") for place in models.values()),
                "checkpoints": sum(size_of(place / "checkpoints") for place in models.values()),
                "eval": size_of(run.folder / "eval"),
            },
            notes=notes,
            peaks=peaks,
        )


def _perform(run: Run, peaks: dict[str, int]) -> Iterator[str]:
    """Do it, and note the ``peaks`` after its stages; yields what could not be measured, and why."""
    _write_reports(run, BLANK)
    for stage in run.stages.values():
        if stage == TRAIN:
            _write_reports(run, REPORT)
        try:
            with part(run.named(0, stage.name)):
                resolve(stage.perform)(run, 0)
        except SrumError as error:
            yield f"{stage.name} was not measured: {error}"
            return
        if stage != TRAIN:  # whose batch is what it is
            peaks[stage.name] = peak()
    for arm in (BASE, *run.arms) if run.config.eval.count else ():
        with part(EVAL.format(arm)):
            evaluate_arm(run, arm, run.weights(arm, 1), run.folder / "eval")


def _write_reports(run: Run, name: str) -> None:
    """Twice: the first one makes the pictures, and imports what draws."""
    for label in (FIRST, name):
        with part(label):
            write_report(run.folder)


@contextmanager
def _quiet() -> Iterator[None]:
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def peak() -> int:
    """The largest memory that this process has held so far in bytes: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held() -> int:
    """Memory that this process holds now, in bytes, where the system says so."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
