"""The slot ``trust``: how far the ratio of a token may move the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offpolicy.errors import check_choice, check_range
from offpolicy.losses.tokens import Ratio, Surrogate, Tokens


def clipped_surrogate(ratio: Tensor, advantage: Tensor, low: Tensor, high: Tensor) -> Surrogate:
    """min(ρA, clip(ρ, low, high)·A), and where it is flat: ρ > high with A > 0, ρ < low with A < 0."""
    value = torch.minimum(ratio * advantage, torch.clamp(ratio, low, high) * advantage)
    flat = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    return Surrogate(value, flat)


@dataclass(frozen=True)
class PPO:
    """min(ρA, clip(ρ, 1 − low, 1 + high)·A) (arXiv:1707.06347, Eq. 7).

    Args:
        low: room below 1, in [0, 1].
        high: room above 1, ≥ 0; None for ``low``.
    """

    low: float = 0.2
    high: float | None = None

    def __post_init__(self) -> None:
        check_range("low", self.low, 0.0, 1.0)
        check_range("high", self.above, 0.0)

    @property
    def above(self) -> float:
        return self.low if self.high is None else self.high

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        one = torch.ones_like(ratio.value)
        return clipped_surrogate(ratio.value, advantage, one - self.low, one + self.above)


@dataclass(frozen=True)
class DualPPO(PPO):
    """As PPO, and never below c·A where A < 0 (arXiv:1912.09729).

    Args:
        low: as in ``ppo``.
        high: likewise.
        c: > 1; 3 and 10 are usual.
    """

    c: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("c", self.c, 1.0, lower_open=True)

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        value, clipped = super().__call__(ratio, advantage, tokens)
        negative = advantage < 0
        value = torch.where(negative, torch.maximum(value, self.c * advantage), value)
        return Surrogate(value, clipped | (negative & (ratio.value > self.c)))


@dataclass(frozen=True)
class Centred:
    """min(ρA, clip(ρ, c − low, c + high)·A) with the ratio's center c = π_k/π_b (ReMix, arXiv:2507.06892).

    The interval moves, it does not scale: it bounds the distance to the current policy under old data, and where
    θ = θ_k no token is clipped, whatever its lag. With c = 1 it is ``ppo`` to the last bit.

    Args:
        low: room below c, ≥ 0; the bound is never negative.
        high: room above c, ≥ 0; None for ``low``.
        scale: factor on both, > 0.
        center: "additive", as above; "multiplicative", the interval c·(1 − low) to c·(1 + high); or "behavior", c = 1,
            which clips stale tokens before any update.
    """

    low: float = 0.2
    high: float | None = None
    scale: float = 1.0
    center: str = "additive"

    def __post_init__(self) -> None:
        check_range("low", self.low, 0.0)
        check_range("high", self.low if self.high is None else self.high, 0.0)
        check_range("scale", self.scale, 0.0, lower_open=True)
        check_choice("center", self.center, ("additive", "multiplicative", "behavior"))

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        low = self.scale * self.low
        high = low if self.high is None else self.scale * self.high
        one = torch.ones_like(ratio.value)
        center = one if ratio.center is None or self.center == "behavior" else ratio.center
        if self.center == "multiplicative":
            return clipped_surrogate(ratio.value, advantage, (center * (1.0 - low)).clamp(min=0.0), center * (1 + high))
        return clipped_surrogate(ratio.value, advantage, (center - low).clamp(min=0.0), center + high)


@dataclass(frozen=True)
class NoTrust:
    """ρA."""

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        return Surrogate(ratio.value * advantage, torch.zeros_like(ratio.value, dtype=torch.bool))
