"""The slot ``terms``: losses with a mean of their own beside the policy's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import check_choice, check_range
from offpolicy.losses.policy.anchors import Coefficient, check_coefficient, coefficient
from offpolicy.losses.policy.masks import fact
from offpolicy.losses.tokens import Tokens, Totals, column, field


@dataclass(frozen=True)
class ContrastivePolicyGradient:
    """The mean over pairs of a group of (R_β(i) − R_β(j))²/(2β), R_β = R − β·Σ_t(ℓ − ℓ_base) (CoPG, arXiv:2406.19185).

    Its minimum is the optimal regularised policy whatever policy drew the answers: no ratio, no clipping. Its gradient
    is that of leave-one-out REINFORCE with the regularised reward. A group counts as often as it has answers; one of a
    single answer is 0.

    Args:
        beta: β > 0.
        normalise: "pair_mean", as above; or "k_minus_1", Σ_{i>j}(R_β(i) − R_β(j))²/(k − 1) for k answers, which is β·k
            times that.
        coef: ≥ 0, or knots as in ``k3``.
    """

    beta: float = 0.1
    normalise: str = "pair_mean"
    coef: Coefficient = 1.0

    reads: ClassVar[frozenset[str]] = frozenset({"base_logp"})
    columns: ClassVar[frozenset[str]] = frozenset({"group", "reward"})
    whole_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0.0, lower_open=True)
        check_choice("normalise", self.normalise, ("pair_mean", "k_minus_1"))
        check_coefficient("coef", self.coef)

    def __call__(self, tokens: Tokens, totals: Totals, *, iteration: int) -> Tensor:
        kept, group = tokens.kept, column(tokens, "group")
        counted = kept.any(-1)
        apart = torch.where(kept, tokens.logp - field(tokens, "base_logp"), 0.0).sum(-1)
        reward = torch.where(counted, column(tokens, "reward").to(apart) - self.beta * apart, 0.0)
        same = (group[:, None] == group[None]) & counted[:, None] & counted[None]
        size = same.sum(1).clamp(min=1).to(reward.dtype)
        from_mean = reward - same.to(reward.dtype) @ reward / size
        # Σ_{i>j}(R_i − R_j)² = k·Σ_i(R_i − mean)²; each group counts k / rows
        each = size / (size - 1).clamp(min=1) * torch.where(counted & (size > 1), from_mean.square(), 0.0)
        factor = size if self.normalise == "k_minus_1" else 1 / self.beta
        return coefficient(self.coef, iteration) * (factor * each).sum() / totals.rows


@dataclass(frozen=True)
class DemonstrationLikelihood:
    """coef times the mean of −ℓ over the tokens of all demonstrations of the step, 0 where there are none (the SFT term
    of HPT, arXiv:2509.04419; 1, or .3 for its small model).

    The authors' code takes the mean of each micro-batch, which depends on how a step is split.

    Args:
        coef: ≥ 0, or knots as in ``k3``.
    """

    coef: Coefficient = 1.0

    of_demonstrations: ClassVar[frozenset[str]] = frozenset({"token"})

    def __post_init__(self) -> None:
        check_coefficient("coef", self.coef)

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        return {"count": step.outside.sum().clamp(min=1)}

    def __call__(self, tokens: Tokens, totals: Totals, *, iteration: int) -> Tensor:
        total = torch.where(tokens.outside, tokens.logp, 0.0).sum()
        return -coefficient(self.coef, iteration) * total / fact(tokens, "count")
