"""The slot ``weight``, continued: factors by the advantage, by the change of entropy, and by whole answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import check_choice, check_range
from offpolicy.losses.policy.masks import fact
from offpolicy.losses.policy.ratios import DENOMINATORS, denominator_of
from offpolicy.losses.policy.weights import AgeWeight
from offpolicy.losses.tokens import Tokens, field, per_token

TINY = 1e-8


@dataclass(frozen=True)
class Steer:
    """Less weight for tokens that would change the entropy most (STEER, arXiv:2510.10150).

    Ω = |A/p_b · p(1 − p)(ln p + H)| with p = π_θ is the change of the entropy to first order. "exponential":
    exp(−kΩ) with k = −ln ``least`` / max(max Ω, .02), so in [``least``, 1]; "linear": from ``most`` at the smallest Ω
    of the step to ``least`` at the largest. The paper has the first; the code's default is the second, and both take
    the extremes of a micro-batch, here those of the step's own tokens.

    Args:
        mapping: "exponential" or "linear".
        least: in (0, 1].
        most: ≥ ``least``; of "linear" alone.
        denominator: p_b, "behavior" or "previous".
    """

    mapping: str = "exponential"
    least: float = 0.8
    most: float = 1.2
    denominator: str = "behavior"

    reads_values: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        check_choice("mapping", self.mapping, ("exponential", "linear"))
        check_range("least", self.least, 0.0, 1.0, lower_open=True)
        check_range("most", self.most, self.least)
        check_choice("denominator", self.denominator, DENOMINATORS)

    def change(self, tokens: Tokens) -> Tensor:
        """Ω of own tokens, (B, T); 0 elsewhere."""
        p = tokens.logp.detach().exp().clamp(TINY, 1 - TINY)
        before = denominator_of(tokens, self.denominator).exp().clamp(min=TINY)
        found = per_token(tokens.advantage) / before * p * (1 - p) * (p.log() + field(tokens, "entropy").detach())
        return torch.where(tokens.own, found.abs(), 0.0)

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        change = self.change(step)
        return {"smallest": torch.where(step.own, change, torch.inf).min(), "largest": change.max()}

    def __call__(self, tokens: Tokens) -> Tensor:
        change, largest = self.change(tokens), fact(tokens, "largest")
        if self.mapping == "exponential":
            weight = self.least ** (change / largest.clamp(min=0.02))
        else:
            smallest = fact(tokens, "smallest")
            place = torch.where(largest > smallest, (change - smallest) / (largest - smallest), 0.5)
            weight = self.most - (self.most - self.least) * place
        return torch.where(tokens.own, weight, 1.0)


@dataclass(frozen=True)
class SignFactor:
    """What the two below share: a factor on own tokens whose advantage has one sign."""

    factor: float = 0.0

    sign: ClassVar[int]

    def __post_init__(self) -> None:
        check_range("factor", self.factor, 0.0)

    def __call__(self, tokens: Tokens) -> Tensor:
        meant = (self.sign * per_token(tokens.advantage) > 0) & tokens.own
        return torch.where(meant, self.factor, torch.ones_like(tokens.mask))


class MaskNegative(SignFactor):
    """A factor on own tokens with A < 0; 0 leaves them out.

    Args:
        factor: ≥ 0.
    """

    sign = -1


class MaskPositive(SignFactor):
    """A factor on own tokens with A > 0; 0 leaves them out.

    Args:
        factor: ≥ 0.
    """

    sign = 1


@dataclass(frozen=True)
class VCPOWeight(AgeWeight):
    """exp Σ_t(ℓ_k − ℓ_b) of the answer, at most 8 (VCPO, arXiv:2602.17616): ``age`` with the paper's numbers. Goes with
    the ratio "none" and the trust region "none".

    Args:
        mode: as of ``engine``.
        cap: > 0.
    """

    cap: float = 8.0
