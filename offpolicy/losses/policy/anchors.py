"""The slots ``anchors``, ``entropy`` and ``value``: terms of the loss beside the policy's own.

Each gives a number per token, its coefficient included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_choice, check_range
from offpolicy.losses.tokens import Tokens, column, difference, field

ESTIMATORS = ("k1", "k2", "k3", "full")
Coefficient = float | Sequence[Sequence[float]]  # a number, or knots (iteration, number), linear between them
TARGETS = ("base", "previous")


def coefficient(knots: Coefficient, iteration: int) -> float:
    """The value of a coefficient at an iteration."""
    if isinstance(knots, (int, float)):
        return float(knots)
    (before, value), *later = knots
    for at, number in later:
        if iteration < at:
            return value + (number - value) * max(0.0, (iteration - before) / (at - before))
        before, value = at, number
    return value


def check_coefficient(name: str, knots: Coefficient) -> None:
    """Raise :class:`UsageError` unless it is a number ≥ 0, or rising iterations with numbers ≥ 0."""
    if isinstance(knots, (int, float)):
        check_range(name, knots, 0.0)
        return
    pairs = [list(pair) for pair in knots] if isinstance(knots, Sequence) and not isinstance(knots, str) else []
    if not pairs or any(len(pair) != 2 for pair in pairs) or any(a[0] >= b[0] for a, b in pairwise(pairs)):
        raise UsageError(
            f"`{name}` is {knots!r}; expected a number or a list of [iteration, number] with rising iterations."
        )
    for _, number in pairs:
        check_range(name, number, 0.0)


def divergence(tokens: Tokens, estimator: str, target: str, correction: bool) -> Tensor:
    """KL(π_θ ‖ target) per token, by an estimator on the sampled token or exactly, over the vocabulary."""
    kept = tokens.kept
    if estimator == "full":
        return torch.where(kept, field(tokens, f"{target}_kl"), 0.0)
    delta = difference(field(tokens, f"{target}_logp"), tokens.logp, kept)
    value = {"k1": lambda: -delta, "k2": lambda: 0.5 * delta.square(), "k3": lambda: torch.expm1(delta) - delta}
    found = value[estimator]()
    if correction:
        found = found * difference(tokens.logp.detach(), tokens.behavior_logp, tokens.own).exp()
    return found


def divergence_reads(estimator: str, target: str) -> frozenset[str]:
    return frozenset((f"{target}_kl" if estimator == "full" else f"{target}_logp",))


@dataclass(frozen=True)
class KL:
    """coef · KL(π_θ ‖ target) in the loss, estimated from the sampled token; δ = ℓ_target − ℓ.

    Args:
        coef: β ≥ 0, or knots [[iteration, β], …], linear between them and constant outside.
        target: "base", or "previous" for π_k.
        correction: multiply by the detached π_θ/π_b, for stale tokens.
    """

    coef: Coefficient
    target: str = "base"
    correction: bool = False

    estimator: ClassVar[str] = "k3"

    def __post_init__(self) -> None:
        check_coefficient("coef", self.coef)
        check_choice("target", self.target, TARGETS)

    @property
    def reads(self) -> frozenset[str]:
        return divergence_reads(self.estimator, self.target)

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        beta = coefficient(self.coef, iteration)
        return beta * divergence(tokens, self.estimator, self.target, self.correction)


class K1(KL):
    """−δ: unbiased in value; its expected gradient on own samples is 0, so it serves in rewards, not in a loss."""

    estimator = "k1"


class K2(KL):
    """½δ²: its expected gradient on own samples is that of the reverse KL."""

    estimator = "k2"


class K3(KL):
    """e^δ − δ − 1: unbiased and ≥ 0; its expected gradient on own samples is that of the forward KL(target ‖ π_θ)."""

    estimator = "k3"


@dataclass(frozen=True)
class TurnKL(K3):
    """The estimator e^δ − 1 − δ on the tokens of one turn of a conversation, 0 on others (SCoRe, arXiv:2409.12917).

    It ends with the first stage of SCoRe: where the column ``stage`` of a token is above 0, it is 0.

    Args:
        coef, target, correction: as of ``k3``.
        turn: whose tokens, from 0.
    """

    turn: int = 0
    columns: ClassVar[frozenset[str]] = frozenset({"turn", "stage"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("turn", self.turn, 0)

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        held = (column(tokens, "turn") == self.turn) & (column(tokens, "stage") <= 0)
        return super().__call__(tokens, iteration=iteration) * held


class FullKL(KL):
    """Σ_v π_θ(v)·(log π_θ(v) − log target(v)), exact in value and gradient; costs a forward pass of the target, and
    the whole vocabulary at every place."""

    estimator = "full"


@dataclass(frozen=True)
class ConvexKL:
    """coef · [λ·KL(π_θ ‖ base) + (1 − λ)·KL(π_θ ‖ π_k)], KL-Convex of ReMix (arXiv:2507.06892).

    λ(t) = max(1 − drop·⌈max(t − start, 0)/every⌉, floor), at iteration t.

    Args:
        coef: β, as in ``k3``.
        estimator: "k1", "k2", "k3" or "full".
        start: the last iteration with λ = 1, ≥ 0.
        every: iterations between drops, ≥ 1.
        drop: in [0, 1].
        floor: in [0, 1].
        correction: as in ``k3``.
    """

    coef: Coefficient
    estimator: str = "k3"
    start: int = 50
    every: int = 10
    drop: float = 0.1
    floor: float = 0.5
    correction: bool = False

    def __post_init__(self) -> None:
        check_coefficient("coef", self.coef)
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_range("start", self.start, 0)
        check_range("every", self.every, 1)
        check_range("drop", self.drop, 0.0, 1.0)
        check_range("floor", self.floor, 0.0, 1.0)

    @property
    def reads(self) -> frozenset[str]:
        return divergence_reads(self.estimator, "base") | divergence_reads(self.estimator, "previous")

    def share(self, iteration: int) -> float:
        """λ."""
        return max(1.0 - self.drop * math.ceil(max(iteration - self.start, 0) / self.every), self.floor)

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        share = self.share(iteration)
        base, previous = (divergence(tokens, self.estimator, target, self.correction) for target in TARGETS)
        return coefficient(self.coef, iteration) * (share * base + (1.0 - share) * previous)


@dataclass(frozen=True)
class EntropyBonus:
    """−coef · H in the loss: rewards a policy that stays undecided.

    Args:
        coef: ≥ 0, or knots as in ``k3``.
    """

    coef: Coefficient

    def __post_init__(self) -> None:
        check_coefficient("coef", self.coef)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(() if self.coef == 0 else ("entropy",))

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        if self.coef == 0:
            return torch.zeros_like(tokens.logp)
        return -coefficient(self.coef, iteration) * torch.where(tokens.kept, field(tokens, "entropy"), 0.0)


@dataclass(frozen=True)
class SquaredValue:
    """coef · (V − R)², or the larger of that and of the same with V within ``clip`` of its old value.

    Args:
        coef: ≥ 0.
        clip: > 0; None for no clipping.
        finished: leave out answers that were cut, whose end nobody has seen (T-PPO, arXiv:2506.15050); they count in
            the mean, as 0.
    """

    coef: float = 0.5
    clip: float | None = None
    finished: bool = False

    def __post_init__(self) -> None:
        check_range("coef", self.coef, 0.0)
        if self.clip is not None:
            check_range("clip", self.clip, 0.0, lower_open=True)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(("value", "returns") if self.clip is None else ("value", "returns", "old_value"))

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"ended"} if self.finished else ())

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        kept = tokens.own & (column(tokens, "ended") > 0)[:, None] if self.finished else tokens.own
        value, returns = field(tokens, "value"), field(tokens, "returns")
        error = torch.where(kept, value - returns, 0.0).square()
        if self.clip is not None:
            old = field(tokens, "old_value")
            near = old + (value - old).clamp(-self.clip, self.clip)
            error = torch.maximum(error, torch.where(kept, near - returns, 0.0).square())
        return self.coef * error
