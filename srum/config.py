"""The one config of a run: a YAML file and dotted overrides become a frozen, checked ``RunConfig``.

The defaults are those of the embedded model on the embedded world; the files in ``configs/`` name what differs.
Contradictions are refused here, on construction, so that no stage has to.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from srum.errors import SrumError, first_fault
from srum.plugins import PluginError, find
from srum.yaml_files import YamlError, parse_yaml, read_yaml

CONFIG = "config.yaml"  # in the folder of a run
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Signed = Annotated[float, Field(ge=-1.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


METHOD = "region_nft"  # where a config names none


class ConfigError(SrumError, ValueError):
    """A config that cannot be used; the message is one line and names the field."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, NaN refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class ImageConfig(Section):
    """How images are sampled (``srum.models.base.Sampling``) and how many at a time."""

    size: tuple[Count, Count] = (64, 64)  # (H, W) in pixels
    timesteps: Annotated[int, Field(ge=2)] = 16  # points; one fewer Euler steps
    timestep_shift: Positive = 5.0  # more of them near noise, where it is decided what goes where
    guidance: Annotated[float, Field(ge=0.0)] = 2.5  # <= 1 is off
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)  # active where lo < t <= hi
    renorm: Literal["global", "channel", "text_channel"] = "global"
    # a guided velocity is shrunk to the norm of the unguided one: of the image, of each token, of each before the image
    # guidance
    guidance_every: Count = 1  # of the guided steps one in so many compares; those between keep its differences
    velocity_every: Count = 1  # of all steps one in so many runs the network; between them its velocity is extrapolated
    plan: bool = False  # decode a planning text first; it conditions the image
    plan_temperature: Annotated[float, Field(ge=0.0)] = 0.0  # of that text; 0 is greedy
    decoder_steps: Count = 50  # of a model whose decoder draws, too (docs/blip3o.md)
    decoder_guidance: NotNegative = 3.0  # of such a decoder; <= 1 is off
    temperature: NotNegative = 1.0  # of a model that draws token by token (docs/showo.md): noise in their order
    batch_size: Count = 64  # images per call and per shard; rounding depends on it (docs/design.md, 2)

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> ImageConfig:
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"guidance_interval: ({low}, {high}) is empty; expected low < high")
        return self

    def sampling(self) -> dict[str, Any]:
        """The fields of ``srum.models.base.Sampling``."""
        fields = {*ImageConfig.model_fields, "image_guidance"}  # where a section has that
        return self.model_dump(include=fields - {"plan", "batch_size"})


class ServerConfig(Section):
    """A server that judges, or draws, not a model of this process, by OpenAI's protocol (``srum.exchange.chat``)."""

    url: str = ""  # such as http://localhost:8000/v1; empty: no server
    model: str = ""  # its name there
    key_variable: str = "OPENAI_API_KEY"  # the environment variable with the key, where one is wanted; never a key
    timeout: Positive = 60.0  # seconds without a byte
    retries: Annotated[int, Field(ge=0)] = 4  # of a request that failed in passing, after 1, 2, 4, ... seconds
    concurrency: Count = 8  # requests at a time, of each process
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # what the server calls the limit
    extra: dict[str, Any] = {}  # further fields of each request; null leaves one of ours out

    @model_validator(mode="after")
    def _is_complete_and_holds_no_secret(self) -> ServerConfig:
        address = urlsplit(self.url)
        if address.username or address.password or address.query:
            raise ValueError("url: no user, password or query; the key belongs into the environment")
        if self.url and (address.scheme not in ("http", "https") or not address.hostname):
            raise ValueError(f"url: {self.url!r} is no address such as http://localhost:8000/v1")
        if bool(self.url) != bool(self.model):
            raise ValueError("model: a server needs both its url and the name of its model")
        if not re.fullmatch(r"[A-Za-z_]\w*", self.key_variable):
            raise ValueError("key_variable: expected the name of an environment variable, never the key itself")
        return self


class RolloutConfig(ImageConfig):
    """Rollout: the candidates of a round, of bare prompts: right and wrong ones differ in nothing but what the judge
    sees (docs/lab-notes.md, 56 and 70). With ``plan`` a share comes from the stronger mode, as the paper's all do.
    Without guidance they are samples of the very velocity that is trained."""

    guidance: Annotated[float, Field(ge=0.0)] = 1.0
    plan_temperature: Annotated[float, Field(ge=0.0)] = 0.5  # candidates of one prompt get different plans
    planned_share: Fraction = 0.5  # of a prompt's candidates, at least one, if plan; the others have the bare prompt
    server: ServerConfig = ServerConfig()  # with a url it draws them; their latents are encoded here

    def planned(self, candidates: int) -> int:
        """How many of so many candidates of a prompt plan: of a share above 0 at least one."""
        return max(1, round(self.planned_share * candidates)) if self.plan and self.planned_share else 0


class GroundConfig(Section):
    """Grounding: which region proposer, and which of its proposals stay (``grounding.base.ground``)."""

    grounder: str = "classical"  # a shipped or installed name, or my_module:MyGrounder
    options: dict[str, Any] = {}  # arguments of its constructor, such as ground.options.checkpoint=FOLDER
    max_regions: Count = 8  # the largest of those that the next four leave
    min_area: Fraction = 0.0  # of the image
    max_area: Fraction = 1.0  # of the image
    max_overlap: Fraction = 1.0  # IoU of boxes; of two that overlap more, the one proposed first stays
    min_relevance: Fraction = 0.0  # the model's probability that a region bears on the prompt; 0 does not ask
    batch_size: Count = 64  # images per shard

    @model_validator(mode="after")
    def _areas_are_ordered(self) -> GroundConfig:
        if self.min_area >= self.max_area:
            raise ValueError(f"min_area: {self.min_area} leaves no area below max_area={self.max_area}")
        return self

    def limits(self) -> dict[str, Any]:
        """What ``ground`` takes by name, beside the grounder and the model."""
        return self.model_dump(include={"max_regions", "min_area", "max_area", "max_overlap"})


class JudgeConfig(Section):
    """Judging, by default by the model itself."""

    by: str = "self"  # who judges: self, the model named next; or my_module:MyJudge
    options: dict[str, Any] = {}  # arguments of the constructor of a judge of one's own
    reward: str = ""  # my_module:my_reward, a function whose scores stand in for the judge's
    model: str = "self"  # self: the newest weights; start: those that entered; or another model, as in model
    # start in place of self where training changes what judges, too (docs/showo.md)
    server: ServerConfig = ServerConfig()
    instructions: str = "compact"  # a shipped template, or the path of a .yaml file
    view: Literal["boxes", "marks", "crops", "whole"] = "boxes"  # how regions are shown; whole: one score for all
    think: bool = False  # ask for a thought before the answer
    reply: Literal["free", "constrained", "short", "none"] = "free"
    # constrained: with a forced score line; short: that ends where its score's number would stand, forced, without a
    # reason; none: a forced score line alone
    soft: bool = True  # score = expectation under the model's token distribution
    retries: Annotated[int, Field(ge=0)] = 1  # further attempts for a reply that cannot be parsed
    max_tokens: Count = 256  # of one reply
    batch_size: Count = 64  # images per call and per shard

    @model_validator(mode="after")
    def _no_contradiction(self) -> JudgeConfig:
        if self.reward and (self.by != "self" or self.server.url):
            raise ValueError(f"reward: {self.reward} stands in for a judge; leave by at self and server.url empty")
        if self.options and self.by == "self":
            raise ValueError("options: they are those of a judge of your own, which by names")
        if self.server.url and self.model != "self":
            raise ValueError(f"model: {self.model!r} cannot judge while server.url is set; leave it at self")
        if self.server.url and (self.soft or self.reply != "free"):
            raise ValueError("soft: a server gives no log-probabilities; it needs soft=false and reply=free")
        if self.think and self.reply in ("short", "none"):
            raise ValueError(f"think: there is no reply to think in while reply is {self.reply}")
        return self

    def require_replies(self, field: str) -> None:
        """ValueError, naming the ``field`` that wants replies to be learned, where there will be none to learn."""
        if self.view != "boxes" or self.think:
            raise ValueError(f"{field}: replies are learned with judge.view=boxes and judge.think=false")
        if self.reply == "none":
            raise ValueError(f"{field}: there is no reply to learn while judge.reply is none")

    def frozen(self) -> JudgeConfig:
        """The same judge with the weights that entered the run, where it would have the newest."""
        return self.model_copy(update={"model": "start"}) if self.model == "self" else self


class RewardConfig(Section):
    """From judgements to reward maps (docs/specs/srum.md, 3)."""

    mapping: Literal["signed", "unit", "reference"] = "signed"  # [-1, 1] (paper), [0, 1], or the released code's map
    overlap: Literal["smallest", "mean", "max", "min"] = "smallest"  # which region owns a shared cell
    shape: Literal["mask", "box"] = "mask"  # of a region: its mask where it has one, or always its box
    background: Literal["judged", "neutral"] = "judged"  # outside the regions: its score where it has one, or neutral
    centred: bool = False  # region scores less their mean over the candidates of the prompt
    binary: bool = False  # region scores, centred or not, as 1 where above 0 and -1 elsewhere: a 0/1 reward
    on_failure: Literal["skip", "keep"] = "skip"  # a candidate with a failed judgement: drop it, or keep what parsed

    def rules(self) -> dict[str, Any]:
        """What ``rasterize`` takes by name."""
        return self.model_dump(exclude={"centred", "binary"})

    def signed_rules(self) -> dict[str, Any]:
        """The same for maps in [-1, 1], whatever the ``mapping``."""
        return self.rules() | {"mapping": "signed"}

    @model_validator(mode="after")
    def _the_reference_stays_as_it_is(self) -> RewardConfig:
        for name in ("overlap", "shape", "background", "centred", "binary") if self.mapping == "reference" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: the released code's map has rules of its own; leave this at its default")
        return self


class ImagesConfig(Section):
    """The images that are reconstructed (``srum.stages.pictures``)."""

    source: str = "rendered"  # rendered, candidates, good (those scored so), a path, a pattern, or datasets:NAME
    column: str = "image"  # of a parquet file or data set; a field of JSON lines
    split: str = "train"  # of a data set
    count: Count = 512  # images per round, drawn anew each round; all of a source that has no more
    blur: Count = 1  # shrink what is seen so many times, and enlarge it again
    batch_size: Count = 64  # images per shard


class PairConfig(Section):
    """Pairs of a candidate that misses its prompt and one that meets it (``srum.stages.pairs``); scores in [-1, 1]."""

    select: Literal["threshold", "relative"] = "threshold"  # relative: the best and the worst of a prompt
    aligned: Signed = 0.5  # scores from here on meet the prompt
    misaligned: Signed = 0.0  # scores up to here miss it
    min_gap: Positive = 0.5  # between the two
    per_prompt: Annotated[int, Field(ge=1, le=4)] = 1  # pairs of a prompt


class RefineConfig(ImageConfig):
    """Drawing again after an image was seen (``srum.drawing.refining``)."""

    way: Literal["regenerate", "regenerate_clean", "edit", "infill", "prompt"] = "regenerate"
    # RvR; RvR with a clean latent; RvE; what is blamed alone, the rest stays; once more from the prompt, the control
    rounds: Annotated[int, Field(ge=1, le=4)] = 1  # how often an image is drawn again, at most
    stop: Signed | None = 0.5  # no round after an image that the judge scores so or better; null: never stop
    always: bool = False  # refine a first image that is good already, too
    keep: Literal["best", "last"] = "best"  # by the judge
    system: str | None = None  # the text before the image; null: the model's own
    image_guidance: NotNegative = 1.0  # <= 1 is off


class LoraConfig(Section):
    """LoRA (peft): train low-rank updates of the linear layers of what ``trainable`` names, not the weights."""

    rank: Annotated[int, Field(ge=0)] = 0  # of an update; 0 trains the weights themselves
    alpha: Count = 32  # an update counts alpha / rank times
    target: Literal["all", "attention"] = "all"  # which linear layers: all, or those of attention


class MemoryConfig(Section):
    """What training does to fit (docs/training.md); none of it changes the objective."""

    pack_tokens: Count | None = None  # a batch runs in packs of at most so many tokens; null: in one pack per process
    checkpoint_activations: bool = False  # keep no layer's activations for the backward pass: compute them again
    frozen: Literal["fp32", "bf16"] = "fp32"  # weights that are not trained; those that are, are always fp32
    optimizer: Literal["fp32", "int8"] = "fp32"  # AdamW's two averages; int8 needs torchao


class ValidationConfig(Section):
    """The loss on prompts that are not trained on, with the same noise every time."""

    share: BelowOne = 0.0  # of the prompts, kept from training; 0: no validation
    every: Count = 50  # steps, and after the last


class SamplesConfig(Section):
    """Images that are drawn while training goes on, to be looked at: samples/ in its folder, and the report."""

    count: Annotated[int, Field(ge=0)] = 0  # prompts, of each of which a candidate is sampled again with its seed
    every: Count = 50  # steps, before the first, and after the last


class TrainConfig(Section):
    """One training: the optimiser, what is trained, how it fits. What is minimised is the method's."""

    steps: Count = 90  # of the optimiser, in each round
    batch_size: Count = 64  # samples per optimiser step
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: that of pretraining, for matrices, in one process
    lr: Positive = 1e-4  # learning rate, at its highest
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up; linear and cosine end at 0
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # over which the learning rate rises from 0
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)  # decays of AdamW's two averages
    eps: Positive = 1e-15  # of AdamW, added to the root of the second average
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0  # decoupled, times the learning rate
    clip: Positive = 1.0  # norm of the gradient
    text_dropout: Fraction = 0.1  # share of examples trained without their droppable texts, for guidance
    image_dropout: Fraction = 0.1  # the same of the images that they begin with
    text_weight: NotNegative = 1.0  # of the cross-entropy of texts, a mean over their tokens, beside the images' terms
    replies: Annotated[int, Field(ge=0)] = 0  # of the judge's own, learned as text in each step, so that judging stays
    timestep_shift: Positive = 4.0  # more timesteps near noise, where the text decides what goes where
    trainable: Literal["generation", "all"] = "generation"  # the generation expert only, or every weight
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device multiplies it natively
    checkpoint_every: Count = 50  # steps
    keep_checkpoints: bool = False  # of an arm that is trained; its weights are in model/
    plan_in_context: bool = False  # train with the candidate's planning text before the image
    ema: BelowOne = 0.0  # decay of the weights' running average, then published; 0: none
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is no number: stop, or leave the step out
    probes: Annotated[int, Field(ge=0)] = 0  # candidates sampled again before training, to find a wrong checkpoint
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None  # told what metrics.jsonl and the like are
    lora: LoraConfig = LoraConfig()
    memory: MemoryConfig = MemoryConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} leaves nothing of steps={self.steps}")
        return self

    @model_validator(mode="after")
    def _no_contradiction(self) -> TrainConfig:
        if self.memory.frozen == "bf16" and self.precision != "bf16":
            raise ValueError(f"memory.frozen: bf16 weights need precision=bf16, got {self.precision}")
        if self.memory.frozen == "bf16" and self.trainable == "all" and not self.lora.rank:
            raise ValueError("memory.frozen: nothing is frozen while trainable is all, without lora")
        if self.replies and self.trainable != "all":
            raise ValueError("replies: nothing that reads and writes text is trained unless trainable is all")
        if self.memory.optimizer == "int8" and self.eps < 1e-8:
            raise ValueError(f"eps: {self.eps} is below what averages of 8 bits tell from 0; use 1e-8 or more")
        return self


class EvalConfig(ImageConfig):
    """Evaluation by the exact checker: which prompts, sampled how."""

    prompts: str = "held_out"  # a set of the embedded world, or a .jsonl file with its metadata
    count: Annotated[int, Field(ge=0)] = 300  # prompts; 0: no evaluation, which only the embedded world's prompts allow
    own_share: BelowOne = 0.1  # of the prompts of one's own file: held out, and judged by the frozen judge in the end
    own_limit: Count = 50  # of these prompts at most


class RunConfig(Section):
    """Everything a run depends on, beside the code. ``method`` names the class, with fields of its own, that it is."""

    method: str = METHOD  # what is trained, on what: a shipped name, or my_module:MyMethod (train/methods)
    model: str = "srum-tiny"  # a shipped name, or a folder in the official layout
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: CUDA or else cpu; spread: the layers over GPUs, host, disk
    processes: Literal["auto"] | Count = "auto"  # that share a CPU's cores (docs/performance.md); auto: as many as pay
    compile: bool = False  # the model's layers, by torch.compile (docs/performance.md); needs a C++ compiler
    seed: Annotated[int, Field(ge=0)] = 0  # of everything random: prompts, noise, replies, dropout
    rounds: Count = 4  # of drawing, judging and training, each with the weights of the one before
    compare: tuple[str, ...] = ("sft", "srum")  # methods that are trained on the same candidates beside it
    prompts: str = "train"  # a set of the embedded world, or the path of a .jsonl or .txt file
    prompt_count: Count = 72  # prompts per round, drawn anew each round; all of a file that has no more
    candidates_per_prompt: Count = 8  # images that are drawn of a prompt and judged
    rollout: RolloutConfig = RolloutConfig()
    ground: GroundConfig = GroundConfig()
    judge: JudgeConfig = JudgeConfig()
    reward: RewardConfig = RewardConfig()
    images: ImagesConfig = ImagesConfig()
    pairs: PairConfig = PairConfig()
    refine: RefineConfig = RefineConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _no_contradiction(self) -> RunConfig:
        if not re.fullmatch(r"auto|spread|cpu|mps|(cuda|xpu)(:\d+)?", self.device):
            raise ValueError(f"device: {self.device!r} is none; expected auto, spread, cpu, mps, cuda or cuda:1")
        if self.train.replies:
            self.judge.require_replies("train.replies")
        if self.rollout.server.url and self.rounds > 1:
            raise ValueError("rounds: rollout.server draws with the weights that it was started with; set rounds=1")
        if self.train.plan_in_context and not self.rollout.planned(self.candidates_per_prompt):
            raise ValueError("train.plan_in_context: no plan to train with; rollout.plan is false or planned_share 0")
        return self


# pydantic's names for what is no list, or a longer one, and for what is no section
NO_LIST, NO_SECTION = ("tuple_type", "too_long"), ("model_type", "dict_type")
FREE = ("device", "processes", "compile", "train.keep_checkpoints")
# fields that may change while a run goes on: they say where and how fast it works, not what comes out


def fixed_fields(config: RunConfig) -> dict[str, Any]:
    """All others by their dotted names, as plain values; but for ``rounds``, of which there may be more."""
    return {name: value for name, value in _leaves(config.model_dump(mode="json")) if name not in (*FREE, "rounds")}


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a YAML file (None: the defaults) with overrides such as ``train.lr=1e-5`` applied in order.

    Raises ConfigError, one line: an unreadable file, an unknown key (with the nearest known one), a value out of range,
    a contradiction.
    """
    values = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply(values, override)
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """The config of nested plain values, of the class that ``method`` names. Raises ConfigError."""
    try:
        kind = config_class(str(values.get("method", METHOD)))
        return kind.model_validate(values)
    except PluginError as error:
        raise ConfigError(f"method: {error}") from None
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(detail, kind) for detail in error.errors())) from None


def parse_section(kind: type[S], values: Mapping[str, Any], name: str) -> S:
    """A section, called ``name`` in messages, of plain values. Raises ConfigError."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(first_fault(error, name)) from None


def config_class(method: str) -> type[RunConfig]:
    """The config of runs of this method. Raises PluginError for a method that there is not."""
    kind: type[RunConfig] = find("method", method).Config
    return kind


def config_of(method: str, config: RunConfig) -> RunConfig:
    """The config as another method has it: what they share stays, its own fields have their defaults."""
    shared = config.model_dump(include=set(RunConfig.model_fields)) | {"method": method}
    return config_class(method).model_validate(shared)


def changed(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The config with overrides applied in order; one that names another method leaves that method's own fields at
    their defaults. Raises ConfigError."""
    wanted: dict[str, Any] = {}
    for override in overrides:
        _apply(wanted, override)
    values = config.model_dump(mode="json")
    if wanted.get("method", config.method) != config.method:
        values = {name: value for name, value in values.items() if name in RunConfig.model_fields}
    for override in overrides:
        _apply(values, override)
    return parse_config(values)


def dump(config: RunConfig) -> str:
    """The whole config as YAML; ``load_config`` of it gives the config back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differing_fields(a: RunConfig, b: RunConfig, besides: Collection[str] = ()) -> list[str]:
    """``train.lr: 0.0006 != 1e-05`` for every field, ``besides`` these, in which two configs differ."""
    left, right = dict(_leaves(a.model_dump(mode="json"))), dict(_leaves(b.model_dump(mode="json")))
    names = [name for name in left | right if name not in besides]  # two grounders' options have different names
    return [f"{name}: {left.get(name)} != {right.get(name)}" for name in names if left.get(name) != right.get(name)]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except YamlError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(values or {}, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values or {}


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r} is not an override; expected name=value, such as train.lr=1e-5")
    *sections, key = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: {section} is not a section")
    try:
        values[key] = parse_yaml(text, name)
    except YamlError:
        raise ConfigError(f"{name}: {text!r} is not a YAML value") from None


def _explain(detail: Any, kind: type[RunConfig]) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] in NO_LIST or (detail["type"] == "missing" and isinstance(detail["loc"][-1], int)):
        field = ".".join(part for part in detail["loc"] if isinstance(part, str))  # of a list, not its place in it
        usual = dict(_leaves(kind().model_dump())).get(field)
        example = f" such as [{', '.join(map(str, usual))}]" if isinstance(usual, tuple) else ""
        return f"{field}: expected a list{example}, got {detail['input']!r}"
    if detail["type"] in NO_SECTION:
        return f"{name}: expected keys and values, got {detail['input']!r}"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {name}{suggestion([str(part) for part in detail['loc']], kind)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":  # ours: the message names the field within its section
        return f"{name}.{message}" if name else message
    return f"{name}: {message}, got {detail['input']!r}"


def suggestion(place: Sequence[str], kind: type[RunConfig]) -> str:
    """The known key nearest to an unknown one: one that is spelled alike in the same section, else of that name in
    another."""
    siblings, sections = kind().model_dump(), list[str]()
    key, *deeper = place
    while deeper and key in siblings:
        siblings = siblings[key] if isinstance(siblings[key], dict) else {}
        sections, (key, *deeper) = [*sections, key], deeper
    if near := difflib.get_close_matches(key, siblings, n=1):
        return f"; did you mean {'.'.join([*sections, *near])}?"
    if elsewhere := [known for known, _ in _leaves(kind().model_dump()) if known.split(".")[-1] == key]:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; known here are {', '.join(siblings) or 'none'}"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
