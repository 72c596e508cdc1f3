"""The parts that a policy-gradient objective is composed of: one small class per component, parameters checked once.

Let ℓ = log π_θ, ℓ_k that of the policy at the start of the iteration, ℓ_b that of the policy that sampled the token.
Log-ratios are clamped to ±20. Tensors are (B, T), as in :class:`Tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_range
from offpolicy.losses.tokens import Ratio, Surrogate, Tokens, Totals

LARGEST_LOG_RATIO = 20.0


def choose(name: str, value: str, known: Iterable[str]) -> None:
    """Raise :class:`UsageError` unless the value is one of those known."""
    if value not in known:
        raise UsageError(f"`{name}` is '{value}'; expected one of {', '.join(known)}. Change it or leave it out.")


def difference(first: Tensor, second: Tensor, kept: Tensor) -> Tensor:
    """first − second on the kept tokens, clamped; 0 elsewhere, whatever stands there."""
    return torch.where(kept, first - second, 0.0).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def log_ratio(tokens: Tokens, denominator: Tensor) -> Tensor:
    """ℓ − denominator on own tokens; ℓ − sg[ℓ], which is 0 and has a gradient, on those of demonstrations."""
    own = difference(tokens.logp, denominator, tokens.own)
    return own if tokens.external is None else torch.where(tokens.outside, tokens.logp - tokens.logp.detach(), own)


def field(tokens: Tokens, name: str) -> Tensor:
    """An optional field of the tokens that a component reads.

    Raises:
        UsageError: it was not given.
    """
    found = getattr(tokens, name)
    if found is None:
        raise UsageError(f"the objective reads `{name}`, which this batch does not have; expected (B, T) numbers.")
    return found


def per_token(advantage: Tensor) -> Tensor:
    """(B, 1) of (B,); (B, T) as it is."""
    return advantage[:, None] if advantage.ndim == 1 else advantage


# -- ratio -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenRatio:
    """exp(ℓ − ℓ_b) per token."""

    def __call__(self, tokens: Tokens) -> Ratio:
        return Ratio(log_ratio(tokens, tokens.behavior_logp).exp())


@dataclass(frozen=True)
class MixRatio:
    """exp(ℓ − ℓ_b), to be clipped around exp(ℓ_k − ℓ_b): that of each token's own sampler, no mixture (ReMix)."""

    def __call__(self, tokens: Tokens) -> Ratio:
        center = difference(tokens.previous_logp, tokens.behavior_logp, tokens.own).exp()
        return Ratio(log_ratio(tokens, tokens.behavior_logp).exp(), center)


@dataclass(frozen=True)
class DecoupledRatio:
    """exp(ℓ − ℓ_k), which is clipped, times a constant exp(ℓ_k − ℓ_b), which is not (arXiv:2110.00641).

    Args:
        cap: largest value of the constant, > 0; None for none.
    """

    cap: float | None = None

    def __post_init__(self) -> None:
        if self.cap is not None:
            check_range("cap", self.cap, 0.0, lower_open=True)

    def __call__(self, tokens: Tokens) -> Ratio:
        factor = difference(tokens.previous_logp, tokens.behavior_logp, tokens.own).exp()
        factor = factor if self.cap is None else factor.clamp(max=self.cap)
        return Ratio(log_ratio(tokens, tokens.previous_logp).exp(), factor=factor)


@dataclass(frozen=True)
class SequenceRatio:
    """exp of the mean over an answer's tokens of ℓ − ℓ_k, the same for all of them (GSPO, arXiv:2507.18071).

    Clip it at about 3e-4 and 4e-4; each row must count once, as with ``seq_mean_token_mean``.

    Args:
        per_token: the same value, with the gradient of each token's own ℓ (GSPO-token).
        denominator: "previous", ℓ_k, or "behavior", ℓ_b.
    """

    per_token: bool = False
    denominator: str = "previous"

    counts_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choose("denominator", self.denominator, ("previous", "behavior"))

    def __call__(self, tokens: Tokens) -> Ratio:
        own = tokens.own
        denominator = tokens.previous_logp if self.denominator == "previous" else tokens.behavior_logp
        per_token = torch.where(own, tokens.logp - denominator, 0.0)
        mean = per_token.sum(-1, keepdim=True) / own.sum(-1, keepdim=True).clamp(min=1)
        value = mean.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
        one = (tokens.logp - tokens.logp.detach()).exp()
        value = value.detach() * one if self.per_token else value.expand_as(own)
        return Ratio(value if tokens.external is None else torch.where(tokens.outside, one, value))


@dataclass(frozen=True)
class MISRatio:
    """2π_θ/(π_k + π_ω) on demonstrations: multiple importance sampling (RL-PLUS, arXiv:2508.00222, Eq. 4).

    A demonstration counts as drawn from π_k or from its unknown author π_ω, each with probability ½, where π_ω is taken
    to be ½π_k + ½U. So the denominator is 1.5π_k + 0.5U, a constant.

    Args:
        uniform: U: "vocab" is 1/V, as in the paper; "one" is 1, as in the authors' code, which all but ignores tokens
            that π_k finds unlikely.
        vocabulary: V, ≥ 1; needed for "vocab".
        demonstrator: "unknown"; "known", π_ω is exp(``behavior_logp``) where that is not NaN; or "ratio", the same as
            π_θ/(π_ω + 1e-6), as in the authors' code.
        low: smallest ratio on demonstrations, ≥ 0; None for no bound.
        high: largest ratio on demonstrations, > 0 and ≥ ``low``; None for no bound.
        own: component for own tokens: "token", "mix" or "decoupled".
    """

    uniform: str = "vocab"
    vocabulary: int | None = None
    demonstrator: str = "unknown"
    low: float | None = None
    high: float | None = None
    own: str = "token"

    def __post_init__(self) -> None:
        choose("uniform", self.uniform, ("vocab", "one"))
        choose("demonstrator", self.demonstrator, ("unknown", "known", "ratio"))
        choose("own", self.own, OWN_RATIOS)
        low = 0.0 if self.low is None else self.low
        check_range("low", low, 0.0)
        if self.high is not None:
            check_range("high", self.high, low, lower_open=low == 0.0)
        if self.uniform == "vocab":
            if self.vocabulary is None:
                raise UsageError("`uniform` is 'vocab' and no `vocabulary` was given; expected the model's size.")
            check_range("vocabulary", self.vocabulary, 1)

    def __call__(self, tokens: Tokens) -> Ratio:
        own = OWN_RATIOS[self.own]()(tokens)
        if tokens.external is None:
            return own
        outside = tokens.outside
        uniform = 1.0 / self.vocabulary if self.uniform == "vocab" and self.vocabulary else 1.0
        old = torch.where(outside, tokens.previous_logp, 0.0).exp()
        author = 0.5 * old + 0.5 * uniform
        denominator = 0.5 * (old + author)
        if self.demonstrator != "unknown":
            known = torch.where(outside, tokens.behavior_logp, torch.nan).exp()
            exact = 0.5 * (old + known) if self.demonstrator == "known" else known + 1e-6
            denominator = torch.where(known.isnan(), denominator, exact)
        ratio = difference(tokens.logp, denominator.log(), outside).exp()
        if self.low is not None or self.high is not None:
            ratio = ratio.clamp(self.low, self.high)
        return own._replace(value=torch.where(outside, ratio, own.value))


@dataclass(frozen=True)
class NoRatio:
    """1, with the gradient of ℓ: REINFORCE."""

    def __call__(self, tokens: Tokens) -> Ratio:
        return Ratio(log_ratio(tokens, tokens.logp.detach()).exp())


OWN_RATIOS: dict[str, Callable[[], Callable[[Tokens], Ratio]]] = {
    "token": TokenRatio,
    "mix": MixRatio,
    "decoupled": DecoupledRatio,
}


# -- trust region ------------------------------------------------------------------------------------------------------


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
        choose("center", self.center, ("additive", "multiplicative", "behavior"))

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


# -- aggregation -------------------------------------------------------------------------------------------------------
# From numbers per token L and their mask m the micro-batch's share, 0-d: shares of a step add up.


def token_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Σ_t L·m of each row, (B,)."""
    return torch.where(mask > 0, values * mask, 0.0).sum(-1)


@dataclass(frozen=True)
class SeqMeanTokenMean:
    """Mean over answers of the mean over their tokens: GRPO. An answer without tokens counts as 0."""

    def __call__(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        return (token_sums(values, mask) / mask.sum(-1).clamp(min=1.0)).sum() / totals.rows


@dataclass(frozen=True)
class TokenMean:
    """Mean over all tokens of the step: DAPO (arXiv:2503.14476)."""

    def __call__(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        return token_sums(values, mask).sum() / max(1, totals.tokens)


@dataclass(frozen=True)
class TokenMeanLocal:
    """Mean over the tokens of a micro-batch, micro-batches weighted by their answers. Depends on how a step is split.

    What others do by accident or default; for comparison only.
    """

    def __call__(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        share = (mask.sum(-1) > 0).sum() / totals.rows
        return token_sums(values, mask).sum() / mask.sum().clamp(min=1.0) * share


@dataclass(frozen=True)
class DrGRPOSum:
    """Σ L·m / (answers · longest answer that may be generated): no weight depends on length (arXiv:2503.20783)."""

    def __call__(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        return token_sums(values, mask).sum() / (totals.rows * totals.max_length)


@dataclass(frozen=True)
class SumOverT:
    """Σ L·m / T without the number of answers, as in the code of LUFFY and RL-PLUS; grows with the batch.

    Args:
        length: T: "max", as configured, or "padded", of the step's longest answer.
    """

    length: str = "max"

    def __post_init__(self) -> None:
        choose("length", self.length, ("max", "padded"))

    def __call__(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        return token_sums(values, mask).sum() / (totals.max_length if self.length == "max" else totals.padded_length)


@dataclass(frozen=True)
class SeqSum:
    """Mean over answers of the sum over their tokens."""

    def __call__(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        return token_sums(values, mask).sum() / totals.rows


# -- anchors -----------------------------------------------------------------------------------------------------------

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
        choose("target", self.target, TARGETS)

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
        choose("estimator", self.estimator, ESTIMATORS)
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


# -- entropy -----------------------------------------------------------------------------------------------------------


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


# -- weight ------------------------------------------------------------------------------------------------------------

ENGINE_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class EngineWeight:
    """exp(ℓ_b − ℓ_sampler): what the engine's arithmetic makes of the policy, put right. 1 where they agree.

    Args:
        mode: per token or per sequence (the product over its tokens); weights above the cap become the cap
            ("truncate") or 0 ("mask").
        cap: > 0.
    """

    mode: str = "sequence_mask"
    cap: float = 3.0

    def __post_init__(self) -> None:
        choose("mode", self.mode, ENGINE_MODES)
        check_range("cap", self.cap, 0.0, lower_open=True)

    def __call__(self, tokens: Tokens) -> Tensor:
        if tokens.sampler_logp is None:
            return torch.ones_like(tokens.mask)
        level, action = self.mode.split("_")
        log_weight = difference(tokens.behavior_logp, tokens.sampler_logp, tokens.own)
        if level == "sequence":
            whole = log_weight.sum(-1, keepdim=True).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
            log_weight = torch.where(tokens.own, whole, 0.0)
        weight = log_weight.exp()
        return weight.clamp(max=self.cap) if action == "truncate" else torch.where(weight > self.cap, 0.0, weight)


@dataclass(frozen=True)
class FocalWeight:
    """(1 − π_θ)^γ on demonstrations, with the current π_θ, without gradient; 1 on own tokens (RL-PLUS, section 3).

    Args:
        gamma: γ ≥ 0; 0 is no weight.
    """

    gamma: float = 0.5

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0.0)

    def __call__(self, tokens: Tokens) -> Tensor:
        rest = -torch.expm1(tokens.logp.detach().clamp(max=0.0))
        return torch.where(tokens.outside, rest**self.gamma, 1.0)


@dataclass(frozen=True)
class SourceWeight:
    """A constant for own tokens and one for demonstrations.

    Args:
        own: ≥ 0.
        external: ≥ 0.
    """

    own: float = 1.0
    external: float = 1.0

    def __post_init__(self) -> None:
        check_range("own", self.own, 0.0)
        check_range("external", self.external, 0.0)

    def __call__(self, tokens: Tokens) -> Tensor:
        return torch.where(tokens.outside, self.external, torch.full_like(tokens.mask, self.own))


# -- value -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SquaredValue:
    """coef · (V − R)², or the larger of that and of the same with V within ``clip`` of its old value.

    Args:
        coef: ≥ 0.
        clip: > 0; None for no clipping.
    """

    coef: float = 0.5
    clip: float | None = None

    def __post_init__(self) -> None:
        check_range("coef", self.coef, 0.0)
        if self.clip is not None:
            check_range("clip", self.clip, 0.0, lower_open=True)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(("value", "returns") if self.clip is None else ("value", "returns", "old_value"))

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        kept = tokens.own
        value, returns = field(tokens, "value"), field(tokens, "returns")
        error = torch.where(kept, value - returns, 0.0).square()
        if self.clip is not None:
            old = field(tokens, "old_value")
            near = old + (value - old).clamp(-self.clip, self.clip)
            error = torch.maximum(error, torch.where(kept, near - returns, 0.0).square())
        return self.coef * error
