"""The objectives: small pure functions from velocities and per-token credit to per-token terms.

Every ``*_terms`` function returns its parts by name, each (N,) for N latent tokens and never reduced; the objective is
the sum of the parts, reduced where the weighting is visible (``train.trainer``). Velocities are (N, D), the target is
u = eps - x (``srum.flow``), and "squared error" is its mean over the D channels, as in the released code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Terms = dict[str, Tensor]


def flow_error(v_pred: Tensor, v_target: Tensor) -> Tensor:
    """Squared error of the velocity per token, (N, D), (N, D) -> (N,): the mean over channels."""
    return (v_pred - v_target).square().mean(dim=-1)


def sft_terms(v_pred: Tensor, v_target: Tensor) -> Terms:
    """Plain flow matching on the candidates: weight one everywhere."""
    return {"flow": flow_error(v_pred, v_target)}


def srum_weight(reward: Tensor, alpha: Tensor | float, constraint_weight: float) -> Tensor:
    """Weight of a token in Eq. 3, w = alpha R + lambda_c: preserved where positive, repelled where negative.

    ``reward`` R (N,) in [-1, 1] (signed) or [0, 1] (unit); ``alpha`` in [0, 1], (N,) or a number.
    """
    return alpha * reward + constraint_weight


def srum_terms(
    v_pred: Tensor, v_target: Tensor, reward: Tensor, alpha: Tensor | float, constraint_weight: float
) -> Terms:
    """SRUM, Eq. 1-3: ``reward`` alpha R |v - u|^2 and ``reference`` lambda_c |v - u|^2, each (N,).

    Arguments as in :func:`srum_weight`. One clean latent serves both parts, as in the paper; the released code encodes
    the image twice and compares each part with its own encoding.
    """
    error = flow_error(v_pred, v_target)
    return {"reward": alpha * reward * error, "reference": constraint_weight * error}


def region_nft_terms(v_pred: Tensor, v_old: Tensor, v_target: Tensor, advantage: Tensor, beta: float) -> Terms:
    """Region-NFT (docs/specs/srum.md, 6), beyond the paper: a push away from bad regions that is bounded.

        L = (r |v+ - u|^2 + (1 - r) |v- - u|^2) / beta,    r = (1 + A) / 2,    v+- = v_old +- beta (v - v_old)
          = |e|^2 / beta + 2 A e.d + beta |d|^2            with e = v_old - u, d = v - v_old

    The parts ``error``, ``push`` and ``trust`` are the three terms of the last line, which is what is computed: at
    v = v_old with A = 0 its gradient is exactly zero. ``advantage`` A (N,) in [-1, 1]; ``v_old`` without gradient.
    With A = 1 and beta = 1 the sum is the squared error of SFT.
    """
    e, d = v_old - v_target, v_pred - v_old
    return {
        "error": e.square().mean(dim=-1) / beta,
        "push": 2 * advantage * (e * d).mean(dim=-1),
        "trust": beta * d.square().mean(dim=-1),
    }


def sample_advantages(scores: Tensor, groups: Sequence[str], offset: float = 0.0) -> Tensor:
    """Advantage of each candidate among those of its prompt: (N,) scores -> (N,) float32 in [-1, 1].

        A_i = clip((s_i - mean of the prompt's scores) / (2 std of all scores) + offset, -1, 1)

    ``groups`` names the prompt of each score. The standard deviation (population) runs over the whole batch, so a
    prompt whose candidates hardly differ is not blown up. Scores that are all equal differ from nothing: offset alone.
    """
    scores = scores.double()
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([numbers[group] for group in groups])
    sums, counts = torch.zeros(2, len(numbers), dtype=torch.float64).index_add_(
        1, index, torch.stack([scores, torch.ones_like(scores)])
    )
    centred = (scores - (sums / counts)[index]).round(decimals=12)  # equal scores: zero, not the mean's rounding error
    spread = (2 * scores.std(correction=0)).clamp(min=1e-8)
    return (centred / spread + offset).clamp(-1, 1).float()


def spread_by_blame(advantage: float, reward_map: Tensor) -> Tensor:
    """A candidate's advantage in [-1, 1] on the cells of its reward map (h, w) -> (h, w) in [-1, 1].

    Praise is uniform. A negative advantage goes to the cells in proportion to blame, 1 - R, normalised to mean 1, so
    that a signed map and a unit one blame alike, and mixed half and half with uniform; without any blame it is uniform.
    """
    blame = 1 - reward_map
    if advantage >= 0 or blame.sum() == 0:
        return torch.full_like(reward_map, advantage)
    return (advantage * (0.5 + 0.5 * blame / blame.mean())).clamp(-1, 1)
