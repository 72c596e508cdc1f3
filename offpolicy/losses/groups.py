"""Losses and measures of several answers to one prompt: pure functions of tables (B, K), one value per row.

Row b has k_b ≤ K answers; ``present (B, K)`` bool says which. What stands elsewhere has no influence.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from offpolicy.errors import check_choice, check_range

PairNorm = Literal["pair_mean", "k_minus_1"]
PAIR_NORMS: tuple[PairNorm, ...] = ("pair_mean", "k_minus_1")


def copg_group_loss(
    log_ratio: Tensor, reward: Tensor, present: Tensor, *, beta: float, normalise: PairNorm = "pair_mean"
) -> Tensor:
    """Contrastive policy gradient over all pairs of the answers to a prompt (arXiv:2406.19185), (B,).

    With R_β = R − β·log-ratio: "pair_mean" is the mean over pairs of (R_β,i − R_β,j)²/(2β), "k_minus_1" the paper's
    Σ_{i>j} (R_β,i − R_β,j)²/(k − 1), which is β·k times as much. The gradient of the first is −(2/k)·Σ_i (R_β,i − mean
    of the others)·∇log π(y_i|x): REINFORCE with the leave-one-out baseline, but for answers drawn from any law.

    Args:
        log_ratio: summed log π(y|x) − log π_ref(y|x), (B, K).
        reward: R, (B, K).
        present: (B, K) bool, at least two in every row.
        beta: weight of the divergence from the reference, > 0.
        normalise: "pair_mean", so that a rate does not depend on k and β, or "k_minus_1".
    """
    check_range("beta", beta, 0.0, lower_open=True)
    check_choice("normalise", normalise, PAIR_NORMS)
    count = present.sum(1).to(log_ratio.dtype)
    value = torch.where(present, reward.to(log_ratio.dtype) - beta * log_ratio, 0.0)
    centred = torch.where(present, value - (value.sum(1) / count)[:, None], 0.0)
    spread = centred.square().sum(1) / (count - 1)  # Σ over pairs of the squared differences is k·Σ centred²
    return spread / beta if normalise == "pair_mean" else spread * count


def concordance(value: Tensor, score: Tensor, present: Tensor) -> Tensor:
    """The share of pairs of answers with different scores that a value puts in the same order, (B,); ties are wrong.

    NaN for rows whose scores are all equal. ``value``, ``score`` and ``present`` are (B, K).
    """
    better = (score[:, :, None] > score[:, None, :]) & present[:, :, None] & present[:, None, :]
    right = better & (value[:, :, None] > value[:, None, :])
    return right.sum((1, 2)).to(value.dtype) / better.sum((1, 2)).to(value.dtype)


def candidate_entropy(log_ratio: Tensor, present: Tensor) -> Tensor:
    """Entropy of the candidates, H(softmax_i(h_i))/log k in [0, 1], of log-ratios h to the reference, (B,).

    Of the law proportional to π/π_ref (arXiv:2505.23761), over the k ≥ 2 answers at hand alone: 1 where the policy is
    the reference, towards 0 where one answer has risen far above the others. The entropy over all answers is another
    number, of which k answers give no usable estimate.

    Args:
        log_ratio: summed log π(y|x) − log π_ref(y|x), (B, K).
        present: (B, K) bool.
    """
    logp = torch.where(present, log_ratio, -torch.inf).log_softmax(1)
    entropy = -torch.where(present, logp.exp() * logp, 0.0).sum(1)
    return entropy / present.sum(1).to(log_ratio.dtype).log()


def srpo_terms(
    good: Tensor,
    bad: Tensor,
    good_after_bad: Tensor,
    bad_after_good: Tensor,
    good_again: Tensor,
    bad_again: Tensor,
    *,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three squares of self-improving robust preference optimisation (arXiv:2406.01660), (B,) each.

    With g(y) the log-ratio of an answer and f(a|b) that of a as the revision of b: joint = (½ − (β/2)·[g(w) − g(l) +
    f(w|l) − f(l|w)])², over_l = (½ − β·[f(w|l) − f(l|l)])², over_w = (½ − β·[f(w|w) − f(l|w)])².

    Args:
        good: g(w), (B,).
        bad: g(l), (B,).
        good_after_bad: f(w|l), (B,).
        bad_after_good: f(l|w), (B,).
        good_again: f(w|w), (B,).
        bad_again: f(l|l), (B,).
        beta: > 0.
    """
    check_range("beta", beta, 0.0, lower_open=True)
    joint = 0.5 - 0.5 * beta * (good - bad + good_after_bad - bad_after_good)
    over_bad = 0.5 - beta * (good_after_bad - bad_again)
    over_good = 0.5 - beta * (good_again - bad_after_good)
    return joint.square(), over_bad.square(), over_good.square()
