"""The slot ``ratio``: how much more likely a token is now than under the policy that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_choice, check_range
from offpolicy.losses.tokens import LARGEST_LOG_RATIO, Ratio, Tokens, column, difference

DENOMINATORS = ("previous", "behavior")


def log_ratio(tokens: Tokens, denominator: Tensor) -> Tensor:
    """ℓ − denominator on own tokens; ℓ − sg[ℓ], which is 0 and has a gradient, on those of demonstrations."""
    own = difference(tokens.logp, denominator, tokens.own)
    return own if tokens.external is None else torch.where(tokens.outside, tokens.logp - tokens.logp.detach(), own)


def denominator_of(tokens: Tokens, name: str) -> Tensor:
    """ℓ_k for "previous", ℓ_b for "behavior"."""
    return tokens.previous_logp if name == "previous" else tokens.behavior_logp


def numbered(values: Tensor) -> Tensor:
    """The place of each whole number (B, T) among the different ones of its row, from 0, (B, T)."""
    ordered, order = values.sort(dim=1, stable=True)
    later = torch.nn.functional.pad((ordered[:, 1:] != ordered[:, :-1]).long(), (1, 0))
    return torch.zeros_like(order).scatter(1, order, later.cumsum(1))


def one_with_slope(tokens: Tokens, where: Tensor) -> Tensor:
    """exp(ℓ − sg[ℓ]): 1, with the gradient of ℓ where that is asked for."""
    return torch.where(where, tokens.logp - tokens.logp.detach(), 0.0).exp()


def _with_demonstrations(tokens: Tokens, value: Tensor) -> Tensor:
    """The ratio of own tokens, and exp(ℓ − sg[ℓ]) on demonstrations."""
    if tokens.external is None:
        return value
    return torch.where(tokens.outside, one_with_slope(tokens, tokens.outside), value)


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
        check_choice("denominator", self.denominator, DENOMINATORS)

    def __call__(self, tokens: Tokens) -> Ratio:
        own = tokens.own
        per_token = torch.where(own, tokens.logp - denominator_of(tokens, self.denominator), 0.0)
        mean = per_token.sum(-1, keepdim=True) / own.sum(-1, keepdim=True).clamp(min=1)
        value = mean.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
        value = value.detach() * one_with_slope(tokens, own) if self.per_token else value.expand_as(own)
        return Ratio(_with_demonstrations(tokens, value))


@dataclass(frozen=True)
class GSPOTokenRatio(SequenceRatio):
    """The value of ``sequence`` with the gradient of each token's own ℓ: sg[ρ]·exp(ℓ − sg[ℓ]) (GSPO-token,
    arXiv:2507.18071, section 4.3), so that tokens of an answer may have advantages of their own.

    Args:
        per_token: False is ``sequence``.
        denominator: as of ``sequence``.
    """

    per_token: bool = True


@dataclass(frozen=True)
class FullSequenceRatio:
    """exp of the sum over an answer's tokens of ℓ − ℓ_k, the same for all of them: the exact importance weight of the
    answer, whose variance grows with its length. Each row must count once, as with ``seq_mean_token_mean``.

    Args:
        denominator: "previous", ℓ_k, or "behavior", ℓ_b.
    """

    denominator: str = "previous"

    counts_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("denominator", self.denominator, DENOMINATORS)

    def __call__(self, tokens: Tokens) -> Ratio:
        own = tokens.own
        total = torch.where(own, tokens.logp - denominator_of(tokens, self.denominator), 0.0).sum(-1, keepdim=True)
        value = total.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp().expand_as(own)
        return Ratio(_with_demonstrations(tokens, value))


@dataclass(frozen=True)
class TurnRatio:
    """exp of the mean over the tokens of a turn of ℓ − ℓ_k, the same for all tokens of the turn (ST-PPO,
    arXiv:2511.20718).

    The column ``turn`` has the number of the turn of each token; tokens with equal numbers belong together, wherever
    they stand in the answer. Checked against the abstract; the paper's correction of the gradient by the clipping term
    is left out, as its exact form is not known.

    Args:
        denominator: "previous", ℓ_k, or "behavior", ℓ_b.
    """

    denominator: str = "previous"

    columns: ClassVar[frozenset[str]] = frozenset({"turn"})

    def __post_init__(self) -> None:
        check_choice("denominator", self.denominator, DENOMINATORS)

    def __call__(self, tokens: Tokens) -> Ratio:
        own, turn = tokens.own, numbered(column(tokens, "turn"))
        per_token = torch.where(own, tokens.logp - denominator_of(tokens, self.denominator), 0.0)
        sums = torch.zeros_like(per_token).scatter_add(1, turn, per_token)
        counts = torch.zeros_like(tokens.mask).scatter_add(1, turn, own.to(tokens.mask.dtype))
        mean = (sums / counts.clamp(min=1)).gather(1, turn)
        return Ratio(_with_demonstrations(tokens, mean.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()))


@dataclass(frozen=True)
class LuffyRatio:
    """p/(p + γ) with p = π_θ on demonstrations: unlikely tokens keep a gradient (LUFFY, arXiv:2504.14945).

    The demonstrator's probability counts as 1, as in the authors' code, so this is the paper's f(π_θ/π_φ) with π_φ = 1.

    Args:
        gamma: γ > 0.
        own: component for own tokens: "token", "mix" or "decoupled".
    """

    gamma: float = 0.1
    own: str = "token"

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0.0, lower_open=True)
        check_choice("own", self.own, OWN_RATIOS)

    def __call__(self, tokens: Tokens) -> Ratio:
        own, outside = OWN_RATIOS[self.own]()(tokens), tokens.outside
        p = torch.where(outside, tokens.logp, 0.0).exp()
        return own._replace(value=torch.where(outside, p / (p + self.gamma), own.value))


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
        check_choice("uniform", self.uniform, ("vocab", "one"))
        check_choice("demonstrator", self.demonstrator, ("unknown", "known", "ratio"))
        check_choice("own", self.own, OWN_RATIOS)
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
