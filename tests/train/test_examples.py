"""Examples and mixes: how many of each kind a step has, and where credits, dropout and stored states land."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from srum.errors import TrainingError
from srum.flow import FlowNoise, interpolate
from srum.models.bagel import Bagel
from srum.models.base import Segment
from srum.processes import Processes
from srum.run import find_method
from srum.train.examples import Example, generator_for
from srum.train.feed import Mix, Part, Step
from srum.train.metrics import keep_rows
from srum.train.packs import Sample, draw, make_pack
from srum.train.trainer import Losses, Trainer, train
from tests.train.ranks import CHECKPOINT, SMOOTH, config_of

GENERATOR = torch.Generator().manual_seed(7)
WIDE, TALL = (torch.randn(16, 2 * h, 2 * w, generator=GENERATOR) for h, w in ((1, 3), (2, 1)))  # latents
TOLD = Segment("text", text="a red square", droppable=True)


@pytest.fixture(scope="module")
def model() -> Bagel:
    return Bagel.load(CHECKPOINT)


def examples(kind: str, count: int) -> list[Example]:
    return [Example(id=f"{kind}{number}", segments=[TOLD]) for number in range(count)]


def ids(mix: Mix, steps: int, seed: int = 3) -> list[list[str]]:
    return [[example.id for _, example in mix.at(step, seed)] for step in range(steps)]


# --- mixes


def test_shares_are_exact_in_every_step() -> None:
    """2 : 1 : 1 of 8 is 4, 2 and 2, also where a kind runs out within a step and begins anew."""
    kinds = {"a": examples("a", 5), "b": examples("b", 3), "c": examples("c", 1)}
    mix = Mix.of_shares(kinds, {"a": 2, "b": 1, "c": 1}, 8)
    for step in ids(mix, 12):
        assert [sum(name[0] == kind for name in step) for kind in "abc"] == [4, 2, 2]


def test_shares_that_do_not_divide_the_batch_are_refused() -> None:
    kinds = {name: examples(name, 3) for name in "abc"}
    with pytest.raises(TrainingError, match=r"train\.batch_size: 6 is no multiple of 4, the sum of the shares"):
        Mix.of_shares(kinds, {"a": 2, "b": 1, "c": 1}, 6)


def test_a_kind_without_examples_is_named_unless_none_is_wanted() -> None:
    assert Mix([Part("a", examples("a", 2), 1), Part("b", [], 0)]).at(0, 1)
    with pytest.raises(TrainingError, match="there is nothing to train on: no b"):
        Mix([Part("a", examples("a", 2), 1), Part("b", [], 1)])
    with pytest.raises(TrainingError, match="no examples beside 2 to validate with"):
        Mix([Part("", [], 1)], held_out=examples("a", 2))


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**40))
def test_every_epoch_of_a_part_has_each_example_once(count: int, per_step: int, seed: int) -> None:
    mix = Mix([Part("a", examples("a", count), per_step)])
    stream = [(epoch, example.id) for step in range(3 * count) for epoch, example in mix.at(step, seed)]
    assert [epoch for epoch, _ in stream] == [place // count for place in range(len(stream))]
    for epoch in range(3):
        assert len({name for at, name in stream if at == epoch}) == count


def test_the_streams_of_parts_are_independent() -> None:
    """What a step has of one part depends on no other part; and parts of as many examples are in different orders."""
    a, b = Part("a", examples("a", 6), 2), Part("b", examples("b", 6), 2)
    alone, both, more = (ids(Mix(parts), 6) for parts in ([a], [a, b], [replace(b, per_step=5), a]))
    assert alone == [[name for name in step if name[0] == "a"] for step in both]
    assert alone == [[name for name in step if name[0] == "a"] for step in more]
    assert [name[1:] for step in both for name in step if name[0] == "b"] != [
        name[1:] for step in alone for name in step
    ]


def test_a_checksum_tells_what_is_learned_apart() -> None:
    plain = Example(id="x", segments=[replace(TOLD, loss=True)], credit=[torch.ones(1)])
    others = [
        plain,
        replace(plain, id="y"),
        replace(plain, credit=[torch.zeros(1)]),
        replace(plain, segments=[TOLD]),
        replace(plain, segments=[replace(TOLD, text="a blue square", loss=True)]),
        replace(plain, segments=[replace(TOLD, text=None, ids=[3, 4], loss=True)]),
        replace(plain, segments=[replace(TOLD, text=None, ids=[3, 5], loss=True)]),
    ]
    assert len({Mix([Part("a", [other], 1)]).digest() for other in others}) == len(others)


# --- credits


def learned_twice(*credit: Tensor, name: str = "x") -> Example:
    """Two latents and two texts with a loss, and what is told between them."""
    segments = [
        TOLD,
        Segment("noisy", latent=WIDE, loss=True),
        Segment("text", text="it is red", loss=True),
        Segment("text", text="a cat, then"),
        Segment("noisy", latent=TALL, loss=True),
        Segment("text", text="two cats", loss=True),
    ]
    return Example(id=name, segments=segments, credit=credit)


def losses(model: Bagel, *of: Example, method: str = "sft", **values: Any) -> Losses:
    """Of examples in one pack, as epoch 0 of seed 3 draws them."""
    config = config_of(method=method, text_dropout=0.0, precision="fp32", **values)
    feed = Mix([]).feed(model, config.train, 3, Processes())
    trainer = Trainer(model, feed, find_method(method).objective(config), config.train, 3, ["llm2vae.bias"])
    return trainer.losses(make_pack(model, [feed.draw(0, example) for example in of]))


def drawn(model: Bagel, example: Example) -> Sample:
    """What ``losses`` draws for it."""
    return draw(model, example, config_of(text_dropout=0.0).train, generator_for(3, 0, example.id))


def words(model: Bagel, text: str) -> int:
    """Text tokens that are predicted: those of the text, and its end."""
    return len(model._ids(text)) + 1


def test_credits_land_on_their_tokens(model: Bagel) -> None:
    """In the order of the pack: cells 1, 2, 3 of the first latent, 40 for both of the second; the same of the texts."""
    first, second = words(model, "it is red"), words(model, "two cats")
    of_text = torch.arange(1.0, first + 1) / 10
    credit = [torch.tensor([[1.0, 2.0, 3.0]]), of_text, torch.tensor(40.0), torch.tensor([0.5])]
    bare = Example(id="y", segments=learned_twice().segments[3:])  # no credit: ones
    last = learned_twice(*(-one for one in credit), name="z")
    own = losses(model, learned_twice(*credit), bare, last, text_weight=0.5)

    image = torch.tensor([1.0, 2.0, 3.0, 40.0, 40.0])
    assert own.credit.tolist() == [*image.tolist(), 1.0, 1.0, *(-image).tolist()]
    torch.testing.assert_close(own.image["error"], own.credit * own.forward.image_error)
    text = torch.cat([of_text, torch.full((second,), 0.5)])
    expected = torch.cat([text, torch.ones(second), -text])
    torch.testing.assert_close(own.text["cross_entropy"], 0.5 * expected * own.forward.text_error)


def test_one_credited_token_leaves_its_error_alone(model: Bagel) -> None:
    """Credit 1 on the last cell of the first latent: the loss of a step of 5 image tokens is its error by hand, / 5."""
    example = learned_twice(torch.tensor([0.0, 0.0, 1.0]), *torch.zeros(3, 1))
    own = losses(model, example)
    target = noise_of(drawn(model, example).corruptions[0]) - model.tokens(WIDE)
    by_hand = (own.forward.velocity[2] - target[2]).square().mean()
    step = Step([], image_tokens=5, text_tokens=9, ids=["x"])
    assert own.mean(step).item() == pytest.approx(by_hand.item() / 5, rel=1e-6)


@pytest.mark.parametrize("method", ["sft", "srum", "region_nft"])
def test_one_credit_is_that_of_every_token(model: Bagel, method: str) -> None:
    first, second = words(model, "it is red"), words(model, "two cats")
    one = losses(model, learned_twice(*torch.tensor([0.3, 0.7, -0.5, 2.0])), method=method)
    sizes = zip((0.3, 0.7, -0.5, 2.0), (3, first, 2, second), strict=True)
    each = losses(model, learned_twice(*(torch.full((size,), value) for value, size in sizes)), method=method)
    for ours, theirs in ((one.image, each.image), (one.text, each.text)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("credit", "message"),
    [
        ([torch.ones(1)], "x: 1 credits for 4 segments with a loss"),
        ([torch.ones(2, 3), *torch.ones(3, 1)], r"x: a credit of \(2, 3\) on 3 noisy tokens"),
        ([*torch.ones(3, 1), torch.ones(50)], r"x: a credit of \(50,\) on \d+ text tokens"),
    ],
)
def test_credits_that_do_not_fit_name_their_example(model: Bagel, credit: list[Tensor], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        losses(model, learned_twice(*credit))


# --- dropout and states


def dropped(example: Example, model: Bagel, **values: Any) -> list[bool]:
    sample = draw(model, example, config_of(**values).train, torch.Generator().manual_seed(0))
    return [segment.dropped for segment in sample.segments]


def seen_first() -> Example:
    picture = Image.new("RGB", (42, 28), "red")
    segments = [
        Segment("seen", image=picture, droppable=True),
        Segment("clean", latent=TALL, droppable=True),
        TOLD,
        Segment("text", text="kept"),
        replace(TOLD, text="a plan"),
        Segment("noisy", latent=WIDE, loss=True),
    ]
    return Example(id="x", segments=segments)


def test_droppable_texts_drop_together_and_so_do_images(model: Bagel) -> None:
    images, texts = [True, True], [True, False, True]
    for of_text, of_image in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        found = dropped(seen_first(), model, text_dropout=of_text, image_dropout=of_image)
        assert found == [*(x and of_image == 1 for x in images), *(x and of_text == 1 for x in texts), False]


def test_a_dropped_image_keeps_its_position(model: Bagel) -> None:
    """What follows stands where it stood, as lay_out places it; a dropped text leaves no gap."""
    kept, no_images, no_texts = (
        positions(model, text_dropout=of_text, image_dropout=of_image)
        for of_text, of_image in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0))
    )
    gone = words(model, TOLD.text or "") + words(model, "a plan") + 2  # and the beginning of each
    assert no_images == kept[-len(no_images) :] and len(no_images) < len(kept)
    assert no_texts[-1] == kept[-1] - gone and min(no_texts) == min(kept) == 0


def positions(model: Bagel, **values: Any) -> list[int]:
    """The rope positions of an example's tokens, in the order of its row."""
    sample = draw(model, seen_first(), config_of(**values).train, torch.Generator().manual_seed(0))
    batch = model.pack([sample.segments], sample.corruptions)
    order = batch.column.argsort()
    return batch.layout.positions[order].tolist()


def test_an_example_without_images_to_drop_draws_as_before(model: Bagel) -> None:
    """image_dropout changes nothing of it, neither dropout nor timestep nor noise."""
    example = learned_twice()
    one, other = (
        draw(model, example, config_of(image_dropout=rate).train, torch.Generator().manual_seed(1))
        for rate in (0.0, 1.0)
    )
    assert [segment.dropped for segment in one.segments] == [segment.dropped for segment in other.segments]
    for a, b in zip(one.corruptions, other.corruptions, strict=True):
        assert a.t == b.t and torch.equal(noise_of(a), noise_of(b))


def noise_of(corruption: object) -> Tensor:
    assert isinstance(corruption, FlowNoise)
    return corruption.noise


@pytest.mark.parametrize("method", ["sft", "srum", "region_nft"])
def test_a_stored_state_has_the_loss_of_the_noise_it_came_from(model: Bagel, method: str) -> None:
    example = learned_twice(torch.tensor([0.2, -0.4, 1.0]), *torch.ones(3, 1))
    corruptions = iter(drawn(model, example).corruptions)
    segments = [stored(model, one, next(corruptions)) if one.kind == "noisy" else one for one in example.segments]
    fresh, again = (losses(model, one, method=method) for one in (example, replace(example, segments=segments)))
    for name, values in fresh.image.items():
        torch.testing.assert_close(again.image[name], values, rtol=1e-4, atol=1e-5)
    assert torch.equal(again.forward.velocity, fresh.forward.velocity)


def stored(model: Bagel, segment: Segment, corruption: object) -> Segment:
    assert isinstance(corruption, FlowNoise) and segment.latent is not None
    return replace(
        segment, state=(interpolate(model.tokens(segment.latent), corruption.noise, corruption.t), corruption.t)
    )


# --- packs


def mixed() -> Mix:
    """Two of images, one of texts, and one of both in every step, with credits of their own."""
    t2i = [
        Example(id=f"i{n}", segments=[TOLD, Segment("noisy", latent=latent, loss=True)], credit=[torch.tensor(c)])
        for n, (latent, c) in enumerate([(WIDE, 1.0), (TALL, -0.5), (WIDE, 0.25)])
    ]
    texts = [Example(id=f"t{n}", segments=[TOLD, Segment("text", text="so " * n, loss=True)]) for n in (3, 9)]
    both = [learned_twice(*torch.tensor([0.3, 0.7, 1.0, 2.0]), name=f"b{n}") for n in range(3)]
    return Mix.of_shares({"t2i": t2i, "texts": texts, "both": both}, {"t2i": 2, "texts": 1, "both": 1}, 4)


def test_packs_change_no_step_of_a_mix_with_texts(tmp_path: Path) -> None:
    """Nor is a pack without any image, or without any text, in the way."""
    losses_by, weights = [], []
    for name, memory in (("whole", {}), ("packs", {"pack_tokens": 36})):
        config = config_of(method="srum", **SMOOTH, trainable="all", text_weight=0.4, memory=memory)
        model = Bagel.load(CHECKPOINT)
        objective = find_method("srum").objective(config)
        train(model, mixed(), objective, config.train, tmp_path / name, 3, progress=False)
        rows = keep_rows(tmp_path / name / "metrics.jsonl", 4)
        losses_by.append([(row["loss"], *row["parts"].values(), row["mean_credit"]) for row in rows])
        weights.append(dict(model.named_parameters()))
    for a, b in zip(*losses_by, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=2e-6)


def test_the_packs_of_a_mix_are_several_and_of_one_kind_too(model: Bagel) -> None:
    """What the test above relies on."""
    feed = mixed().feed(model, config_of(**SMOOTH, memory={"pack_tokens": 36}).train, 3, Processes())
    sizes = [(len(pack.image.start), len(pack.text.start)) for step in range(4) for pack, _ in feed.step(step).packs]
    assert len(sizes) >= 8 and any(not images for images, _ in sizes) and any(not texts for _, texts in sizes)


def test_credits_are_counted_by_sample_in_a_pack(model: Bagel) -> None:
    """Who is to blame for a term that is no number."""
    bad = learned_twice(torch.tensor([1.0, torch.nan, 1.0]), *torch.ones(3, 1), name="bad")
    worse = learned_twice(*torch.ones(3, 1), torch.tensor([torch.inf]), name="worse")
    own = losses(model, learned_twice(name="good"), bad, learned_twice(name="fine"), worse)
    assert own.non_finite() == ["bad", "worse"]


def test_a_pack_holds_its_samples(model: Bagel) -> None:
    config = config_of(text_dropout=0.0).train
    of: Sequence[Example] = [learned_twice(name=name) for name in ("a", "b")]
    pack = make_pack(model, [draw(model, one, config, torch.Generator().manual_seed(0)) for one in of])
    assert pack.ids == ["a", "b"]
    assert pack.image.sample.tolist() == pack.text.sample.tolist() == [0, 0, 1, 1]
