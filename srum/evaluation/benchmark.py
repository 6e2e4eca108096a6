"""The protocol of a benchmark: a page per benchmark, most of it facts (``srum.evaluation.benchmarks``).

A page says which images are made and how they are named where the official scorer looks for them (``items``,
``side_files``), what one image is worth (``score``), and which figures the tables have (``figures``). It knows neither
models nor folders of runs. What is measured has the unit in which the benchmark is published.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Protocol

from PIL import Image
from pydantic import Field

from srum.evaluation.data import Data, Origin
from srum.exchange.chat import Message, NoReply, Reply
from srum.models.base import Sampling
from srum.records import Name, Record, RunPath
from srum.seeding import seed_for

Values = dict[str, list[float]]  # column -> what enters its mean

BAGEL = Sampling(guidance_interval=(0.0, 1.0))  # of BAGEL's evaluation scripts: 50 points, guidance 4, shift 3, 1024 px
SRUM = Sampling(guidance_interval=(0.4, 1.0))  # of SRUM's, and of BAGEL's for WISE


class Unreadable(ValueError):
    """A reply that gives no value; the message says why."""


class Failure(StrEnum):
    """Why an image has no value. Never a number."""

    NO_IMAGE = "no_image"
    NO_REPLY = "no_reply"
    UNREADABLE = "unreadable_reply"
    CUT = "cut_off_reply"


@dataclass(frozen=True)
class Item:
    """One image to make. ``id`` names its seed and its record, ``path`` is where the official scorer looks for it.

    Images with the same ``prompt_id`` are of one prompt and are drawn again together in a bootstrap, within their
    ``category``. ``tiles``: it is a square of so many images. ``facts`` are what the scorer asks about.
    """

    id: str
    prompt: str
    path: str
    category: str
    prompt_id: str = ""
    tiles: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The id of its prompt."""
        return self.prompt_id or self.id


class Verdict(Record):
    """What an evaluator says of one image: ``values``, or a ``failure``; the raw replies either way.

    ``official`` is what the original scorer would have counted for the same replies, its faults included: a failure may
    be a number there, or be left out.
    """

    item_id: Name
    prompt_id: Name
    category: str
    evaluator: str
    values: Values = Field(default_factory=dict)
    official: Values = Field(default_factory=dict)
    failure: Failure | None = None
    raw: list[str] = Field(default_factory=list)


class Drawn(Record):
    """An image that was made: where, of which text, after which plan, from which seed."""

    item_id: Name
    path: RunPath
    prompt: str
    seed: int
    plan: str | None = None

    def files(self) -> list[str]:
        """The image."""
        return [f"images/{self.path}"]


class Evaluator(Protocol):
    """What looks at images. Its ``name`` has its version; it answers ``concurrency`` calls at a time."""

    name: str
    concurrency: int


class Judge(Protocol):
    """A server that looks at images (kind ``chat``)."""

    name: str
    concurrency: int

    def ask(self, messages: Sequence[Message], max_tokens: int, attempt: int = 0) -> Reply | NoReply:
        """Its reply; another ``attempt`` may bring another one."""
        ...


class Benchmark:
    """A page. ``variants`` are sets of prompts, or versions, of which the first is usual; ``samples`` per prompt.

    ``figures``: name -> weights of columns, or of figures before it. ``published``: what its rows are called there;
    ``printed``: what these call some of its figures.
    """

    name: ClassVar[str]
    about: ClassVar[str]  # what it measures
    watch: ClassVar[str] = ""  # what to watch for
    licence: ClassVar[str] = ""
    origin: ClassVar[Origin] = Origin("", "")
    variants: ClassVar[Sequence[str]] = ("",)
    evaluators: ClassVar[Sequence[str]] = ("chat",)
    samples: ClassVar[int] = 1
    presets: ClassVar[Mapping[str, Sampling]] = {"bagel": BAGEL, "srum": SRUM}
    printed: ClassVar[Mapping[str, str]] = {}
    digits: ClassVar[int] = 2  # of figures in tables
    top: ClassVar[float] = 1.0  # the best value of a column

    def __init__(self, variant: str = "", checkout: Path | None = None) -> None:
        self.variant, self.data = variant or self.variants[0], Data(self.origin, checkout)

    def items(self, samples: int) -> list[Item]:
        """The images of the benchmark, ``samples`` of each prompt. Raises DataError."""
        raise NotImplementedError

    def seed(self, seed: int, item: Item, *purpose: str | int) -> int:
        """The seed of an item's noise or plan, whichever the ``purpose`` names, in a run with this ``seed``."""
        return seed_for(seed, self.name, item.id, *purpose)

    def side_files(self, items: Sequence[Item]) -> dict[str, str]:
        """What the official scorer reads beside the images: path -> text."""
        return {}

    def source(self, item: Item) -> Image.Image | None:
        """The image that is to be changed, where the benchmark is of editing."""
        return None

    def source_path(self, item: Item) -> str | None:
        """Where the official scorer looks for that image, if it does."""
        return None

    def score(self, item: Item, image: Image.Image, evaluator: Any) -> Verdict:
        """What the image is worth. Raises nothing that concerns this image alone."""
        raise NotImplementedError

    def missing(self, item: Item, evaluator: Evaluator, why: str) -> Verdict:
        """The verdict on an image that is not there or cannot be read; the original leaves it out."""
        return self.verdict(item, evaluator, failure=Failure.NO_IMAGE, raw=[why], official=self.official_failure(item))

    def official_failure(self, item: Item) -> Values:
        """What the original counts where there is no value; nothing: it leaves the image out."""
        return {}

    def figures(self) -> Mapping[str, Mapping[str, float]]:
        """The figures of its tables."""
        raise NotImplementedError

    @property
    def published(self) -> str:
        """The name of its published rows."""
        return self.name

    @property
    def template_hash(self) -> str:
        """Of the words in which a judge is asked; empty where none is."""
        return ""

    def verdict(self, item: Item, evaluator: Evaluator, **fields: Any) -> Verdict:
        """A verdict on ``item``."""
        return Verdict(
            item_id=item.id, prompt_id=item.group, category=item.category, evaluator=evaluator.name, **fields
        )


class JudgedBenchmark(Benchmark):
    """A benchmark whose judge is asked one question about each image, up to ``tries`` times until it can be read; the
    original asks ``official_tries`` times."""

    max_tokens: ClassVar[int] = 512
    tries: ClassVar[int] = 5
    official_tries: ClassVar[int] = 3

    def messages(self, item: Item, image: Image.Image) -> list[Message]:
        """The question."""
        raise NotImplementedError

    def read(self, item: Item, reply: str) -> Values:
        """The values of a reply. Raises Unreadable."""
        raise NotImplementedError

    def read_officially(self, item: Item, reply: str) -> Values:
        """The same as the original reads it. Raises Unreadable."""
        return self.read(item, reply)

    def score(self, item: Item, image: Image.Image, evaluator: Judge) -> Verdict:
        """What the judge says of the image."""
        messages = self.messages(item, image)
        values, failure, raw = asked(evaluator, messages, self.max_tokens, self.tries, lambda r: self.read(item, r))
        official = first_readable(raw[: self.official_tries], lambda reply: self.read_officially(item, reply))
        if failure == Failure.NO_REPLY or official is None:
            official = self.official_failure(item)
        return self.verdict(item, evaluator, values=values or {}, official=official, failure=failure, raw=raw)


def asked(
    judge: Judge, messages: Sequence[Message], max_tokens: int, tries: int, read: Callable[[str], Any]
) -> tuple[Any, Failure | None, list[str]]:
    """What ``read`` makes of the first reply that it can read, else None and the failure; and all that was replied."""
    raw: list[str] = []
    failure = Failure.UNREADABLE
    for attempt in range(tries):
        reply = judge.ask(messages, max_tokens, attempt)
        if isinstance(reply, NoReply):
            return None, Failure.NO_REPLY, [*raw, reply.why]
        raw.append(reply.text)
        try:
            return read(reply.text), None, raw
        except Unreadable:
            failure = Failure.CUT if reply.cut else Failure.UNREADABLE
    return None, failure, raw


def first_readable(replies: Sequence[str], read: Callable[[str], Any]) -> Any:
    """What ``read`` makes of the first reply that it can read; None where it can read none."""
    for reply in replies:
        try:
            return read(reply)
        except Unreadable:
            continue
    return None


def limited(items: Sequence[Item], prompts: int) -> list[Item]:
    """The items of the first ``prompts`` prompts of every category."""
    kept: dict[str, dict[str, None]] = defaultdict(dict)
    for item in items:
        if len(kept[item.category]) < prompts:
            kept[item.category][item.group] = None
    return [item for item in items if item.group in kept[item.category]]


def equally(names: Sequence[str]) -> dict[str, float]:
    """The weights of a plain mean."""
    return dict.fromkeys(names, 1 / len(names))


def hashed(*texts: str) -> str:
    """What tells these texts from others, in eight digits."""
    return sha256("\0".join(texts).encode()).hexdigest()[:8]
