"""Text decoding: the tokens of a plain loop, whenever the host looks; steps wait for nothing and can be recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srum.models.bagel import Bagel, decoding
from srum.models.bagel.cache import Cache
from srum.models.bagel.decoding import Pace, Row, go_on, pick
from srum.models.bagel.sequence import Split
from srum.models.base import Decoding, Sampling, Segment

CHECKPOINT = Path(__file__).parents[1] / "golden" / "bagel" / "checkpoint"
TEXTS = ["What is it?", "How many blue cups stand on the wooden table?", "", "Why", "Where is the house, then?"]
STARTS = ["", "Because it is", "", "Score:", ""]
SEEDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def model() -> Bagel:
    return Bagel.load(CHECKPOINT)


def contexts(model: Bagel, texts: list[str]) -> Cache:
    """One image, then a text per row."""
    seen = Segment("seen", image=Image.new("RGB", (48, 32), "red"))
    with torch.no_grad():
        return model.contexts([[seen, Segment("text", text=text)] for text in texts])


def decoded(
    model: Bagel, settings: Decoding, stop: int, starts: list[list[int]] | None = None, texts: list[str] = TEXTS
) -> list[list[int]]:
    with torch.no_grad():
        rows = model.decode_tokens(contexts(model, texts), settings, SEEDS[: len(texts)], starts, stop)
    return [row.ids for row in rows]


def starts_of(model: Bagel) -> list[list[int]]:
    return [[model.bos, *model._ids(text)] for text in STARTS]


@cache
@torch.no_grad()
def plainly(model: Bagel, row: int, stop: int, settings: Decoding) -> list[int]:
    """Row by row and token by token, each looked at, sampled by torch.multinomial."""
    context, ids = contexts(model, [TEXTS[row]]), starts_of(model)[row]
    generator = torch.Generator().manual_seed(SEEDS[row])
    states = model._extend(context, [[Split(kind="text", ids=ids)]])
    for _ in range(settings.max_tokens - 1):
        logits = model.network.language_model.lm_head(states[-1]).float()
        if settings.temperature:
            p = torch.softmax(logits / settings.temperature, 0)
            token = int(torch.multinomial(p, 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == stop:
            break
        ids.append(token)
        states = model._extend(context, [[Split(kind="text", ids=[token])]])
    return ids


@pytest.fixture(scope="module")
def common(model: Bagel) -> dict[float, int]:
    """By temperature: a token that ends some rows early and others late or never."""
    found = {}
    for temperature in (0.0, 1.0):
        settings = Decoding(max_tokens=24, temperature=temperature)
        starts = starts_of(model)
        new = [plainly(model, row, -1, settings)[len(starts[row]) :] for row in range(len(TEXTS))]
        first_seen = [{token: own.index(token) for token in reversed(own)} for own in new]
        found[temperature] = max(
            {token for own in new for token in own},
            key=lambda token: len({places.get(token, 99) for places in first_seen}),
        )
    return found


@pytest.mark.parametrize("pace", [Pace(1, 1), Pace(1, 16), Pace(4, 6), Pace(16, 512)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_tokens_are_those_of_a_plain_loop(
    model: Bagel, common: dict[float, int], temperature: float, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with starts of several lengths stop by themselves, early, late and never; the last two share a seed."""
    monkeypatch.setitem(decoding.PACES, "cpu", pace)
    settings, stop = Decoding(max_tokens=24, temperature=temperature), common[temperature]
    found = decoded(model, settings, stop, starts_of(model))
    assert found == [plainly(model, row, stop, settings) for row in range(len(TEXTS))]
    lengths = [len(ids) - len(start) for ids, start in zip(found, starts_of(model), strict=True)]
    assert min(lengths) < 12 and len(set(lengths)) > 1 and max(lengths) <= 23


def test_samples_are_those_of_multinomial() -> None:
    """For every size of a vocabulary, small or not a multiple of a vector: the same numbers of the same generator."""
    for size in (2, 7, 64, 1003):
        logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size)) * 3
        ours, theirs = ([torch.Generator().manual_seed(seed) for seed in range(3)] for _ in range(2))
        for _ in range(20):
            p = torch.softmax(logits / 0.7, 1)
            expected = [int(torch.multinomial(p[row], 1, generator=theirs[row])) for row in range(3)]
            assert pick(logits, 0.7, ours)[0].tolist() == expected


def test_sampled_text_is_drawn_by_its_seed(model: Bagel) -> None:
    """In another order, or other company, as before; by another seed something else."""
    settings, asked = Decoding(max_tokens=12, temperature=1.0), [[Segment("text", text=text)] for text in TEXTS]
    seeds = list(range(7, 7 + len(TEXTS)))
    by_seed = [written.text for written in model.write(asked, settings, seeds)]
    turned = [written.text for written in model.write(asked[:0:-1], settings, seeds[:0:-1])]
    assert by_seed[1:] == turned[::-1]
    assert by_seed != [written.text for written in model.write(asked, settings, range(len(TEXTS)))]


def test_one_token_is_the_start_alone(model: Bagel) -> None:
    assert decoded(model, Decoding(max_tokens=1), -1, texts=["a"]) == [[model.bos]]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([5, 6], Row([1, 5, 6], [-0.5, -0.25])),
        ([5, 9, 7], Row([1, 5], [-0.5, -0.25], ended=True)),
        ([9, 9], Row([1], [-0.5], ended=True)),
        ([5, 6, 7, 8], Row([1, 5, 6, 7], [-0.5, -0.25, -0.125])),  # one too many
        ([5, 6, 7, 9], Row([1, 5, 6, 7], [-0.5, -0.25, -0.125])),  # its end, too
    ],
)
def test_a_text_ends_at_its_stop_or_at_the_limit(tokens: list[int], text: Row) -> None:
    """After the token 1, at most 3 more, the stop token being 9: the end has a log-probability as the tokens have."""
    row = Row([1])
    go_on(row, tokens, [-(2.0**-n) for n in range(1, 1 + len(tokens))], stop=9, most=4)
    assert row == text


# --- nothing waits


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: values read by Python, and shapes that depend on values."""

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket.__name__.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2])
        )
        self.count += by_mask or func.overloadpacket.__name__ in self.OPERATORS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """How often a piece of work would make the host wait."""
    counter = Waits()

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            counter.count += 1
            return method(self, *args, **kwargs)

        return call

    for name in ("tolist", "cpu", "numpy"):  # on a CPU these reach no operator
        monkeypatch.setattr(Tensor, name, counted(name))

    def count(work: Callable[[], object]) -> int:
        before = counter.count
        with torch.no_grad(), counter:
            work()
        return counter.count - before

    return count


def test_what_waits_is_counted(waits: Callable[[Callable[[], object]], int]) -> None:
    x = torch.arange(4)
    for work in (x[0].item, x.tolist, x.cpu, lambda: bool(x[0]), lambda: x[x > 2], x.nonzero):
        assert waits(work) >= 1
    assert waits(lambda: x.argmax() + x[1:].sum()) == 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_denoising_steps_do_not_wait(
    model: Bagel, guidance: float, waits: Callable[[Callable[[], object]], int]
) -> None:
    """However many steps, guided on a part of them, the host waits as often."""
    asked = [[Segment("text", text=text)] for text in ("a red fox", "")]
    with torch.no_grad():
        made = model.contexts([*asked, [], [], *asked][: 2 if guidance == 1.0 else 6])
    sizes = [(32, 48), (32, 32)]

    def work(timesteps: int) -> Callable[[], object]:
        sampling = Sampling(timesteps=timesteps, guidance=guidance, image_guidance=1.5)
        return lambda: model.denoise(made.select(range(made.rows)), model.noise([1, 2], sizes), sizes, sampling)

    assert waits(work(8)) == waits(work(12))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_waits_when_it_looks(
    model: Bagel, temperature: float, waits: Callable[[Callable[[], object]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 tokens of rows that never stop, looked at every 8: three waits more than none at all."""
    monkeypatch.setitem(decoding.PACES, "cpu", Pace(look=8, room=512))
    context = contexts(model, TEXTS)

    def work(tokens: int) -> Callable[[], object]:
        settings = Decoding(max_tokens=tokens, temperature=temperature)
        return lambda: model.decode_tokens(context, settings, SEEDS, stop=-1)

    assert waits(work(25)) - waits(work(1)) == 3


# --- recording


class Recording(TorchDispatchMode):
    """Stands in for a CUDA graph on a CPU: what ran once runs again on the same tensors, without any Python of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self.before.setdefault(id(args[0]), (args[0], args[0].clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def recorded(graph: Recording) -> Iterator[None]:
    """As torch.cuda.graph: what is recorded is not run."""
    with graph:
        yield
    for tensor, before in graph.before.values():
        tensor.copy_(before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_recorded_step_is_every_step(
    model: Bagel, common: dict[float, int], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number of a step is Python's: replayed, it goes on through the cache, when rows leave, too."""
    settings, stop = Decoding(max_tokens=24, temperature=temperature), common[temperature]
    expected = decoded(model, settings, stop, starts_of(model))
    graphs: list[Recording] = []

    def graph() -> Recording:
        graphs.append(Recording())
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    monkeypatch.setitem(decoding.PACES, "cpu", Pace(look=4, room=512))
    monkeypatch.setattr(model, "records", True)
    assert decoded(model, settings, stop, starts_of(model)) == expected
    assert graphs and all(graph.calls for graph in graphs)


@pytest.mark.gpu
def test_a_recorded_step_on_a_gpu() -> None:
    model = Bagel.load(CHECKPOINT, "cuda")
    found = []
    for records in (False, True):
        model.records = records
        found.append(decoded(model, Decoding(max_tokens=40), model.eos))
    assert found[0] == found[1]


def test_a_text_is_cut_where_it_has_said_all(model: Bagel) -> None:
    """Behind the token that completes it, however many are looked at together; the others go on."""
    asked = [[Segment("text", text="a red fox")], [Segment("text", text="Where is it?")]]
    whole = model.write(asked, Decoding(max_tokens=24), SEEDS[:2])
    until = model.tokenizer.decode(whole[0].ids[9:11])
    for pace in (Pace(1, 16), Pace(8, 16)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "PACES", {"cpu": pace})
            for cut, long in zip(
                model.write(asked, Decoding(max_tokens=24, until=until), SEEDS[:2]), whole, strict=True
            ):
                count = next((n for n in range(24) if until in model.tokenizer.decode(long.ids[:n])), len(long.ids))
                assert list(cut.ids) == list(long.ids[:count]) and not cut.ended
                assert torch.allclose(cut.logprobs, long.logprobs[:count], atol=1e-4)
