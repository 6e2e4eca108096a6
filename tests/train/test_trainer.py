"""The trainer on a model of a few lines: determinism, resume, what is trained, how it fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import srum.train.metrics as metrics
import srum.train.trainer as trainer
from srum.config import RunConfig
from srum.errors import TrainingError
from srum.flow import FlowNoise, interpolate
from srum.models.base import FlowForward, Segment
from srum.processes import Processes
from srum.records import Candidate, RewardMap
from srum.run import find_method
from srum.run_dir import write_records
from srum.train.checkpoint import CheckpointMismatch, list_checkpoints
from srum.train.data import TrainingRecord, candidate_examples, load_training_records
from srum.train.examples import draw_order
from srum.train.methods.base import CandidateMethod
from srum.train.methods.region_nft import RegionNft
from srum.train.metrics import TIMESTEP_BINS, image_sums, keep_rows, step_means, text_sums
from srum.train.packs import at_timestep, cut
from srum.train.trainer import Losses, NonFiniteError, Trainer, TrainResult
from tests.train.ranks import config_of, learn, learned

CHANNELS, SIDE = 3, 2


class TinyModel(nn.Module):
    """Velocity of a token: a small network on x_t, t and the sum of the texts' embeddings."""

    device = torch.device("cpu")
    abilities = frozenset({"train"})

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.understanding = nn.Embedding(8, 4)
        self.generation = nn.Sequential(nn.Linear(CHANNELS + 5, 16), nn.Tanh(), nn.Linear(16, CHANNELS))
        self.table = nn.Parameter(torch.ones(1), requires_grad=False)

    def tokens(self, latent: Tensor) -> Tensor:
        return latent.flatten(1).T

    def corrupt(self, latent: Tensor, generator: torch.Generator, shift: float, t: float | None = None) -> FlowNoise:
        t = torch.rand((), generator=generator).item() ** (1 / shift) if t is None else t
        return FlowNoise(torch.randn(self.tokens(latent).shape, generator=generator), t)

    def targets(self, segments: Sequence[Segment], corruptions: Sequence[FlowNoise]) -> tuple[int, int]:
        return sum(len(corruption.noise) for corruption in corruptions), 0

    def pack(self, samples: Sequence[Sequence[Segment]], corruptions: Sequence[FlowNoise]) -> list[Any]:
        return [
            ([len(s.text) % 8 for s in sample if s.text and not s.dropped], self.tokens(sample[-1].latent), drawn)
            for sample, drawn in zip(samples, corruptions, strict=True)
        ]

    def forward(self, batch: list[Any]) -> FlowForward:
        inputs = []
        for texts, clean, drawn in batch:
            text = self.understanding(torch.tensor(texts, dtype=torch.long)).sum(dim=0)
            x_t, t = interpolate(clean, drawn.noise, drawn.t), torch.full((len(clean), 1), drawn.t)
            inputs.append(torch.cat([x_t, t, text.expand(len(clean), -1)], dim=1))
        sizes = torch.tensor([len(x) for x in inputs])
        return FlowForward(
            velocity=self.generation(torch.cat(inputs)) * self.table,
            target=torch.cat([drawn.noise - clean for _, clean, drawn in batch]),
            timestep=torch.tensor([drawn.t for _, _, drawn in batch]).repeat_interleave(sizes),
            image_segment=torch.arange(len(batch)).repeat_interleave(sizes),
            cell=torch.cat([torch.arange(size) for size in sizes]),
            logits=torch.zeros(0, 2),
            labels=torch.zeros(0, dtype=torch.long),
            text_segment=torch.zeros(0, dtype=torch.long),
        )

    def generation_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"generation.{name}", parameter) for name, parameter in self.generation.named_parameters()]

    @property
    def network(self) -> nn.Module:
        return self

    def layers(self) -> list[nn.Module]:
        return [self.generation]

    def length(self, segments: Sequence[Segment]) -> int:
        return sum(len(self.tokens(s.latent)) if s.latent is not None else len(s.text or "") for s in segments)

    def save(self, folder: Path, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True)
        save_file(dict(weights), folder / "ema.safetensors")


def candidate(number: int) -> Candidate:
    return Candidate(
        id=f"c{number}",
        prompt_id=f"p{number // 2}",
        prompt="red square"[: 3 + number],
        index=number % 2,
        seed=number,
        plan="plan",
        image=f"images/c{number}.png",
        latent=f"latents/c{number}.safetensors",
        size=(SIDE, SIDE),
    )


def make_records(count: int = 6) -> list[TrainingRecord]:
    generator = torch.Generator().manual_seed(5)
    return [
        TrainingRecord(
            candidate=candidate(number),
            latent=torch.randn(CHANNELS, SIDE, SIDE, generator=generator),
            reward_map=torch.rand(SIDE, SIDE, generator=generator) * 2 - 1,
            mapping="signed",
            alpha=0.75,
            sample_score=torch.rand((), generator=generator).item() * 2 - 1,
        )
        for number in range(count)
    ]


def settings(**values: Any) -> RunConfig:
    return config_of(
        **{"steps": 6, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 2, "rollout": {"plan": True}} | values
    )


def run(
    folder: Path,
    config: RunConfig,
    model: TinyModel | None = None,
    records: list[TrainingRecord] | None = None,
    seed: int = 1,
) -> TrainResult:
    records = make_records() if records is None else records
    return learn(model or TinyModel(), records, config, folder, seed)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "ema.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a | b)


METHODS = ["sft", "srum", "region_nft"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 2, 5, 6])
def test_resume_is_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, stop: int
) -> None:
    config = settings(method=method, schedule="cosine", warmup_steps=2)
    whole = run(tmp_path / "whole", config)

    def torn(path: Path, row: dict[str, Any]) -> None:
        if row["step"] == stop:
            path.write_text(path.read_text() + '{"step":' if path.exists() else '{"st')
            raise KeyboardInterrupt
        append_row(path, row)

    append_row = metrics.append_row
    monkeypatch.setattr(metrics, "append_row", torn)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", config)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "model").exists()

    resumed = run(tmp_path / "cut", config)
    assert resumed.start == (stop - 1) // 2 * 2
    assert resumed.losses == whole.losses
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_old_weights_that_were_taken_anew_between_checkpoints_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken before the fourth step, wanted by the fifth, which follows a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RegionNft, "old_decay", lambda *_: 1.0)
        patch.setattr(RegionNft, "old_every", lambda *_: 3)
        test_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path, monkeypatch, "region_nft", 6)


def test_a_finished_folder_returns_at_once_with_its_weights(tmp_path: Path) -> None:
    trained, fresh = TinyModel(), TinyModel()
    first = run(tmp_path, settings(), trained)
    written = (tmp_path / "model").stat().st_mtime_ns
    for model in (fresh, trained):
        again = run(tmp_path, settings(), model)
        assert (again.start, again.losses, again.model) == (6, first.losses, tmp_path / "model")
        assert same(dict(model.state_dict()), weights(tmp_path))
    assert (tmp_path / "model").stat().st_mtime_ns == written


def test_the_last_two_checkpoints_are_kept_and_nothing_partial(tmp_path: Path) -> None:
    run(tmp_path, settings())
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000004", "step-00000006"]
    assert not list(tmp_path.rglob("*.partial"))


def test_checkpoints_written_in_the_background_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds the weights of its own step, though the training goes on while it is written."""
    run(tmp_path / "at once", settings())
    monkeypatch.setattr(trainer, "IN_BACKGROUND", frozenset({"cpu"}))
    run(tmp_path / "meanwhile", settings())
    for step in (4, 6):
        name = f"checkpoints/step-{step:08d}/__0_0.distcp"
        assert (tmp_path / "meanwhile" / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": settings(lr=1e-3)}, "config"),
        ({"seed": 2}, "seed"),
        ({"records": make_records(5)}, "examples"),
        ({"records": [replace(r, sample_score=-r.sample_score) for r in make_records()]}, "examples"),
        ({"records": [replace(r, reward_map=-r.reward_map) for r in make_records()]}, "examples"),
    ],
)
def test_the_checkpoints_of_another_run_are_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    run(tmp_path, settings())
    with pytest.raises(CheckpointMismatch, match=f"different: {named}"):
        run(tmp_path, **({"config": settings()} | change))


def test_resuming_with_a_model_other_than_the_one_that_entered_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, step = TinyModel(), Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, k: step(self, k) if k < 3 else (_ for _ in ()).throw(OSError()))
    with pytest.raises(OSError):
        run(tmp_path, settings(), model)
    monkeypatch.undo()
    with pytest.raises(CheckpointMismatch, match="different: model"):
        run(tmp_path, settings(), model)


def losses_of(config: RunConfig, records: list[TrainingRecord], step: int) -> list[Losses]:
    """Of the packs of a step in one process."""
    model = TinyModel()
    mix, objective = learned(records, config, seed=1)
    feed = mix.feed(model, config.train, 1, Processes())  # type: ignore[arg-type]
    trained = [name for name, _ in model.generation_parameters()]
    own = Trainer(model, feed, objective, config.train, 1, trained)  # type: ignore[arg-type]
    return [own.losses(pack) for pack, _ in feed.step(step).packs]


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"memory": {"pack_tokens": 30}}])
def test_draws_depend_on_neither_batch_size_nor_packs(change: dict[str, Any]) -> None:
    """Samples 0-3 in one pack are those of two steps, or of two packs: order, dropout, timestep and noise."""
    records = make_records(3)  # an epoch ends inside the batch
    (whole,) = losses_of(settings(text_dropout=0.5), records, 0)
    steps = (0, 1) if "batch_size" in change else (0,)
    halves = [half for step in steps for half in losses_of(settings(text_dropout=0.5, **change), records, step)]
    assert len(halves) == 2 and sorted(whole.pack.ids) == sorted(halves[0].pack.ids + halves[1].pack.ids)
    joined = [(own, index) for own in halves for index in range(len(own.pack.ids))]

    def facts(own: Losses, index: int) -> list[Any]:
        here = own.forward.image_segment == index
        tokens = [own.forward.target[here], own.credit[here], own.forward.timestep[here]]
        texts, clean, drawn = own.pack.packed[index]
        return [own.pack.ids[index], texts, drawn.t, *(x.tolist() for x in (*tokens, clean, drawn.noise))]

    key = repr
    assert sorted((facts(whole, i) for i in range(4)), key=key) == sorted((facts(*place) for place in joined), key=key)


def test_packs_keep_to_the_budget_and_are_balanced() -> None:
    """5 + 4 + 3 + 3 + 2 = 17 tokens; longest first: 5, 4 | 4+3, 5+3 | 7+2 is over 8, so that it takes three packs."""
    lengths = [3, 5, 2, 4, 3]
    assert cut(lengths, None) == [[0, 1, 2, 3, 4]]
    assert cut(lengths, 9) == [[1, 4], [0, 2, 3]]
    assert cut(lengths, 8) == [[1], [2, 3], [0, 4]]
    assert cut(lengths, 8, processes=2) == [[1], [3], [0, 2], [4]]
    assert cut(lengths, None, processes=2) == [[1, 4], [0, 2, 3]]
    assert cut([4, 2], None, processes=3) == [[0], [1], []]
    with pytest.raises(TrainingError, match="pack_tokens: 4 is less than the 5 tokens"):
        cut(lengths, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pack_tokens", [20, 40])
def test_packs_change_no_step(tmp_path: Path, method: str, pack_tokens: int) -> None:
    """The mean is over the tokens of the step: packs of unlike size give the gradient of the whole batch."""
    records = make_records()
    records[1] = replace(records[1], latent=torch.ones(CHANNELS, 3, 4), reward_map=torch.full((3, 4), -0.5))
    smooth = {
        "method": method,
        "precision": "fp32",
        "eps": 1e-6,
    }  # else Adam makes a step of what is a rounding error of the gradient
    whole = run(tmp_path / "whole", settings(**smooth), records=records)
    packed = run(tmp_path / "packed", settings(**smooth, memory={"pack_tokens": pack_tokens}), records=records)
    assert packed.losses == pytest.approx(whole.losses, rel=1e-5)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "packed")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_every_epoch_sees_every_record_and_draws_anew() -> None:
    stream = draw_order(5, 0, 15, seed=3)
    for epoch in range(3):
        assert sorted(stream[5 * epoch : 5 * epoch + 5]) == [(epoch, index) for index in range(5)]
    assert draw_order(5, 7, 12, seed=3) == stream[7:12]
    (own,) = losses_of(settings(method="sft", batch_size=2), make_records(1), 0)
    assert own.forward.timestep[0] != own.forward.timestep[-1]


def test_sft_on_one_record_lowers_its_loss(tmp_path: Path) -> None:
    record = replace(make_records(1)[0], latent=torch.full((CHANNELS, SIDE, SIDE), 2.0))
    config = settings(method="sft", steps=120, batch_size=8, checkpoint_every=120)
    losses = run(tmp_path, config, records=[record]).losses
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_region_nft_without_a_difference_is_refused_before_the_first_step(tmp_path: Path) -> None:
    records = [replace(record, sample_score=0.3) for record in make_records()]
    with pytest.raises(TrainingError, match=r"nothing to prefer: the candidates of each of \d+ prompts .*\d of 0\.3"):
        run(tmp_path, settings(method="region_nft"), records=records)
    assert not (tmp_path / "model").exists() and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("scope", ["generation", "all"])
def test_only_the_chosen_weights_are_trained(tmp_path: Path, scope: str) -> None:
    model, before = TinyModel(), dict(TinyModel().state_dict())
    run(tmp_path, settings(trainable=scope, text_dropout=0.0), model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"generation"} | ({"understanding"} if scope == "all" else set())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["table"]


UPDATES = {"rank": 2, "alpha": 2}


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        *(("sft", {name: value}) for name, value in {
            "steps": 7, "batch_size": 3, "lr": 2e-2, "schedule": "cosine", "warmup_steps": 2, "betas": (0.5, 0.95),
            "eps": 1e-2, "weight_decay": 0.1, "clip": 0.01, "text_dropout": 0.9, "timestep_shift": 1.0,
            "trainable": "all", "plan_in_context": True, "ema": 0.5, "precision": "bf16",
            "validation": {"share": 0.4}, "lora": UPDATES | {"alpha": 8},
        }.items()),
        *(("srum", {name: value}) for name, value in {
            "constraint_weight": 0.25, "use_layout": False, "credit": "sample",
        }.items()),
        *(("region_nft", {name: value}) for name, value in {
            "beta": 0.6, "old_decay": 0.5, "credit": "sample", "advantage_offset": 0.25,
        }.items()),
    ],
    ids=str,
)  # fmt: skip
def test_no_field_of_training_is_ignored(tmp_path: Path, method: str, changed: dict[str, Any]) -> None:
    """Another value of this field alone publishes other weights."""
    before = {"lora": UPDATES} if "lora" in changed else {}
    for name, values in (("before", before), ("changed", changed)):
        run(tmp_path / name, settings(**{"method": method, "precision": "fp32"} | values))
    assert not same(weights(tmp_path / "before"), weights(tmp_path / "changed"))


def test_validation_draws_its_noise_by_seed_candidate_and_timestep() -> None:
    """Two seeds, two candidates and four timesteps: sixteen noises, again the same."""

    def noises() -> list[Tensor]:
        records = make_records(2)
        return [
            at_timestep(TinyModel(), example, settings().train, seed, number).corruptions[0].noise  # type: ignore
            for seed in (1, 2)
            for example in candidate_examples(records, [record.reward_map for record in records])
            for number in range(TIMESTEP_BINS)
        ]

    drawn, again = noises(), noises()
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == len(drawn) == 16
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_non_finite_loss_names_its_candidate(tmp_path: Path, method: str) -> None:
    records = make_records()
    records[4].latent[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="loss in step 1") as caught:
        run(tmp_path, settings(method=method, batch_size=18), records=records)
    assert caught.value.ids == ["c4"] and str(caught.value).count("c4") == 1


def test_a_non_finite_gradient_stops_before_the_weights_change(tmp_path: Path) -> None:
    model = TinyModel()
    model.generation[0].weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(NonFiniteError, match="gradient in step 1"):
        run(tmp_path, settings(), model)
    assert same(dict(model.state_dict()), dict(TinyModel().state_dict()))


def test_a_map_of_another_size_is_refused(tmp_path: Path) -> None:
    records = [replace(record, reward_map=torch.zeros(3, 2)) for record in make_records()]
    with pytest.raises(TrainingError, match=r"c\d: a credit of \(3, 2\) on 4 noisy tokens"):
        run(tmp_path, settings(), records=records)


def credits_of(records: list[TrainingRecord], **values: Any) -> list[Tensor]:
    config = settings(**values)
    method = find_method(config.method)
    assert isinstance(method, CandidateMethod)
    return list(method.credits(records, config))


def test_credit_is_alpha_times_the_map_or_the_samples_one_score() -> None:
    record = make_records()[0]
    for mapping, score in (("signed", record.sample_score), ("unit", (record.sample_score + 1) / 2)):
        changed = replace(record, mapping=mapping)  # type: ignore[arg-type]
        (region,) = credits_of([changed], method="srum")
        (sample,) = credits_of([changed], method="srum", credit="sample")
        (alone,) = credits_of([changed], method="srum", use_layout=False)
        assert torch.equal(region, 0.75 * record.reward_map) and torch.equal(alone, record.reward_map)
        torch.testing.assert_close(sample, torch.full((SIDE, SIDE), 0.75 * score))


def test_region_nft_blames_regions_or_the_sample() -> None:
    records = [replace(r, sample_score=0.5 - i % 2) for i, r in enumerate(make_records(2))]
    region, sample = (credits_of(records, method="region_nft", credit=credit) for credit in ("region", "sample"))
    assert sample[0].eq(0.5).all() and sample[1].eq(-0.5).all()
    assert torch.equal(region[0], sample[0])
    assert region[1].std() > 0 and region[1].flatten().argmin() == records[1].reward_map.flatten().argmin()


def test_texts_are_dropped_together_and_the_plan_is_there_on_request() -> None:
    for plan, dropout, texts in ((False, 0.0, 1), (True, 0.0, 2), (True, 1.0, 0)):
        (own,) = losses_of(settings(plan_in_context=plan, text_dropout=dropout), make_records(4), 0)
        assert [len(sample[0]) for sample in own.pack.packed] == [texts] * 4


def test_learning_rate_schedules() -> None:
    """Four steps after a warm-up of two: linear 1, 3/4, 1/2, 1/4; cosine 1, (1 + 2^-1/2) / 2, 1/2, (1 - 2^-1/2) / 2."""
    for schedule, after in {
        "constant": [1.0] * 4,
        "linear": [1.0, 0.75, 0.5, 0.25],
        "cosine": [1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2],
    }.items():
        config = settings(schedule=schedule, warmup_steps=2).train
        assert [trainer.lr_factor(step, config) for step in range(6)] == pytest.approx([0.5, 1.0, *after])


def test_metrics_hold_the_parts_of_the_loss(tmp_path: Path) -> None:
    run(tmp_path, settings(method="srum", precision="bf16"))
    rows = keep_rows(tmp_path / "metrics.jsonl", 6)
    assert [row["step"] for row in rows] == list(range(1, 7))
    for row in rows:
        assert set(row) == {"step", "loss", "parts", "grad_norm", "lr", "mean_credit", "loss_by_timestep"}
        assert row["loss"] == pytest.approx(row["parts"]["reward"] + row["parts"]["reference"], rel=1e-5)


def test_means_over_the_tokens_of_two_packs() -> None:
    """Image terms 1, 3 and 5, 7 in two parts, at t = 0, 0.2 and 0.3, 1: a mean of 4; by quarters 2, 5, none, 7.
    Text terms 1, 2 and 6: a mean of 3, which the loss has beside it."""
    first = image_sums(
        {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0, 2.0])}, *torch.tensor([[1, 2], [0, 0.2]])
    )
    second = image_sums(
        {"a": torch.tensor([5.0, 3.0]), "b": torch.tensor([0.0, 4.0])}, *torch.tensor([[3, 4], [0.3, 1]])
    )
    texts = sum(text_sums({"text": torch.tensor(terms)}) for terms in ([1.0, 2.0], [6.0]))
    assert isinstance(texts, Tensor)
    names = (["a", "b"], ["text"])
    images = {"a": 2.5, "b": 1.5}
    rest = {"mean_credit": 2.5, "loss_by_timestep": [2.0, 5.0, None, 7.0]}
    assert step_means(first + second, texts, names, 3) == {"loss": 7.0, "parts": images | {"text": 3.0}, **rest}
    same = step_means(first + second, texts, (["a", "b"], ["a"]), 3)
    assert same == {"loss": 7.0, "parts": {"a": 5.5, "b": 1.5}, **rest}
    assert step_means(first + second, 0 * texts, names, 0) == {"loss": 4.0, "parts": images, **rest}
    nothing = {"mean_credit": None, "loss_by_timestep": [None] * 4}
    assert step_means(0 * first, texts, names, 3) == {"loss": 3.0, "parts": {"text": 3.0}, **nothing}


def write_round(folder: Path, values: Tensor) -> None:
    for name in ("latents", "rewards"):
        (folder / name).mkdir(parents=True)
    candidates = [candidate(number) for number in range(3)]
    for number, made in enumerate(candidates):
        save_file({"latent": torch.full((CHANNELS, SIDE, SIDE), float(number))}, folder / made.latent)
    facts: dict[str, Any] = {"grid": (SIDE, SIDE), "mapping": "signed", "alpha": 0.5, "sample_score": -0.5}
    rewards = [RewardMap(candidate_id=name, values=f"rewards/{name}.safetensors", **facts) for name in ("c2", "c0")]
    for reward in rewards:
        save_file({"values": values}, folder / reward.values)
    write_records(folder / "candidates.jsonl", candidates)
    write_records(folder / "rewards.jsonl", rewards)


def test_loading_skips_candidates_without_a_map(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, -1.0], [0.0, 0.5]])
    write_round(tmp_path, values)
    records = load_training_records(tmp_path)
    assert [record.candidate.id for record in records] == ["c0", "c2"]
    assert all(torch.equal(record.reward_map, values) for record in records)
    assert records[1].latent.unique().tolist() == [2.0]
    assert (records[0].alpha, records[0].sample_score, records[0].mapped_score) == (0.5, -0.5, -0.5)


def test_a_map_outside_its_range_is_refused(tmp_path: Path) -> None:
    write_round(tmp_path, torch.tensor([[1.0, -1.5], [0.0, 0.5]]))
    (record, _) = load_training_records(tmp_path)
    with pytest.raises(ValueError, match="expected"):
        record.reward_map  # noqa: B018


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to train on"):
        run(tmp_path, settings(method="sft"), records=[])
