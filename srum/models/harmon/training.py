"""What is learned from an example: the rows of a pack, the masks that are drawn for it, and what is predicted
(docs/specs/harmon.md, 12 to 14)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import torch
from torch import Tensor

from srum.models.base import Distance, TrainingForward
from srum.models.harmon.head import STEPS
from srum.models.harmon.mar import Masked

RATES = NormalDist(1.0, 0.25)  # of the share of tokens that is hidden, cut at 1 and at the config's least


@dataclass(frozen=True)
class Masking:
    """What corrupts a latent of n tokens: which are ``hidden`` (n,), k of them, and of each the diffusion times
    ``steps`` (M, k) and noise (M, k, C) at which the head is asked for it."""

    hidden: Tensor
    steps: Tensor
    noise: Tensor

    @property
    def t(self) -> float:
        """The share that is hidden."""
        return self.hidden.float().mean().item()


def masking(
    count: int, channels: int, repeats: int, least: float, generator: torch.Generator, t: float | None
) -> Masking:
    """Of ``count`` tokens the share ``t``, or one that is drawn, rounded up; which, when and with what noise."""
    share = _share(torch.rand((), generator=generator).item(), least) if t is None else t
    hidden = torch.zeros(count, dtype=torch.bool)
    hidden[torch.randperm(count, generator=generator)[: max(1, math.ceil(share * count))]] = True
    asked = (repeats, int(hidden.sum()))
    steps = torch.randint(STEPS, asked, generator=generator)
    return Masking(hidden, steps, torch.randn(*asked, channels, generator=generator))


def _share(u: float, least: float) -> float:
    """Of the normal distribution between ``least`` and 1, of a uniform draw."""
    low, high = RATES.cdf(least), RATES.cdf(1.0)
    return RATES.inv_cdf(low + u * (high - low))


@dataclass(frozen=True)
class Drawn:
    """An image to be learned: what of it is visible, its clean hidden tokens (k, C), and ``steps`` (M, k) and ``noise``
    (M, k, C) of these. Not ``learned``: there so that all processes run the same."""

    image: Masked
    clean: Tensor
    steps: Tensor
    noise: Tensor
    learned: bool = True

    @classmethod
    def of(cls, latent: Tensor, how: Masking, learned: bool = True) -> Drawn:
        """A latent (C, h, w) on its device, masked so."""
        hidden = how.hidden.to(latent.device)
        clean = latent.flatten(1).T[hidden]
        return cls(Masked.of(latent, hidden), clean, how.steps.to(latent.device), how.noise.to(latent.device), learned)


@dataclass(frozen=True)
class TrainingRow:
    """One example: ids (L,) of texts and images that are seen, in order; at the end an image, or the ids of a reply."""

    parts: Sequence[Tensor | Masked]
    end: Drawn | Tensor


@dataclass(frozen=True)
class HarmonForward(TrainingForward):
    """Of each hidden token the ``noise`` (N, M, C) that was added in each of M draws and the one ``predicted``, and the
    ``bound`` (N,) that trains the head's variance."""

    predicted: Tensor
    noise: Tensor
    bound: Tensor

    @cached_property
    def image_error(self) -> Tensor:
        """Squared error of the noise, (N,): the mean over draws and channels."""
        return (self.predicted - self.noise).square().mean(dim=(1, 2))

    @property
    def extra(self) -> dict[str, Tensor]:
        """The variance's bound: with a negative weight it would have no end, and it says nothing of the content."""
        return {"variance": self.bound}

    def distance(self, old: HarmonForward) -> Distance:
        """As of flow, with noise in place of velocities: e = old - noise and d = predicted - old give 2 e.d, |d|^2."""
        drift = (self.predicted - old.predicted).square().mean(dim=(1, 2))
        return Distance(self.image_error - old.image_error - drift, drift)
