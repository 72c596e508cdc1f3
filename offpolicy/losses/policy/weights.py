"""The slot ``weight``: factors per token, without gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offpolicy.errors import check_choice, check_range
from offpolicy.losses.tokens import LARGEST_LOG_RATIO, Tokens, difference

ENGINE_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def importance(log_weight: Tensor, own: Tensor, mode: str, cap: float) -> Tensor:
    """exp of log-weights of own tokens, (B, T), or of their sum over an answer; 1 elsewhere.

    Args:
        log_weight: nats, 0 where not own.
        own: bool.
        mode: one of ``ENGINE_MODES``: weights above the cap become the cap ("truncate") or 0 ("mask").
        cap: > 0.
    """
    level, action = mode.split("_")
    if level == "sequence":
        whole = log_weight.sum(-1, keepdim=True).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        log_weight = torch.where(own, whole, 0.0)
    weight = log_weight.exp()
    return weight.clamp(max=cap) if action == "truncate" else torch.where(weight > cap, 0.0, weight)


class Cut:
    """What weights with a mode and a cap have in common."""

    mode: str
    cap: float

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ENGINE_MODES)
        check_range("cap", self.cap, 0.0, lower_open=True)


@dataclass(frozen=True)
class EngineWeight(Cut):
    """exp(ℓ_b − ℓ_sampler): what the engine's arithmetic makes of the policy, put right. 1 where they agree.

    Args:
        mode: per token or per sequence (the product over its tokens); weights above the cap become the cap
            ("truncate") or 0 ("mask").
        cap: > 0.
    """

    mode: str = "sequence_mask"
    cap: float = 3.0

    def __call__(self, tokens: Tokens) -> Tensor:
        if tokens.sampler_logp is None:
            return torch.ones_like(tokens.mask)
        log_weight = difference(tokens.behavior_logp, tokens.sampler_logp, tokens.own)
        return importance(log_weight, tokens.own, self.mode, self.cap)


@dataclass(frozen=True)
class AgeWeight(Cut):
    """exp(ℓ_k − ℓ_b): what π_k makes of answers that an earlier policy drew, for ratios to π_k. 1 for answers of π_k.

    With the ratio "decoupled", which has this weight itself, it would count twice.

    Args:
        mode: as of ``engine``.
        cap: > 0.
    """

    mode: str = "sequence_truncate"
    cap: float = 3.0

    def __call__(self, tokens: Tokens) -> Tensor:
        log_weight = difference(tokens.previous_logp, tokens.behavior_logp, tokens.own)
        return importance(log_weight, tokens.own, self.mode, self.cap)


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
