"""The slot ``trust``: how far the ratio of a token may move the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import check_choice, check_range
from offpolicy.losses.tokens import Ratio, Surrogate, Tokens, difference, field


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


@dataclass(frozen=True)
class TwoSidedPPO(PPO):
    """min(min(ρ, δ)·A, clip(ρ, 1 − low, 1 + high)·A): ρ itself is bounded where A < 0 (INTELLECT-2, arXiv:2505.07291).

    Args:
        low: as in ``ppo``.
        high: likewise.
        delta: δ > 1 + high; 4 in INTELLECT-2.
    """

    delta: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("delta", self.delta, 1.0 + self.above, lower_open=True)

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        value, clipped = super().__call__(ratio._replace(value=ratio.value.clamp(max=self.delta)), advantage, tokens)
        return Surrogate(value, clipped | ((advantage < 0) & (ratio.value > self.delta)))


@dataclass(frozen=True)
class CISPO:
    """sg[min(ρ, max)]·A·ℓ: the importance weight is bounded, and every token keeps its gradient (MiniMax-M1,
    arXiv:2506.13585).

    The paper gives no number for ``max``; 5 is what others use with it.

    Args:
        max: largest weight, > 0.
        min: smallest weight, ≥ 0; the paper's runs have no lower bound.
    """

    max: float = 5.0
    min: float = 0.0

    def __post_init__(self) -> None:
        check_range("max", self.max, 0.0, lower_open=True)
        check_range("min", self.min, 0.0, self.max)

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        weight = ratio.value.detach().clamp(self.min, self.max)
        logp = torch.where(tokens.kept, tokens.logp, 0.0)
        return Surrogate(weight * advantage * logp, torch.zeros_like(logp, dtype=torch.bool))


@dataclass(frozen=True)
class GradientPreservingPPO(PPO):
    """The value of ``ppo``; where it is flat because ρ > 1 + high and A > 0, the gradient is that of (1 + high)·A·ℓ:
    the bound is (1 + high)·ρ/sg[ρ] (AEPO for agents, arXiv:2510.14545, for tokens of high entropy).

    Which tokens AEPO means by high entropy is not known here, so all of them keep it.

    Args:
        low: as in ``ppo``.
        high: likewise.
        below: the same for ρ < 1 − low and A < 0, as in GPPO (arXiv:2508.07629).
    """

    below: bool = False

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        value, clipped = super().__call__(ratio, advantage, tokens)
        kept = clipped if self.below else clipped & (advantage > 0)
        sloped = value.detach() * (ratio.value / ratio.value.detach())
        return Surrogate(torch.where(kept, sloped, value), clipped & ~kept)


@dataclass(frozen=True)
class Rover:
    """−(Q − target)², the square of a Bellman error (ROVER, arXiv:2509.24981); Q_t = ρ·(ℓ − ℓ_k).

    target = A + ρ·(mean over the vocabulary of log π_θ − log π_k at the next place), without gradient; 0 for the next
    place of the last token. A should be the reward without the mean of its group (``dr_grpo``; the code gives answers
    without a group their reward) and the aggregation ``token_mean``. There is no ratio, no clipping and no divergence.
    The branch of the code for mathematics multiplies the next place by a further number, left out here.

    Args:
        rho: ρ > 0, the temperature.
    """

    rho: float = 1.0

    reads: ClassVar[frozenset[str]] = frozenset({"mean_log_ratio"})

    def __post_init__(self) -> None:
        check_range("rho", self.rho, 0.0, lower_open=True)

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        q = self.rho * difference(tokens.logp, tokens.previous_logp, tokens.kept)
        mean = torch.where(tokens.kept, field(tokens, "mean_log_ratio"), 0.0)
        target = advantage + self.rho * torch.nn.functional.pad(mean[:, 1:], (0, 1))
        return Surrogate(-(q - target.detach()).square(), torch.zeros_like(tokens.kept))
