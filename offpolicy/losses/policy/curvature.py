"""The slot ``trust``: tokens by what the optimiser's step would do to them, to second order in the last layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import check_choice, check_range
from offpolicy.losses.policy.masks import MaskedPPO
from offpolicy.losses.tokens import Tokens, field

FORMS = ("ratio", "log")
SETS = ("token", "answer")


def predicted_gain(advantage: Tensor, shift: Tensor, variance: Tensor, form: str) -> Tensor:
    """Change of A·ρ ("ratio") or A·ℓ ("log") of tokens to second order, by ``Tokens.shift`` and ``shift_variance``:
    A·s + ½·A·(s² − v), or A·s − ½·A·v. The former is at ρ = 1; elsewhere it is the change divided by ρ."""
    second = shift.square() - variance if form == "ratio" else -variance
    return advantage * (shift + second / 2)


def predicted_divergence(variance: Tensor) -> Tensor:
    """KL between the policies before and after the step at each place, to second order, nats: ½·v."""
    return variance / 2


@dataclass(frozen=True)
class CAPO(MaskedPPO):
    """Leaves out tokens that the optimiser's step of the output layer would move too far (CAPO, arXiv:2510.00819): kept
    are those with ``least`` ≤ the predicted change of A·ρ ≤ ``most`` and a predicted KL ≤ ``kl``.

    The step is the one that the optimiser would make with all tokens: its gradient by the output layer is taken once
    more, first, and goes through a copy of the optimiser's state; all other weights count as fixed. The change is that
    near the sampling policy, ρ = 1: with several steps on the same answers it is the change divided by ρ. The paper's
    thresholds, which reject less than 8 % of the tokens, are not known here: these are ours.

    Args:
        low: as in ``ppo``.
        high: likewise.
        least: smallest predicted change; None for none.
        most: largest; None for none.
        kl: largest predicted KL, nats, ≥ 0; None for none.
        sets: what stays or goes as one: a "token", or an "answer" by the means over its own tokens.
        form: "ratio", or "log" for the change of A·ℓ.
    """

    least: float | None = -0.1
    most: float | None = None
    kl: float | None = 0.05
    sets: str = "token"
    form: str = "ratio"

    reads: ClassVar[frozenset[str]] = frozenset({"shift", "shift_variance"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("sets", self.sets, SETS)
        check_choice("form", self.form, FORMS)
        if self.kl is not None:
            check_range("kl", self.kl, 0.0)
        if self.most is not None:
            check_range("most", self.most, -math.inf if self.least is None else self.least)

    def keep(self, tokens: Tokens, advantage: Tensor) -> Tensor:
        shift, variance = (torch.where(tokens.own, field(tokens, name), 0.0) for name in ("shift", "shift_variance"))
        gain, apart = predicted_gain(advantage, shift, variance, self.form), predicted_divergence(variance)
        if self.sets == "answer":
            count = tokens.own.sum(-1, keepdim=True).clamp(min=1)
            gain, apart = (values.sum(-1, keepdim=True) / count for values in (gain, apart))
        rejected = torch.zeros_like(gain, dtype=torch.bool)  # what is not known (NaN) is not rejected
        rejected |= False if self.least is None else gain < self.least
        rejected |= False if self.most is None else gain > self.most
        rejected |= False if self.kl is None else apart > self.kl
        return ~rejected
