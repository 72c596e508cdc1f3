"""The slot ``trust``: clipping as in ``ppo``, and tokens that are left out.

A token left out is 0 in the sum and counts in the mean, so leaving out makes the step smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import check_range
from offpolicy.losses.policy.selection import Remembers, largest
from offpolicy.losses.policy.trust import PPO
from offpolicy.losses.tokens import Ratio, Surrogate, Tokens, column, difference, field, per_token


@dataclass(frozen=True)
class MaskedPPO(PPO):
    """``ppo`` on the tokens that :meth:`keep` chooses, 0 on the others."""

    def keep(self, tokens: Tokens, advantage: Tensor) -> Tensor:
        """Bool, (B, T) or (B, 1)."""
        raise NotImplementedError

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        value, clipped = super().__call__(ratio, advantage, tokens)
        keep = self.keep(tokens, advantage)
        return Surrogate(torch.where(keep, value, 0.0), clipped | ~keep)


def fact(tokens: Tokens, name: str) -> Tensor:
    """What ``step_facts`` said of the step."""
    assert tokens.step is not None
    return tokens.step[name]


@dataclass(frozen=True)
class SequenceMask(MaskedPPO):
    """Leaves out answers with A < 0 that have become too unlikely: those whose mean of ℓ_b − ℓ is above δ
    (DeepSeek-V3.2, arXiv:2512.02556).

    ℓ_b is what the engine reported, where that is known. The paper gives no δ; the default is ours.

    Args:
        low: as in ``ppo``.
        high: likewise.
        delta: δ, nats, ≥ 0.
    """

    delta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("delta", self.delta, 0.0)

    def keep(self, tokens: Tokens, advantage: Tensor) -> Tensor:
        own = tokens.own
        sampled = tokens.behavior_logp if tokens.sampler_logp is None else tokens.sampler_logp
        total = difference(sampled, tokens.logp.detach(), own).sum(-1, keepdim=True)
        return (advantage >= 0) | (total / own.sum(-1, keepdim=True).clamp(min=1) <= self.delta)


@dataclass(frozen=True)
class OverLength(MaskedPPO):
    """Leaves out answers that were cut at the longest length (Mini-o3, arXiv:2509.07969, for those cut at its turns).

    They count in the mean, as 0. An advantage that judges them as not kept takes them out of the mean too.

    Args:
        low: as in ``ppo``.
        high: likewise.
    """

    columns: ClassVar[frozenset[str]] = frozenset({"ended"})

    def keep(self, tokens: Tokens, advantage: Tensor) -> Tensor:
        return (column(tokens, "ended") > 0)[:, None]


@dataclass(frozen=True)
class GTPO(MaskedPPO):
    """Where answers of a group with A > 0 and with A < 0 have the same token at the same place, it counts λ-fold in the
    first and not at all in the others (GTPO, arXiv:2508.03772).

    The authors' code takes only places from the beginning on, up to the first one without such a conflict, and the same
    from the end back (``ends``); a place found both ways counts λ² there. It divides each answer by the number of its
    conflicts, which is left out.

    Args:
        low: as in ``ppo``; the paper has the ratio "none", which is never clipped.
        high: likewise.
        amplify: λ ≥ 1.
        ends: True for the code's choice of places.
        most_entropy: answers whose mean entropy is above it are left out, nats, > 0; None for none. 0.7 in the code.
    """

    amplify: float = 2.0
    ends: bool = False
    most_entropy: float | None = None

    columns: ClassVar[frozenset[str]] = frozenset({"token", "group"})
    whole_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("amplify", self.amplify, 1.0)
        if self.most_entropy is not None:
            check_range("most_entropy", self.most_entropy, 0.0, lower_open=True)

    @property
    def reads_values(self) -> frozenset[str]:
        return frozenset(() if self.most_entropy is None else ("entropy",))

    def keep(self, tokens: Tokens, advantage: Tensor) -> Tensor:
        if self.most_entropy is None:
            return torch.ones_like(tokens.kept)
        own = tokens.own
        total = torch.where(own, field(tokens, "entropy").detach(), 0.0).sum(-1, keepdim=True)
        return total / own.sum(-1, keepdim=True).clamp(min=1) <= self.most_entropy

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        value, clipped = super().__call__(ratio, advantage, tokens)
        own, group, token = tokens.own, column(tokens, "group"), column(tokens, "token")
        found = [conflicts(token, own, group, advantage)]
        if self.ends:
            left = tokens.kept.sum(-1, keepdim=True) - 1 - torch.arange(own.shape[1], device=own.device)
            back, inside = left.clamp(min=0), left >= 0  # from the last token to the first
            turned = [x.gather(1, back) for x in (token, own, advantage.expand_as(ratio.value))]
            last = conflicts(turned[0], turned[1] & inside, group, turned[2])
            found = [found[0].cumprod(1) > 0, (last.cumprod(1) > 0).gather(1, back) & inside]
        factor = torch.ones_like(value)
        for conflict in found:
            factor = torch.where(conflict & own, torch.where(advantage > 0, factor * self.amplify, 0.0), factor)
        return Surrogate(value * factor, clipped | (factor == 0))


def conflicts(token: Tensor, own: Tensor, group: Tensor, advantage: Tensor) -> Tensor:
    """Bool (B, T): tokens that an answer of the group has at the same place with an advantage of the other sign."""
    sign = advantage.sign().expand_as(own)
    opposed = (sign[:, None] * sign[None]) < 0
    alike = (token[:, None] == token[None]) & own[:, None] & own[None] & (group[:, None] == group[None])[..., None]
    return (opposed & alike).any(1)


@dataclass(frozen=True)
class Forks(MaskedPPO):
    """Only the tokens of the highest entropy of the step: the forks, where reasoning goes one way or another (SPINE,
    arXiv:2511.17938).

    How the paper draws the line between forks and others is not verified; a share of the step's tokens is the reading
    here.

    Args:
        low: as in ``ppo``.
        high: likewise.
        share: of the step's own tokens, in (0, 1].
    """

    share: float = 0.2

    reads_values: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("share", self.share, 0.0, 1.0, lower_open=True)

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        return {"forks": largest(field(step, "entropy"), step.own, self.share, least=1)}

    def keep(self, tokens: Tokens, advantage: Tensor) -> Tensor:
        return fact(tokens, "forks")


@dataclass(frozen=True)
class D3S(Remembers, MaskedPPO):
    """Only the tokens of the step with the largest |A|·H (D³S, arXiv:2509.22115, at the level of tokens).

    Their share goes linearly from ``first`` to ``last`` within ``steps`` optimiser steps. The paper says that it begins
    small and grows; its numbers are not known here, the defaults are ours.

    Args:
        low: as in ``ppo``.
        high: likewise.
        first: share of the first step, in (0, 1].
        last: share after ``steps`` steps, in (0, 1].
        steps: ≥ 1.
    """

    first: float = 0.2
    last: float = 1.0
    steps: int = 100

    reads_values: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("first", self.first, 0.0, 1.0, lower_open=True)
        check_range("last", self.last, 0.0, 1.0, lower_open=True)
        check_range("steps", self.steps, 1)

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        done = self.memory.get("steps", 0)
        self.memory["steps"] = done + 1
        share = self.first + (self.last - self.first) * min(1.0, done / self.steps)
        signal = per_token(step.advantage).abs() * field(step, "entropy")
        return {"chosen": largest(signal, step.own, share, least=1)}

    def keep(self, tokens: Tokens, advantage: Tensor) -> Tensor:
        return fact(tokens, "chosen")
