"""Answers that come back from a store of successes: what a step of them is, and how much it counts (SPEAR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offpolicy.losses.policy.covariance import ClipCov
from offpolicy.losses.tokens import Tokens, column


@dataclass(frozen=True)
class ReplayedClipCov(ClipCov):
    """``ppo`` on new answers, ``clip_cov`` on those that come back (SPEAR, arXiv:2509.22601).

    The groups of what comes back have negative numbers.

    Args:
        low: as in ``ppo``.
        high: likewise; 0.28 in the authors' scripts.
        share: as in ``clip_cov``; .02.
        lb: likewise; 2.
        ub: likewise; 60.
    """

    high: float | None = 0.28
    share: float = 0.02
    lb: float = 2.0
    ub: float = 60.0

    columns: ClassVar[frozenset[str]] = frozenset({"group"})

    def keep(self, tokens: Tokens, advantage: Tensor) -> Tensor:
        return super().keep(tokens, advantage) | (column(tokens, "group") >= 0)[:, None]


@dataclass(frozen=True)
class StoredWeight:
    """The column ``weight`` of the store, one number per answer."""

    columns: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __call__(self, tokens: Tokens) -> Tensor:
        return column(tokens, "weight").to(tokens.mask)[:, None].expand_as(tokens.mask)
