"""Models whose latents are ids, some of which are masked: what the trainer and the methods make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from srum.errors import TrainingError
from srum.models.base import DiscreteForward, Distance, FlowForward, Segment
from srum.processes import Processes
from srum.run import find_method
from srum.tensors import read_tensor
from srum.train.objective import Terms, Tokens
from srum.train.packs import opened
from srum.train.probes import check_reproduction
from srum.train.trainer import Losses, Trainer
from tests.train.ranks import config_of, learn, learned
from tests.train.test_trainer import TinyModel, make_records, settings

CODES = 5


@dataclass(frozen=True)
class Masks:
    """Which cells (N,) are masked, of how many."""

    hidden: Tensor
    t: float


class MaskedModel(TinyModel):
    """Logits of a masked cell: a small network on the share that is masked and the sum of the texts' embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.generation = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, CODES))

    def corrupt(self, latent: Tensor, generator: torch.Generator, shift: float, t: float | None = None) -> Any:
        assert latent.dtype == torch.int16
        count = int(torch.randint(1, latent.numel() + 1, (), generator=generator))
        return Masks(torch.randperm(latent.numel(), generator=generator) < count, count / latent.numel())

    def targets(self, segments: Sequence[Segment], corruptions: Sequence[Any]) -> tuple[int, int]:
        return sum(int(masks.hidden.sum()) for masks in corruptions), 0

    def forward(self, batch: list[Any]) -> Any:
        logits, ids = [], []
        for texts, latent, masks in batch:
            text = self.understanding(torch.tensor(texts, dtype=torch.long)).sum(dim=0)
            count = int(masks.hidden.sum())
            logits.append(self.generation(torch.cat([text, torch.tensor([masks.t])])).expand(count, -1))
            ids.append(latent[masks.hidden, 0].long())
        sizes = torch.tensor([len(x) for x in ids])
        none = torch.zeros(0, dtype=torch.long)
        return DiscreteForward(
            timestep=torch.tensor([masks.t for _, _, masks in batch]).repeat_interleave(sizes),
            image_segment=torch.arange(len(batch)).repeat_interleave(sizes),
            cell=torch.cat([masks.hidden.nonzero()[:, 0] for _, _, masks in batch]),
            logits=torch.zeros(0, 2), labels=none, text_segment=none,
            logprob=-cross_entropy(torch.cat(logits), torch.cat(ids), reduction="none"),
        )  # fmt: skip


def id_records(count: int = 6) -> list[Any]:
    """Those of test_trainer with ids for latents, (1, 2, 2)."""
    ids = torch.randint(CODES, (count, 1, 2, 2), generator=torch.Generator().manual_seed(6), dtype=torch.int16)
    return [replace(record, latent=own) for record, own in zip(make_records(count), ids, strict=True)]


def losses_of(config: Any, step: int = 0) -> list[tuple[Losses, float]]:
    """Of the packs of a step in one process, and each pack's share of the step's loss."""
    model: Any = MaskedModel()
    mix, objective = learned(id_records(), config, seed=1)
    feed = mix.feed(model, config.train, 1, Processes())
    trained = [name for name, _ in model.generation_parameters()]
    own, taken = Trainer(model, feed, objective, config.train, 1, trained), feed.step(step)
    made = [own.losses(pack) for pack, _ in taken.packs]
    return [(losses, losses.mean(taken).item()) for losses in made]


def test_the_loss_is_the_mean_over_what_was_masked_however_the_step_is_packed() -> None:
    ((whole, loss),) = losses_of(settings(method="sft"))
    assert len(whole.image["error"]) < 4 * 4  # the batch has more cells than were masked
    assert loss == pytest.approx(whole.forward.image_error.mean().item())
    cut = losses_of(settings(method="sft", memory={"pack_tokens": 30}))
    assert len(cut) > 1 and sum(share for _, share in cut) == pytest.approx(loss)
    assert sum(len(own.image["error"]) for own, _ in cut) == len(whole.image["error"])


def test_the_credit_of_a_masked_cell_is_that_of_its_place() -> None:
    ((own, _),) = losses_of(settings(method="srum"))
    maps = {record.candidate.id: 0.75 * record.reward_map.flatten() for record in id_records()}
    segment, cell = own.forward.image_segment.tolist(), own.forward.cell.tolist()
    expected = [maps[own.pack.ids[s]][c].item() for s, c in zip(segment, cell, strict=True)]
    assert own.credit.tolist() == pytest.approx(expected)


def test_ids_are_read_as_they_were_written(tmp_path: Path) -> None:
    ids = torch.tensor([[[0, 8191], [1, 2]]], dtype=torch.int16)
    save_file({"latent": ids}, tmp_path / "ids.safetensors")
    assert torch.equal(read_tensor(tmp_path / "ids.safetensors"), ids)
    example = learned(id_records(), settings(method="sft"), 0)[0].parts[0].examples[0]
    stored = replace(example, segments=[Segment("noisy", file=tmp_path / "ids.safetensors", loss=True)])
    (segment,) = opened(MaskedModel(), stored).segments  # type: ignore[arg-type]
    assert segment.latent is not None and segment.latent.dtype == torch.int16


def test_ids_of_another_model_are_found_out() -> None:
    """Sampled again, one record has half of its ids as they were, the other none."""
    records = id_records(2)
    made: list[Any] = [type("Made", (), {"latent": record.latent + 1})() for record in records]
    with pytest.raises(TrainingError, match=r"c0 \(1\.00\), c1 \(1\.00\) differ by these shares of their norm or ids"):
        check_reproduction(records, made)
    made[0].latent[0, 0] -= 1
    assert check_reproduction(records, made) == [0.5, 1.0]


def test_a_model_that_draws_by_what_it_judges_with_has_no_generation_expert(tmp_path: Path) -> None:
    class Shared(MaskedModel):
        def generation_parameters(self) -> list[Any]:
            return []

    shared: Any = Shared()
    with pytest.raises(TrainingError, match="trainable: Shared has no weights of their own that draw; set it to all"):
        learn(shared, id_records(), settings(method="sft"), tmp_path / "generation")
    learn(shared, id_records(), settings(method="sft", trainable="all"), tmp_path / "all")
    assert set(load_file(tmp_path / "all" / "model" / "ema.safetensors")) > {"understanding.weight"}


# --- the page of region-NFT on ids: -A d + beta d^2 / 2, d = log p - log p_old


def nft(logprob: Tensor, old: Tensor, advantage: Tensor, beta: float) -> Terms:
    none = torch.zeros(0)
    new, before = (DiscreteForward(none, none, none, none, none, none, values) for values in (logprob, old))
    tokens = Tokens("image", new.image_error, advantage, before.image_error, *new.distance(before))
    return find_method("region_nft").terms(tokens, config_of(method="region_nft", beta=beta))


def test_region_nft_on_ids_by_hand() -> None:
    """log p = -1, log p_old = -3, d = 2, A = 1, -1, 1/2, beta = 1/2: the error over beta is 6, the push -A d = -2, 2,
    -1, the trust beta d^2 / 2 = 1; the gradient is beta d - A = 0, 2, 1/2."""
    logprob = torch.full((3,), -1.0, requires_grad=True)
    parts = nft(logprob, torch.full((3,), -3.0), torch.tensor([1.0, -1.0, 0.5]), beta=0.5)
    assert {name: values.tolist() for name, values in parts.items()} == {
        "error": [6.0] * 3, "push": [-2.0, 2.0, -1.0], "trust": [1.0] * 3,
    }  # fmt: skip
    torch.stack(list(parts.values())).sum().backward()
    assert logprob.grad is not None and logprob.grad.tolist() == [0.0, 2.0, 0.5]


def test_pushing_with_full_advantage_and_no_trust_is_cross_entropy() -> None:
    """A = 1, beta -> 0: beta times the error and the push are -log p_old - (log p - log p_old) = -log p, exactly."""
    logits = torch.randn(7, CODES, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    ids, old = torch.arange(7) % CODES, torch.randn(7, dtype=torch.float64).abs().neg()
    logprob = logits.log_softmax(-1)[torch.arange(7), ids]
    parts = nft(logprob, old, torch.ones(7), beta=1e-3)
    assert torch.allclose(1e-3 * parts["error"] + parts["push"], cross_entropy(logits, ids, reduction="none"))
    (pushed,) = torch.autograd.grad(parts["push"].sum(), logits, retain_graph=True)
    (learned_,) = torch.autograd.grad(cross_entropy(logits, ids, reduction="sum"), logits)
    torch.testing.assert_close(pushed, learned_)


@pytest.mark.parametrize("advantage", [-1.0, -0.3, 0.5, 1.0])
def test_the_probability_of_an_id_settles_at_advantage_over_beta(advantage: float) -> None:
    logits = torch.zeros(CODES, dtype=torch.float64, requires_grad=True)
    old, optimizer = torch.tensor([-1.7], dtype=torch.float64), torch.optim.SGD([logits], lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        parts = nft(logits.log_softmax(-1)[:1], old, torch.tensor([advantage]), beta=1.0)
        torch.stack(list(parts.values())).sum().backward()
        optimizer.step()
    assert (logits.log_softmax(-1)[0] - old).item() == pytest.approx(advantage, abs=1e-3)


def test_a_distance_is_nothing_between_the_same_and_begins_as_the_error_does() -> None:
    """The law that methods count on, for every kind of model: at the old weights both parts are 0, the gradient of the
    change is that of the error, and the drift has none."""
    start = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    none = torch.zeros(0)
    rest = [none] * 6
    for forward_of in (
        lambda x: DiscreteForward(*rest, logprob=x),
        lambda x: FlowForward(*rest, velocity=x[:, None], target=torch.ones(6, 1)),
    ):
        x = start.clone().requires_grad_()
        new: Any = forward_of(x)
        change, drift = new.distance(forward_of(start))
        assert isinstance(new.distance(forward_of(start)), Distance)
        assert change.abs().max() < 1e-12 and not drift.any()
        (of_change,), (of_error,), (of_drift,) = (
            torch.autograd.grad(values.sum(), x, retain_graph=True) for values in (change, new.image_error, drift)
        )
        torch.testing.assert_close(of_change, of_error)
        assert not of_drift.any()
