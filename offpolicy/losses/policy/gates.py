"""The slot ``anchors``: divergences on samples of the reference, and anchors that hold some tokens only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import check_choice, check_range
from offpolicy.losses.policy.anchors import K1, K2, K3, KL, Coefficient, check_coefficient, coefficient
from offpolicy.losses.policy.masks import fact
from offpolicy.losses.policy.selection import largest
from offpolicy.losses.tokens import Tokens, column, difference, field, per_token

GATES: dict[str, Callable[[Tokens], Tensor]] = {  # name → bool (B, T), (B, 1)
    "all": lambda tokens: tokens.kept,
    "own": lambda tokens: tokens.own,
    "external": lambda tokens: tokens.outside,
    "negative": lambda tokens: (per_token(tokens.advantage) < 0) & tokens.own,
    "mastered": lambda tokens: (column(tokens, "mastered") > 0)[:, None] & tokens.kept,
}
COMPARED_WITH = ("base", "previous", "behavior")
LARGEST_DIVERGENCE = 10.0


def forward_kl(log_ratio: Tensor) -> Tensor:
    """u − 1 − ln u with u = π_θ/π_ref: on samples of the reference, unbiased for KL(π_ref ‖ π_θ)."""
    return torch.expm1(log_ratio) - log_ratio


def jensen_shannon(log_ratio: Tensor) -> Tensor:
    """u ln u − (u + 1) ln((u + 1)/2): the generator of twice the Jensen–Shannon divergence."""
    u = log_ratio.exp()
    return u * log_ratio - (u + 1) * torch.log1p(torch.expm1(log_ratio) / 2)


def alpha_divergence(log_ratio: Tensor, alpha: float) -> Tensor:
    """(u^(1 − α) − (1 − α)·u − α)/(α(α − 1)): KL(π_ref ‖ π_θ) for α → 1, KL(π_θ ‖ π_ref) for α → 0."""
    powers = ((1 - alpha) * log_ratio).exp() - (1 - alpha) * log_ratio.exp() - alpha
    return powers / (alpha * (alpha - 1))


class Gated:
    """What anchors have in common that hold some tokens only."""

    gate: str

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"mastered"} if self.gate == "mastered" else ())

    @property
    def of_demonstrations(self) -> frozenset[str]:
        """What demonstrations must have, as nobody else pays: ``token``, and ``logp`` where they are compared by it."""
        compared = {"logp"} if getattr(self, "reference", "") == "behavior" else set()
        return frozenset({"token"} | compared if self.gate == "external" else ())


@dataclass(frozen=True)
class FDivergence(Gated):
    """What divergences f(π_θ/π_ref) have in common; the mean of f over samples of the reference is the divergence.

    Args:
        coef: ≥ 0, or knots as in ``k3``.
        reference: "base"; "previous", π_k; or "behavior", the policy that wrote the token, whose log-probabilities are
            in the store: no model of the reference is needed. Demonstrations of unknown log-probability pay nothing.
        gate: the tokens that pay: "all", "own", "external" (demonstrations), "negative" (A < 0) or "mastered", by the
            column of that name.
    """

    coef: Coefficient
    reference: str = "base"
    gate: str = "all"

    def __post_init__(self) -> None:
        check_coefficient("coef", self.coef)
        check_choice("reference", self.reference, COMPARED_WITH)
        check_choice("gate", self.gate, GATES)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({f"{self.reference}_logp"})

    def value(self, log_ratio: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        reference = field(tokens, f"{self.reference}_logp")
        paid = GATES[self.gate](tokens) & ~reference.isnan()
        found = self.value(difference(tokens.logp, reference, paid))
        # beyond 10 a token is as far away as it can be, and its gradient would only be noise
        return coefficient(self.coef, iteration) * torch.where(paid, found.clamp(max=LARGEST_DIVERGENCE), 0.0)


class ForwardKL(FDivergence):
    """u − 1 − ln u with u = π_θ/π_ref: ``k3`` with the roles swapped, KL(π_ref ‖ π_θ) on samples of the reference. At
    most 10."""

    def value(self, log_ratio: Tensor) -> Tensor:
        return forward_kl(log_ratio)


class JensenShannon(FDivergence):
    """u ln u − (u + 1) ln((u + 1)/2) with u = π_θ/π_ref: the Jensen–Shannon divergence, twice, on samples of the
    reference. At most 10."""

    def value(self, log_ratio: Tensor) -> Tensor:
        return jensen_shannon(log_ratio)


@dataclass(frozen=True)
class AlphaDivergence(FDivergence):
    """(u^(1 − α) − (1 − α)u − α)/(α(α − 1)) with u = π_θ/π_ref, on samples of the reference. At most 10.

    Args:
        coef: as of ``forward``.
        reference: likewise.
        gate: likewise.
        alpha: α, in (0, 1).
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0.0, 1.0, lower_open=True, upper_open=True)

    def value(self, log_ratio: Tensor) -> Tensor:
        return alpha_divergence(log_ratio, self.alpha)


@dataclass(frozen=True)
class DPH(AlphaDivergence):
    """η·D_f on stored answers of the reference to problems that it has mastered (DPH-RL, arXiv:2509.07430).

    f is u − 1 − ln u (forward KL, η .01–.05), the Jensen–Shannon generator (η .05–.2) or that of α = .2 (η .01–.05).
    Those answers are demonstrations (gate "external") or have a column ``mastered``; give them the weight 0 in the
    policy's term ("source" with ``external`` 0). The paper's JS is, to the letter, KL(ref ‖ m) on stored answers plus
    KL(π ‖ m) on own ones with probability .1, which is left out. Which problems count as mastered (7 of 8 right) is not
    verified; the authors' script asks 4 of the first 4.

    Args:
        coef: η ≥ 0, or knots as in ``k3``.
        reference: as of ``forward``.
        gate: likewise.
        alpha: α of "alpha".
        divergence: "forward", "js" or "alpha".
    """

    coef: Coefficient = 0.01
    gate: str = "external"
    divergence: str = "forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("divergence", self.divergence, ("forward", "js", "alpha"))

    def value(self, log_ratio: Tensor) -> Tensor:
        if self.divergence == "alpha":
            return super().value(log_ratio)
        return forward_kl(log_ratio) if self.divergence == "forward" else jensen_shannon(log_ratio)


HELD: Mapping[str, type[KL]] = {"k1": K1, "k2": K2, "k3": K3}


@dataclass(frozen=True)
class GatedKL(Gated):
    """``k1``, ``k2`` or ``k3`` on some tokens only.

    Args:
        coef: as in ``k3``.
        gate: "all", "own", "external", "negative" (A < 0) or "mastered", by the column of that name.
        estimator: "k1", "k2" or "k3".
        target: "base" or "previous".
    """

    coef: Coefficient
    gate: str
    estimator: str = "k3"
    target: str = "base"

    def __post_init__(self) -> None:
        check_choice("estimator", self.estimator, HELD)
        HELD[self.estimator](self.coef, self.target)
        check_choice("gate", self.gate, self.gates())

    @staticmethod
    def gates() -> tuple[str, ...]:
        return tuple(GATES)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({f"{self.target}_logp"})

    def paid(self, tokens: Tokens) -> Tensor:
        return GATES[self.gate](tokens)

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        found = HELD[self.estimator](self.coef, self.target)(tokens, iteration=iteration)
        return torch.where(self.paid(tokens), found, 0.0)


@dataclass(frozen=True)
class GatedTailKL(GatedKL):
    """``k1``, ``k2`` or ``k3`` on the own tokens of the step that are least likely or of the highest entropy.

    Args:
        coef: as in ``k3``.
        gate: "low_probability" or "high_entropy".
        estimator: "k1", "k2" or "k3".
        target: "base" or "previous".
        share: of the step's own tokens, in (0, 1].
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("share", self.share, 0.0, 1.0, lower_open=True)

    @staticmethod
    def gates() -> tuple[str, ...]:
        return ("low_probability", "high_entropy")

    @property
    def reads_values(self) -> frozenset[str]:
        return frozenset({"entropy"} if self.gate == "high_entropy" else ())

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        values = field(step, "entropy") if self.gate == "high_entropy" else -step.logp
        return {"paid": largest(values, step.own, self.share, least=1)}

    def paid(self, tokens: Tokens) -> Tensor:
        return fact(tokens, "paid")


@dataclass(frozen=True)
class LpReg:
    """coef·(e^δ − δ − 1), δ = ℓ_proxy − ℓ, on the least likely tokens with A < 0 whose proxy is likelier than they are
    (Lp-Reg, arXiv:2510.03222), at most 10.

    The proxy is the policy that drew the token without the tokens below κ times its largest probability, renormalised.
    Two facts about that policy's vocabulary are not stored: the largest probability is taken from the current policy,
    and what renormalising adds (at most −ln of the mass that stays, near 0) is left out. Which tokens: the authors'
    code takes 1 % of those with A < 0, at least 2 or none. The policy's term should have no lower bound and a high
    upper one.

    Args:
        coef: ≥ 0, or knots as in ``k3``; 1 in the code.
        share: of the step's own tokens with A < 0, in (0, 1].
        kappa: κ, in [0, 1].
    """

    coef: Coefficient = 1.0
    share: float = 0.01
    kappa: float = 0.02

    reads: ClassVar[frozenset[str]] = frozenset({"top_logp"})

    def __post_init__(self) -> None:
        check_coefficient("coef", self.coef)
        check_range("share", self.share, 0.0, 1.0, lower_open=True)
        check_range("kappa", self.kappa, 0.0, 1.0)

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        negative = step.own & (per_token(step.advantage) < 0)
        several = self.share * negative.sum().to(step.logp.dtype) >= 2
        return {"held": largest(-step.logp, negative, self.share) & several}

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        own, proxy = tokens.own, tokens.behavior_logp
        delta = difference(proxy, tokens.logp, own)
        stays = torch.where(own, proxy.exp() - self.kappa * field(tokens, "top_logp").exp(), -1.0) >= 0
        value = (torch.expm1(delta) - delta).clamp(max=LARGEST_DIVERGENCE)
        held = fact(tokens, "held") & stays & (delta.detach() > 0)
        return coefficient(self.coef, iteration) * torch.where(held, value, 0.0)
