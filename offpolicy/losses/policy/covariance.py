"""What lowers the entropy most: tokens whose log-probability and advantage are both far above, or both far below, the
mean of the step (arXiv:2505.22617). Clip-Cov leaves some of them out, KL-Cov holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import check_choice, check_range
from offpolicy.losses.policy.anchors import Coefficient, check_coefficient, coefficient
from offpolicy.losses.policy.masks import MaskedPPO, fact
from offpolicy.losses.policy.ratios import DENOMINATORS, denominator_of
from offpolicy.losses.policy.selection import largest, mean_over, ranks
from offpolicy.losses.tokens import Tokens, difference, field, per_token


def covariances(tokens: Tokens) -> Tensor:
    """(A − mean A)·(ℓ − mean ℓ) of own tokens, (B, T); means over all own tokens given."""
    own, advantage = tokens.own, per_token(tokens.advantage).expand_as(tokens.mask)
    centred = [torch.where(own, x - mean_over(x, own), 0.0) for x in (advantage, tokens.logp.detach())]
    return centred[0] * centred[1]


@dataclass(frozen=True)
class ClipCov(MaskedPPO):
    """Leaves out tokens drawn at random from those whose covariance is between ``lb`` and ``ub`` and that ``ppo`` does
    not clip: max(1, ⌊share·N⌋) of the step's N own tokens, or all of them where they are fewer (Clip-Cov).

    Whether a token is clipped is told by its ratio to the policy that drew it, whatever the ratio of the objective.

    Args:
        low: as in ``ppo``.
        high: likewise.
        share: r, in [0, 1]; 2e-4 in the paper, .02 in SPEAR.
        lb: smallest covariance; 1 in the paper, 2 in SPEAR.
        ub: largest covariance, > ``lb``; 5 in the paper, 60 in SPEAR.
    """

    share: float = 2e-4
    lb: float = 1.0
    ub: float = 5.0

    reads: ClassVar[frozenset[str]] = frozenset({"uniform"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("share", self.share, 0.0, 1.0)
        check_range("ub", self.ub, self.lb, lower_open=True, infinite=True)

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        own, advantage, covariance = step.own, per_token(step.advantage), covariances(step)
        ratio = difference(step.logp, step.behavior_logp, own).exp()
        flat = ((advantage > 0) & (ratio > 1 + self.above)) | ((advantage < 0) & (ratio < 1 - self.low))
        among = own & ~flat & (covariance > self.lb) & (covariance < self.ub)
        count = (self.share * own.sum().to(covariance.dtype)).floor().clamp(min=1)
        return {"drawn": among & (ranks(-field(step, "uniform"), among) < count)}

    def keep(self, tokens: Tokens, advantage: Tensor) -> Tensor:
        return ~fact(tokens, "drawn")


@dataclass(frozen=True)
class KLCov:
    """coef·|ℓ − ℓ_b| on the tokens of the largest covariance, max(1, ⌊share·N⌋) of the step's N own ones (KL-Cov); goes
    with the trust region "none".

    The paper takes .2 % of the tokens for a model of 7 B and .02 % for one of 32 B.

    Args:
        coef: ≥ 0, or knots as in ``k3``.
        share: k, in (0, 1].
        denominator: what ℓ is compared with, "behavior" or "previous".
    """

    coef: Coefficient = 1.0
    share: float = 2e-3
    denominator: str = "behavior"

    def __post_init__(self) -> None:
        check_coefficient("coef", self.coef)
        check_range("share", self.share, 0.0, 1.0, lower_open=True)
        check_choice("denominator", self.denominator, DENOMINATORS)

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        return {"held": largest(covariances(step), step.own, self.share, least=1)}

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        distance = difference(tokens.logp, denominator_of(tokens, self.denominator), tokens.own).abs()
        return coefficient(self.coef, iteration) * torch.where(fact(tokens, "held"), distance, 0.0)
