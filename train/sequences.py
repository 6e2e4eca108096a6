"""Sequences: which samples a step has, how they are cut into packs, and what a pack holds.

Every sample draws its noise, timestep and text dropout from its own seed (run, epoch, candidate), so that the batch
size, the packs, the number of processes and an interruption change none of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srum.config import TrainConfig
from srum.flow import sample_timesteps, velocity_target
from srum.models.base import Segment, UnifiedModel
from srum.seeding import seed_for
from train.data import TrainingRecord
from train.metrics import TIMESTEP_BINS
from train.objectives import sample_advantages, spread_by_blame


class TrainingError(RuntimeError):
    """Training cannot go on, or has done nothing."""


@dataclass(frozen=True)
class Sample:
    """A record with what was drawn for it: ``noise`` (N, D), timestep ``t``; ``credit`` (h, w) on its N tokens."""

    record: TrainingRecord
    credit: Tensor
    segments: Sequence[Segment]
    noise: Tensor
    t: float


@dataclass(frozen=True)
class Pack:
    """Samples that run together. Per-token tensors have the order of ``TrainingForward.velocity``."""

    ids: list[str]
    packed: object
    v_target: Tensor  # (N, D)
    credit: Tensor  # (N,): the reward R (srum), the advantage A (region_nft), one (sft)
    alpha: Tensor  # (N,): the layout factor of Eq. 1
    t: Tensor  # (N,)
    sample: Tensor  # (N,): which sample of the pack the token belongs to


def segments(record: TrainingRecord, plan_in_context: bool) -> list[Segment]:
    """Text -> image: the prompt, its plan where wanted and made, and the latent with its loss. Texts drop together."""
    texts = [record.candidate.prompt]
    if plan_in_context and record.candidate.plan is not None:
        texts.append(record.candidate.plan)
    return [
        *(Segment("text", text=text, droppable=True) for text in texts),
        Segment("noisy", latent=record.latent, loss=True),
    ]


def token_credits(records: Sequence[TrainingRecord], config: TrainConfig) -> list[Tensor]:
    """What each record's tokens are weighted with, (h, w) each: R of Eq. 1, the advantage of region_nft, or one.

    With ``credit: sample`` the candidate's one score, on the map's scale, stands in every cell.
    """
    maps = [record.reward_map for record in records]
    if config.objective == "sft":
        return [torch.ones_like(values) for values in maps]
    if config.objective == "srum":
        return maps if config.credit == "region" else [torch.full_like(r.reward_map, r.mapped_score) for r in records]
    scores = torch.tensor([record.sample_score for record in records])
    groups = [record.candidate.prompt_id for record in records]
    advantages = sample_advantages(scores, groups, config.advantage_offset).tolist()
    if config.credit == "sample":
        return [torch.full_like(values, a) for values, a in zip(maps, advantages, strict=True)]
    return [spread_by_blame(a, r.reward_map) for a, r in zip(advantages, records, strict=True)]


def draw_order(count: int, start: int, stop: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, record) of the samples start <= k < stop of the endless stream of seeded permutations of the records."""
    epochs = range(start // count, (stop - 1) // count + 1)
    stream = [
        (epoch, int(index))
        for epoch in epochs
        for index in torch.randperm(count, generator=generator_for(seed, "order", epoch))
    ]
    return stream[start - epochs[0] * count : stop - epochs[0] * count]


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by ``parts``: the same numbers on every device."""
    return torch.Generator().manual_seed(seed_for(*parts))


def cut(lengths: Sequence[int], budget: int | None, processes: int = 1) -> list[list[int]]:
    """The samples of a step, by ``lengths`` in tokens, in packs of at most ``budget``; the k-th is process k mod P's.

    As few packs as the longest-first rule finds, the same number for every process, nearly equal in tokens; samples
    keep their order within a pack. Packs are empty only where there are fewer samples than processes. Raises
    TrainingError for a sample longer than the budget.
    """
    budget = sum(lengths) if budget is None else budget
    if max(lengths) > budget:
        raise TrainingError(f"train.memory.pack_tokens: {budget} is less than the {max(lengths)} tokens of a sample")
    count = processes * math.ceil(sum(lengths) / (budget * processes))
    while True:
        packs: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            lightest = loads.index(min(loads))
            packs[lightest].append(index)
            loads[lightest] += lengths[index]
        if max(loads) <= budget:
            return [sorted(pack) for pack in packs]
        count += processes


def draw(
    model: UnifiedModel, record: TrainingRecord, credit: Tensor, config: TrainConfig, generator: torch.Generator
) -> Sample:
    """The record with its text dropout, timestep and noise. Raises TrainingError for a map of another size."""
    shape = model.tokens(record.latent).shape
    if shape[0] != credit.numel():
        grid = tuple(credit.shape)
        raise TrainingError(f"candidate {record.candidate.id}: reward map {grid} on {shape[0]} latent tokens")
    drop_text = torch.rand((), generator=generator).item() < config.text_dropout
    t = sample_timesteps(1, config.timestep_shift, generator).item()
    noise = torch.randn(shape, generator=generator)
    kept = [s for s in segments(record, config.plan_in_context) if not (s.droppable and drop_text)]
    return Sample(record, credit, kept, noise, t)


def at_every_timestep(
    model: UnifiedModel, record: TrainingRecord, credit: Tensor, config: TrainConfig, seed: int
) -> list[Sample]:
    """The record with its text at the middle timestep of every bin, its noise drawn by ``seed`` and its id alone."""
    shape = model.tokens(record.latent).shape
    kept = segments(record, config.plan_in_context)
    noises = [
        torch.randn(shape, generator=generator_for(seed, "validation", record.candidate.id, number))
        for number in range(TIMESTEP_BINS)
    ]
    return [Sample(record, credit, kept, noise, (number + 0.5) / TIMESTEP_BINS) for number, noise in enumerate(noises)]


def make_pack(model: UnifiedModel, samples: Sequence[Sample], use_layout: bool) -> Pack:
    """Samples packed by the model, with what the objective needs of every token."""
    targets = [velocity_target(model.tokens(sample.record.latent), sample.noise) for sample in samples]
    counts = torch.tensor([len(target) for target in targets])
    alphas = [sample.record.alpha if use_layout else 1.0 for sample in samples]
    times = [sample.t for sample in samples]
    return Pack(
        ids=[sample.record.candidate.id for sample in samples],
        packed=model.pack([sample.segments for sample in samples], [sample.noise for sample in samples], times),
        v_target=torch.cat(targets).to(model.device),
        credit=torch.cat([sample.credit.flatten() for sample in samples]).to(model.device),
        alpha=torch.tensor(alphas).repeat_interleave(counts).to(model.device),
        t=torch.tensor(times).repeat_interleave(counts).to(model.device),
        sample=torch.arange(len(samples)).repeat_interleave(counts).to(model.device),
    )
