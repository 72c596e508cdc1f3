"""One objective for policy gradients of language models, composed of named parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offpolicy.losses.tokens import Ratio, Surrogate, Tokens, Totals

__all__ = ["Objective", "Ratio", "Spec", "Surrogate", "Tokens", "Totals"]

# a component: its name, or {"name": ..., **parameters}; the name may be an import path ``package.module.callable``
Spec = str | Mapping[str, Any]


@dataclass(frozen=True)
class Objective:
    """A choice of one component per slot (of several for ``anchors`` and ``weight``).

    Args:
        advantage: grpo, dr_grpo, rloo, batch_std, gae.
        ratio: token, decoupled, mix, sequence, mis, none.
        trust: ppo, dual, centred, none.
        aggregation: seq_mean_token_mean, token_mean, token_mean_local, dr_grpo, sum_over_T, seq_sum.
        anchors: k1, k2, k3, full, convex.
        entropy: bonus, none.
        weight: engine, focal.
        value: squared, none.
    """

    advantage: Spec = "grpo"
    ratio: Spec = "token"
    trust: Spec = "ppo"
    aggregation: Spec = "seq_mean_token_mean"
    anchors: tuple[Spec, ...] = ()
    entropy: Spec = "none"
    weight: tuple[Spec, ...] = ()
    value: Spec = "none"

    @property
    def reads(self) -> frozenset[str]:
        """Optional fields of :class:`Tokens` that the components read, such as ``base_logp``."""
        raise NotImplementedError

    @property
    def uses_critic(self) -> bool:
        """Whether advantages come from a critic: :meth:`critic_advantages` in place of :meth:`advantages`."""
        raise NotImplementedError

    @property
    def entropy_gradient(self) -> bool:
        """Whether ``Tokens.entropy`` needs a gradient."""
        raise NotImplementedError

    def advantages(self, rewards: Tensor, group: Tensor, own: Tensor) -> Tensor:
        """Advantages (B,) of rewards (B,) with group numbers (B,) int64 and own (B,) bool, false for demonstrations.

        Over whole groups, once per rollout batch, over the rows of all processes.
        """
        raise NotImplementedError

    def critic_advantages(self, rewards: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and returns, (B, T) each, from rewards of whole answers (B,) and values (B, T)."""
        raise NotImplementedError

    def loss(
        self, tokens: Tokens, totals: Totals, *, iteration: int, health: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the loss, 0-d, and sums for the health metrics.

        Shares add up over micro-batches and processes to the loss of the step. So do the sums, name → vector; at the
        end :func:`offpolicy.losses.health.summarise` makes the metrics of them.

        Args:
            tokens: the micro-batch.
            totals: of the whole step.
            iteration: from 1, for schedules.
            health: False leaves the dict empty.
        """
        raise NotImplementedError
