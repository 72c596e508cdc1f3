"""The slot ``trust`` with advantages of parts of an answer, from columns that a store of one's own engine has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from offpolicy.errors import check_range
from offpolicy.losses.policy.steps import step_means, step_numbers
from offpolicy.losses.policy.trust import PPO
from offpolicy.losses.tokens import Ratio, Surrogate, Tokens, column


@dataclass(frozen=True)
class SegmentPPO(PPO):
    """As ``ppo`` with A = V(end) − V(begin) of the token's segment, and 0 on tokens that were near certain (SPO in its
    chain form, arXiv:2505.23564).

    V is the mean reward of answers drawn from there on; at the end of the answer it is its reward. No engine here draws
    such answers: the store needs the columns ``segment`` (B, T) and ``segment_value`` (B, T), V at the begin of the
    token's segment. Tokens that are left out still count in the mean.

    Args:
        low: as in ``ppo``.
        high: likewise.
        certain: π_k(token) from which on a token is left out, in (0, 1]; 1 leaves none out.
    """

    certain: float = 0.9

    columns = frozenset({"segment", "segment_value", "reward"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("certain", self.certain, 0.0, 1.0, lower_open=True)

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        index = step_numbers(tokens.kept, column(tokens, "segment"))
        begin, real = step_means(column(tokens, "segment_value").to(ratio.value), index, tokens.kept)
        after, more = torch.zeros_like(begin), torch.zeros_like(real)
        after[:, :-1], more[:, :-1] = begin[:, 1:], real[:, 1:]
        end = torch.where(more, after, column(tokens, "reward").to(begin)[:, None])
        gained = (end - begin).gather(1, index)
        if self.certain < 1:
            gained = torch.where(tokens.previous_logp.exp() < self.certain, gained, 0.0)
        return super().__call__(ratio, gained, tokens)


@dataclass(frozen=True)
class StateGroupPPO(PPO):
    """As ``ppo`` with A + ω·(G − mean of G over the steps from the same state) (GiGPO, arXiv:2505.10978).

    G is the discounted return from a step on, γ .95 in the paper. The store needs the columns ``state`` (B, T) int64,
    equal numbers for equal states before the token's step and −1 for none, and ``step_return`` (B, T).

    Args:
        low: as in ``ppo``.
        high: likewise.
        omega: ω ≥ 0.
    """

    omega: float = 1.0

    columns = frozenset({"state", "step_return"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("omega", self.omega, 0.0)

    def step_facts(self, step: Tokens) -> Mapping[str, Tensor]:
        state, kept = column(step, "state"), step.kept
        index = step_numbers(kept, state)
        gain, real = step_means(column(step, "step_return").to(step.logp), index, kept)
        of_step = torch.full_like(state, -1).scatter_reduce(1, index, torch.where(kept, state, -1), "amax")
        label = _labels(torch.where(real, of_step, -1).flatten())
        known = (real & (of_step >= 0)).flatten()
        size = torch.zeros_like(gain.flatten()).scatter_add(0, label, known.to(gain))
        total = torch.zeros_like(gain.flatten()).scatter_add(0, label, torch.where(known, gain.flatten(), 0.0))
        mean = (total / size.clamp(min=1.0))[label].view_as(gain)
        ahead = torch.where(known.view_as(real), gain - mean, 0.0)
        return {"ahead": ahead.gather(1, index)}

    def __call__(self, ratio: Ratio, advantage: Tensor, tokens: Tokens) -> Surrogate:
        facts = self.step_facts(tokens) if tokens.step is None else tokens.step
        return super().__call__(ratio, advantage + self.omega * facts["ahead"], tokens)


def _labels(x: Tensor) -> Tensor:
    """Numbers from 0 for the distinct entries of a vector of int64, (N,)."""
    order = torch.argsort(x, stable=True)
    ordered = x[order]
    begins = torch.cat([torch.zeros_like(ordered[:1]), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(x).index_copy_(0, order, begins.cumsum(0))
