"""What no trained weight has a part in, rows begin with: run once, it gives losses and gradients of the plain way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from srum import models
from srum.config import LoraConfig
from srum.flow import FlowNoise
from srum.models.bagel import Bagel
from srum.models.bagel.network import BagelNetwork
from srum.models.base import FlowForward, Segment
from srum.train import lora
from srum.train.weights import Copy, recomputed, trainable_parameters

Scope = Literal["generation", "all"]

PROMPT, REPLY = Segment("text", text="a red circle left of a blue square"), Segment("text", text="two", loss=True)


@pytest.fixture(scope="module")
def model() -> Bagel:
    return Bagel.load(models.EMBEDDED["srum-tiny"])


def picture(seed: int) -> Tensor:
    """Pixels (3, 64, 64) in [-1, 1]."""
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latent(seed: int, side: int = 16) -> Tensor:
    return torch.randn(8, side, side, generator=torch.Generator().manual_seed(seed))


SEEN, CLEAN = Segment("seen", image=picture(0)), Segment("clean", latent=latent(1))
NOISY, OTHER = Segment("noisy", latent=latent(2), loss=True), Segment("noisy", latent=latent(3, 8), loss=True)
DROPPED = Segment("text", text="gone", dropped=True)
FIRST, SECOND = (Segment("text", text=text, loss=True, branch=n) for n, text in enumerate(("a", "bc"), 1))
ROWS: dict[str, list[list[Segment]]] = {
    "text": [[PROMPT, NOISY], [Segment("text", text="a star"), OTHER]],
    "dropped": [[DROPPED, NOISY], [Segment("seen", image=picture(4), dropped=True), DROPPED, OTHER]],
    "seen": [[Segment("text", text="Look:"), SEEN, PROMPT, NOISY], [PROMPT, OTHER]],
    "replies": [[CLEAN, SEEN, PROMPT, NOISY, REPLY], [PROMPT, OTHER], [SEEN, FIRST, SECOND], [SEEN, PROMPT, REPLY]],
    "chains": [
        [PROMPT, REPLY, NOISY, CLEAN, SEEN, REPLY, OTHER, NOISY],
        [DROPPED, OTHER, REPLY],
        [SEEN, REPLY],
        [PROMPT, FIRST, Segment("noisy", latent=latent(5), branch=2, loss=True)],
    ],
}


@contextmanager
def plainly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BagelNetwork, "only_draws", lambda _: False)
        yield


def noise_of(model: Bagel, rows: Sequence[Sequence[Segment]]) -> list[FlowNoise]:
    generator = torch.Generator().manual_seed(6)
    return [model.corrupt(s.latent, generator, 1.0) for row in rows for s in row if s.latent is not None and s.loss]


def learned(
    model: Bagel, rows: Sequence[Sequence[Segment]], scope: Scope = "generation"
) -> tuple[FlowForward, dict[str, Tensor]]:
    """What is predicted, after a pass with other weights, and the gradients of the sum of all errors."""
    with trainable_parameters(model, scope) as trained:
        packed = model.pack(rows, noise_of(model, rows))
        old = Copy(trained)
        for value in old.values.values():
            value.mul_(0.9)
        with torch.no_grad(), old.in_place():
            before = model.forward(packed)
        out = model.forward(packed)
        assert not len(out.velocity) or not torch.allclose(before.velocity, out.velocity, atol=0.01)
        (out.image_error.sum() + out.text_error.sum() + out.distance(before).drift.sum()).backward()
        return out, {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}


def same(ours: tuple[FlowForward, dict[str, Tensor]], plain: tuple[FlowForward, dict[str, Tensor]]) -> None:
    for field in fields(FlowForward):
        a, b = (getattr(out, field.name) for out, _ in (ours, plain))
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert ours[1].keys() == plain[1].keys()
    for name, expected in plain[1].items():
        tolerance = 1e-6 + 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(ours[1][name], expected, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_losses_and_gradients_are_those_of_the_plain_way(model: Bagel, name: str) -> None:
    """Also with the layers' activations computed again, as large models have it."""
    with plainly():
        plain = learned(model, ROWS[name])
    same(learned(model, ROWS[name]), plain)
    if name == "seen":
        with recomputed(model.layers()):
            same(learned(model, ROWS[name]), plain)


def test_beginnings_run_once_and_the_rest_with_either_weights(model: Bagel) -> None:
    """Tokens that what understands runs: texts and images of two rows once, and the markers of four latents twice."""
    seen = list[int]()
    mlp = model.network.decoder.layers[0].mlp
    with mlp.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0]))):
        learned(model, rows := [[*ROWS["seen"][0], OTHER], [PROMPT, NOISY, OTHER]])
    alone = model.length(rows[0][:3]) + model.length(rows[1][:1])
    assert seen == [alone, 2 * 4, 2 * 4]


def test_where_it_cannot_be_the_plain_way_runs(model: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what understands is trained, or nothing is known of it; in several processes unless images are seen."""
    rows = ROWS["text"]

    def apart(sees: bool = False) -> bool:
        return model.pack(rows, noise_of(model, rows), sees=sees).beginning is not None

    assert not apart()
    with trainable_parameters(model, "all"):
        assert not apart()
    with trainable_parameters(model, "generation") as trained:
        assert apart()
        with monkeypatch.context() as patch:
            patch.setattr("srum.models.bagel.model._shared", lambda network: True)
            assert (apart(), apart(sees=True)) == (False, True)
        with lora.adapted(model, trained, LoraConfig(rank=2)):
            assert apart()


def test_blocks_of_flex_attention_are_the_dense_mask(model: Bagel) -> None:
    rows = ROWS["chains"]
    with trainable_parameters(model, "generation"):
        packed = model.pack(rows, noise_of(model, rows))
    assert packed.beginning is not None
    for layout in (packed.beginning.batch.layout, packed.layout):
        blocks, (count, _, *lengths) = layout.blocks(), layout.visible.shape
        assert torch.equal(create_mask(blocks.mask_mod, count, 1, *lengths, device="cpu"), layout.visible)
