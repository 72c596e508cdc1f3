"""The slot ``trust``: bounds of the ratio that the step itself decides, and a weight that goes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_choice, check_range
from offpolicy.losses.policy.masks import fact
from offpolicy.losses.policy.ratios import DENOMINATORS, denominator_of
from offpolicy.losses.policy.selection import nearest_quantile
from offpolicy.losses.policy.trust import PPO, clipped_surrogate
from offpolicy.losses.tokens import Ratio, Surrogate, Tokens, difference, field, per_token

PUBLISHED_BOUNDS: dict[str, dict[str, Any]] = {  # (first, last, step) of the bounds of the ratio
    "paper": {"low": (0.6, 0.9, 0.02), "high": (1.2, 3.0, 0.05), "target": 0.4, "counted": "unclipped", "dual": None},
    "code": {"low": (0.8, 0.95, 0.05), "high": (1.2, 2.0, 0.05), "target": 0.5, "counted": "all", "dual": 3.0},
}


@dataclass(frozen=True)
class BAPO:
    """min(ρA, clip(ρ, lo, hi)·A) with bounds that rise until answers with A > 0 are enough of the step (BAPO,
    arXiv:2510.18927).

    The paper begins with lo = .6 and hi = 1.2. While the share Σ_{A>0} π_b|S| / Σ π_b|S| is below ρ₀ it raises hi, and
    once that is at its end, lo; S is the clipped term. Counted so, a higher lo makes the share smaller, as clipped
    tokens with A < 0 grow in value though they have lost their gradient. By default only tokens that have one count;
    "all" is the paper to the letter. The authors' code (``order="code"``) raises lo first, compares
    Σ_{A>0}|S| / Σ_{A<0}|S| with its target, has other ends, and bounds S below by 3A where A < 0.

    The share is that of own tokens of the whole step, by their ratio to the policy that drew them, whatever the ratio
    of the objective. With no bounds that reach the target the last ones stand.

    Args:
        order: "paper" or "code"; what is None below has the published value of that.
        low: (first, last, step) of lo; first ≤ last.
        high: (first, last, step) of hi; likewise.
        target: ρ₀, in [0, 1]; with "code" of the quotient, ≥ 0.
        counted: "unclipped" or "all" tokens.
        dual: S is at least ``dual``·A where A < 0, > 1; 0 for no such bound.
    """

    order: str = "paper"
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    target: float | None = None
    counted: str | None = None
    dual: float | None = None

    def __post_init__(self) -> None:
        check_choice("order", self.order, PUBLISHED_BOUNDS)
        for name, value in PUBLISHED_BOUNDS[self.order].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("low", "high"):
            given = getattr(self, name)
            if len(given) != 3 or not 0 <= given[0] <= given[1] or given[2] <= 0:
                raise UsageError(f"`{name}` is {given!r}; expected [first, last, step], 0 ≤ first ≤ last, step > 0.")
        check_range("target", self.target or 0.0, 0.0)
        check_choice("counted", str(self.counted), ("unclipped", "all"))
        if self.dual:
            check_range("dual", self.dual, 1.0, lower_open=True)

    def bounds(self) -> Iterator[tuple[float, float]]:
        """The bounds in the order in which they are tried."""
        assert self.low is not None and self.high is not None
        lows, highs = (
            [round(first + i * step, 9) for i in range(int((last - first) / step + 1e-9) + 1)]
            for first, last, step in (self.low, self.high)
        )
        if self.order == "paper":
            yield from ((lows[0], high) for high in highs)
            yield from ((low, highs[-1]) for low in lows[1:])
        else:
            yield from ((low, highs[0]) for low in lows)
            yield from ((lows[-1], high) for high in highs[1:])

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        own, advantage = step.own, per_token(step.advantage)
        ratio = difference(step.logp, step.behavior_logp, own).exp()
        weight = torch.where(own, step.behavior_logp, 0.0).exp() if self.order == "paper" else torch.ones_like(ratio)
        low, high = ratio.new_zeros(()), ratio.new_zeros(())
        found = torch.zeros_like(low, dtype=torch.bool)
        for low_, high_ in self.bounds():
            low, high = (torch.where(found, before, now) for before, now in ((low, low_), (high, high_)))
            value, clipped = self._clipped(ratio, advantage, low, high)
            counted = own if self.counted == "all" else own & ~clipped
            size = torch.where(counted, weight * value.abs(), 0.0)
            gained, lost = (torch.where(side, size, 0.0).sum() for side in (advantage > 0, advantage < 0))
            rest = lost if self.order == "code" else gained + lost
            found = found | (gained >= float(self.target or 0.0) * rest)
        return {"low": low, "high": high}

    def _clipped(self, ratio: Tensor, advantage: Tensor, low: Tensor, high: Tensor) -> Surrogate:
        value, clipped = clipped_surrogate(ratio, advantage, low, high)
        if self.dual:
            below = (advantage < 0) & (value < self.dual * advantage)
            value, clipped = torch.where(below, self.dual * advantage, value), clipped | below
        return Surrogate(value, clipped)

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        return self._clipped(ratio.value, advantage, fact(tokens, "low"), fact(tokens, "high"))


def normalised_entropy(step: Tokens, pivot: float, signed: bool) -> Tensor:
    """How far the entropy of own tokens is from the pivot of the step, in [−1, 1], (B, T); 0 elsewhere.

    log H less its ``pivot``-quantile, divided by the largest above it and by the size of the smallest below it.

    Args:
        step: with ``entropy``.
        pivot: in [0, 1].
        signed: False makes what is below the pivot positive too.
    """
    own = step.own
    logarithm = field(step, "entropy").detach().clamp(min=1e-6).log()
    above = torch.where(own, logarithm - nearest_quantile(logarithm, own, pivot), 0.0)
    tiny = torch.finfo(above.dtype).tiny
    scaled = torch.where(above > 0, above / above.max().clamp(min=tiny), above / -above.min().clamp(max=-tiny))
    return scaled if signed else scaled.abs()


class Pivoted:
    """What the parts of HAPO have in common: the normalised entropy of the step."""

    pivot: float
    signed: bool
    reads_values: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        return {"entropy": normalised_entropy(step, self.pivot, self.signed)}


@dataclass(frozen=True)
class EntropyAdaptivePPO(Pivoted, PPO):
    """``ppo`` with bounds by the entropy of the token: (1 − low·(1 − αĥ)) where ĥ ≤ 0, so that what is certain may lose
    probability faster, and 1 + high·(1 + αĥ) where ĥ > 0, so that what is open may gain (HAPO, arXiv:2509.16591).

    ĥ ∈ [−1, 1] is log H less its quantile at the pivot over the step, divided by the largest size on its side. In the
    authors' code a sign is lost, by which ĥ ≥ 0 everywhere and no lower bound ever moves (``signed=False``).

    Args:
        low: as in ``ppo``.
        high: likewise.
        alpha: α, in [0, 1].
        pivot: quantile, in [0, 1].
        signed: False for the code's ĥ.
    """

    alpha: float = 1.0
    pivot: float = 0.8
    signed: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0.0, 1.0)
        check_range("pivot", self.pivot, 0.0, 1.0)

    def room(self, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """The room below and above 1, (B, T) each."""
        low = self.low * (1 - self.alpha * entropy.clamp(max=0.0))
        return low, self.above * (1 + self.alpha * entropy.clamp(min=0.0))

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        low, high = self.room(fact(tokens, "entropy"))
        return clipped_surrogate(ratio.value, advantage, (1 - low).clamp(min=0.0), 1 + high)


@dataclass(frozen=True)
class HAPOWeight(Pivoted):
    """1 + β·ĥ on tokens with ĥ > 0 whose ratio has left the middle half of its bounds, and on tokens with ĥ ≤ 0 whose
    ratio is inside; else 1 (HAPO's redistribution of advantages, arXiv:2509.16591).

    ĥ and the bounds are those of ``entropy_adaptive``; with other bounds there, give the same here.

    Args:
        beta: β, in [0, 1].
        low: as in ``entropy_adaptive``.
        high: likewise.
        alpha: likewise; 0 for fixed bounds.
        pivot: likewise.
        signed: likewise.
        denominator: the ratio's, "behavior" or "previous".
    """

    beta: float = 1.0
    low: float = 0.2
    high: float | None = None
    alpha: float = 1.0
    pivot: float = 0.8
    signed: bool = True
    denominator: str = "behavior"

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0.0, 1.0)
        check_choice("denominator", self.denominator, DENOMINATORS)
        EntropyAdaptivePPO(self.low, self.high, self.alpha, self.pivot)

    def __call__(self, tokens: Tokens) -> Tensor:
        entropy, own = fact(tokens, "entropy"), tokens.own
        ratio = difference(tokens.logp.detach(), denominator_of(tokens, self.denominator), own).exp()
        low, high = EntropyAdaptivePPO(self.low, self.high, self.alpha, self.pivot).room(entropy)
        inside = (ratio > 1 - low / 2) & (ratio < 1 + high / 2)
        moved = torch.where(entropy > 0, ~inside, inside)
        return torch.where(own & moved, 1 + self.beta * entropy, 1.0)
