"""The slot ``lr``: a factor on the learning rate of one step, by the importance weights of its answers.

The weight of an answer is exp Σ_t(ℓ_k − ℓ_b) over its own tokens, never bounded here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_range
from offpolicy.losses.policy.selection import mean_over
from offpolicy.losses.tokens import Tokens, difference


def effective_share(step: Tokens) -> Tensor:
    """(Σw)²/(B·Σw²), 0-d in (0, 1]: the effective share of the B answers of a step; 1 for none."""
    own = step.own
    counted = own.any(-1)
    sums = torch.where(own, step.previous_logp - step.behavior_logp, 0.0).sum(-1)
    shifted = torch.where(counted, sums, -torch.inf)
    weight = (shifted - shifted.max().nan_to_num(neginf=0.0)).exp()  # the share is the same for any common factor
    square = weight.square().sum() * counted.sum()
    return torch.where(square > 0, weight.sum().square() / square.clamp(min=torch.finfo(weight.dtype).tiny), 1.0)


@dataclass(frozen=True)
class EffectiveRate:
    """√min(1, ESS/(B·base)): a step of stale answers is smaller, as its gradient is less sure (VCPO, arXiv:2602.17616).

    ESS = (Σw)²/Σw² over the B answers of the whole step.

    Args:
        base: share of effective answers at which the learning rate is whole, in (0, 1].
    """

    base: float = 1.0

    def __post_init__(self) -> None:
        check_range("base", self.base, 0.0, 1.0, lower_open=True)

    def __call__(self, step: Tokens, *, iteration: int) -> Tensor:
        return (effective_share(step) / self.base).clamp(max=1.0).sqrt()


@dataclass(frozen=True)
class SkipStep:
    """0, by which a step is skipped, or 1.

    Args:
        ess: the step is skipped where the effective share of its answers is below it, in [0, 1]; None for never.
        kl: the step is skipped where the mean of e^δ − δ − 1 over its own tokens, δ = ℓ − ℓ_b, an estimate of
            KL(π_b ‖ π_θ), is above it, nats, > 0; None for never.
    """

    ess: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        if self.ess is None and self.kl is None:
            raise UsageError("`lr` is 'skip' and would never skip a step; expected `ess`, `kl` or both.")
        if self.ess is not None:
            check_range("ess", self.ess, 0.0, 1.0)
        if self.kl is not None:
            check_range("kl", self.kl, 0.0, lower_open=True)

    def __call__(self, step: Tokens, *, iteration: int) -> Tensor:
        factor = torch.ones((), device=step.logp.device, dtype=step.logp.dtype)
        if self.ess is not None:
            factor = torch.where(effective_share(step) < self.ess, 0.0, factor)
        if self.kl is not None:
            delta = difference(step.logp.detach(), step.behavior_logp, step.own)
            factor = torch.where(mean_over(torch.expm1(delta) - delta, step.own) > self.kl, 0.0, factor)
        return factor
