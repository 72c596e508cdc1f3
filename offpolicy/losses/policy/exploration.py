"""The slot ``entropy``: terms that hold the entropy of the policy somewhere; some remember where it was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import check_choice, check_range
from offpolicy.losses.policy.anchors import Coefficient, check_coefficient, coefficient
from offpolicy.losses.policy.masks import fact
from offpolicy.losses.policy.selection import Remembers, largest, mean_over, quantile
from offpolicy.losses.tokens import Tokens, column, field


def own_entropy(tokens: Tokens, name: str = "entropy") -> Tensor:
    """The entropy of own tokens, (B, T); 0 elsewhere."""
    return torch.where(tokens.own, field(tokens, name), 0.0)


@dataclass(frozen=True)
class TargetEntropy(Remembers):
    """−c·H with a coefficient that keeps the mean entropy of a step near a target (Skywork-OR1, arXiv:2505.22312).

    After a step whose entropy is below the target c rises by ``step``, after one above it falls by that; c acts only
    where the entropy of the step is not above the target. ``rule="dual"`` changes c by ``step``·(target − H). That c
    stays ≥ 0 is ours.

    Args:
        target: nats, ≥ 0.
        step: > 0.
        start: c of the first step, ≥ 0.
        rule: "constant" or "dual".
    """

    target: float = 0.2
    step: float = 0.005
    start: float = 0.0
    rule: str = "constant"

    reads: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        check_range("target", self.target, 0.0)
        check_range("step", self.step, 0.0, lower_open=True)
        check_range("start", self.start, 0.0)
        check_choice("rule", self.rule, ("constant", "dual"))

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        entropy = mean_over(own_entropy(step), step.own)
        coef = self.memory.get("coef", torch.full_like(entropy, self.start)).to(entropy)
        short = self.target - entropy
        change = self.step * (short.sign() if self.rule == "constant" else short)
        self.memory["coef"] = (coef + change).clamp(min=0.0)
        return {"coef": torch.where(short >= 0, coef, 0.0)}

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        return -fact(tokens, "coef") * own_entropy(tokens)


@dataclass(frozen=True)
class Siren(Remembers):
    """coef·(Ĥ − H₀)², where Ĥ is the mean over the tokens of the step with the highest entropy of the entropy of their
    likeliest tokens, and H₀ is Ĥ of the first step (SIREN, arXiv:2509.25133).

    The values per token are such that their mean over all tokens, the aggregation "token_mean", is that number and
    has its gradient; give it that aggregation. The tokens are those whose entropy is at or above its quantile; that the
    quantile is of the whole vocabulary's entropy is not verified. Defaults are those of the authors' script.

    Args:
        coef: ≥ 0, or knots as in ``k3``.
        quantile: in [0, 1).
        nucleus: share of the probability that the likeliest tokens have, in (0, 1].
    """

    coef: Coefficient = 0.005
    quantile: float = 0.8
    nucleus: float = 0.8

    reads: ClassVar[frozenset[str]] = frozenset({"nucleus_entropy"})
    reads_values: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        check_coefficient("coef", self.coef)
        check_range("quantile", self.quantile, 0.0, 1.0, upper_open=True)
        check_range("nucleus", self.nucleus, 0.0, 1.0, lower_open=True)

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        own, entropy = step.own, field(step, "entropy")
        peak = own & (entropy >= quantile(entropy, own, self.quantile))
        mean = mean_over(own_entropy(step, "nucleus_entropy"), peak)
        first = self.memory.setdefault("first", mean).to(mean)
        scale = step.kept.sum() / peak.sum().clamp(min=1).to(mean.dtype)
        return {"peak": peak, "distance": mean - first, "scale": scale}

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        distance, entropy = fact(tokens, "distance"), own_entropy(tokens, "nucleus_entropy")
        value = distance.square() + 2 * distance * (entropy - entropy.detach())
        scaled = coefficient(self.coef, iteration) * fact(tokens, "scale") * value
        return torch.where(fact(tokens, "peak"), scaled, 0.0)


@dataclass(frozen=True)
class EPO(Remembers):
    """−coef·(H − β_k·P), P = ``penalty`` where H is not between ``low`` and ``high`` times the mean entropy of earlier
    steps, else 0; β_k = 1 + exp(−γ·k/``middle``) at iteration k (EPO, arXiv:2509.22576).

    P has no gradient, in the authors' code too, where it changes the loss that is logged and not the policy; so its
    gradient is that of an entropy bonus. The code has a mean for each turn of an episode and begins at the middle of
    one, which is left out; that of β_k is not verified. The paper's runs have ``low`` 0 and ``high`` 2.

    Args:
        coef: ≥ 0, or knots as in ``k3``.
        low: κ_l, ≥ 0.
        high: κ_r, ≥ ``low``.
        penalty: α ≥ 0.
        gamma: γ ≥ 0.
        middle: k_mid, iterations, > 0.
        window: steps that the mean is over, ≥ 0; 0 for all.
    """

    coef: Coefficient = 0.001
    low: float = 0.5
    high: float = 1.5
    penalty: float = 0.1
    gamma: float = 3.0
    middle: float = 75.0
    window: int = 0

    reads: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        check_coefficient("coef", self.coef)
        check_range("low", self.low, 0.0)
        check_range("high", self.high, self.low)
        for name in ("penalty", "gamma", "window"):
            check_range(name, getattr(self, name), 0.0)
        check_range("middle", self.middle, 0.0, lower_open=True)

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        mean = mean_over(own_entropy(step), step.own)
        past = self.memory.get("past", mean.new_zeros(0)).to(mean)
        self.memory["past"] = torch.cat([past, mean[None]])[-self.window :]
        known = bool(len(past))
        bounds = (self.low * past.mean(), self.high * past.mean()) if known else (-torch.inf, torch.inf)
        return dict(zip(("low", "high"), (torch.as_tensor(b, device=mean.device, dtype=mean.dtype) for b in bounds)))

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        entropy = own_entropy(tokens)
        inside = (entropy > fact(tokens, "low")) & (entropy < fact(tokens, "high"))
        strength = self.penalty * (1.0 + math.exp(-self.gamma * iteration / self.middle))
        gain = entropy - torch.where(inside | ~tokens.own, 0.0, torch.full_like(entropy, strength))
        return -coefficient(self.coef, iteration) * gain


@dataclass(frozen=True)
class EntropyBand:
    """coef·(max(0, low − H) + max(0, H − high)) on the tokens of the step with the highest entropy, 0 on others (SPINE,
    arXiv:2511.17938).

    The paper's bounds and coefficient are not known here; the defaults are ours.

    Args:
        coef: ≥ 0, or knots as in ``k3``.
        low: nats, ≥ 0.
        high: nats, ≥ ``low``.
        share: of the step's own tokens, in (0, 1].
    """

    coef: Coefficient = 0.01
    low: float = 0.5
    high: float = 2.0
    share: float = 0.2

    reads: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        check_coefficient("coef", self.coef)
        check_range("low", self.low, 0.0)
        check_range("high", self.high, self.low)
        check_range("share", self.share, 0.0, 1.0, lower_open=True)

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        return {"forks": largest(field(step, "entropy"), step.own, self.share, least=1)}

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        entropy = own_entropy(tokens)
        outside = (self.low - entropy).clamp(min=0.0) + (entropy - self.high).clamp(min=0.0)
        return coefficient(self.coef, iteration) * torch.where(fact(tokens, "forks"), outside, 0.0)


@dataclass(frozen=True)
class TemperedReinforce:
    """−coef·ℓ on right answers that were drawn at another temperature: REINFORCE with the advantage 1 (AEPO,
    arXiv:2510.08141). Hot ones raise the entropy, cold ones lower it.

    The answers are those with a column ``tempered`` and a ``reward`` above 0. The option ``tempering`` draws them, hot
    where the entropy is not above its target and cold where it is.

    Args:
        coef: ≥ 0, or knots as in ``k3``.
    """

    coef: Coefficient = 1.0

    columns: ClassVar[frozenset[str]] = frozenset({"tempered", "reward"})

    def __post_init__(self) -> None:
        check_coefficient("coef", self.coef)

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        right = (column(tokens, "tempered") > 0) & (column(tokens, "reward") > 0)
        chosen = right[:, None] & tokens.own
        return -coefficient(self.coef, iteration) * torch.where(chosen, tokens.logp, 0.0)
