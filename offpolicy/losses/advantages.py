"""Advantages of answers: from the rewards of their group, or from a critic.

A group is the answers to one prompt drawn together; statistics are taken over whole groups, in float64. A component is
called with rewards (B,), group (B,) int64 and own (B,) bool, which is false for demonstrations, and returns (B,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_range

STATISTICS = ("all", "own")


class Groups(NamedTuple):
    """Of each row its reward and the mean, sample standard deviation and size of its group, (B,) float64 each."""

    reward: Tensor
    mean: Tensor
    std: Tensor
    size: Tensor

    @property
    def centred(self) -> Tensor:
        return self.reward - self.mean


def group_statistics(rewards: Tensor, group: Tensor, counted: Tensor | None = None) -> Groups:
    """Mean, sample standard deviation (n − 1; 0 for n < 2) and size of each row's group.

    Where all counted rewards of a group are equal, its mean is that number to the last bit and its deviation 0.

    Args:
        rewards: (B,).
        group: (B,) int64, any numbers.
        counted: (B,) bool, rows that enter the statistics; None for all. Rows of a group without any have themselves as
            mean.
    """
    reward = rewards.double()
    _, index = torch.unique(group, return_inverse=True)
    groups = int(index.max()) + 1 if len(index) else 0
    kept = torch.ones_like(group, dtype=torch.bool) if counted is None else counted

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(groups).index_add_(0, index, torch.where(kept, x, 0.0))[index]

    def extreme(which: str, start: float) -> Tensor:
        known = torch.where(kept, reward, start)
        return reward.new_full((groups,), start).scatter_reduce_(0, index, known, which)[index]

    size, lowest = total(torch.ones_like(reward)), extreme("amin", torch.inf)
    mean = total(reward) / size.clamp(min=1.0)
    mean = torch.where(lowest == extreme("amax", -torch.inf), lowest, mean)
    mean = torch.where(size == 0, reward, mean)
    std = (total((reward - mean).square()) / (size - 1.0).clamp(min=1.0)).sqrt()
    return Groups(reward, mean, std, size)


@dataclass(frozen=True)
class GroupAdvantage:
    """What the components below share.

    Args:
        statistics: "all" rows of a group make its mean and deviation, or its "own" answers alone. With "own", a
            demonstration beside equal answers has no deviation to be divided by: take a component that does not divide.
    """

    statistics: str = "all"

    def __post_init__(self) -> None:
        if self.statistics not in STATISTICS:
            raise UsageError(f"`statistics` is '{self.statistics}'; expected one of {', '.join(STATISTICS)}.")

    def groups(self, rewards: Tensor, group: Tensor, own: Tensor) -> Groups:
        return group_statistics(rewards, group, own if self.statistics == "own" else None)


@dataclass(frozen=True)
class GRPO(GroupAdvantage):
    """(R − μ)/(s + ε), with the sample deviation s of the group (arXiv:2402.03300, section 4.1).

    Args:
        eps: ε, > 0; 1e-4 and 1e-6 are both in use.
    """

    eps: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("eps", self.eps, 0.0, lower_open=True)

    def __call__(self, rewards: Tensor, group: Tensor, own: Tensor) -> Tensor:
        found = self.groups(rewards, group, own)
        return (found.centred / (self.deviation(found, own) + self.eps)).to(rewards.dtype)

    def deviation(self, found: Groups, own: Tensor) -> Tensor:
        """s of each row, (B,), or one for all."""
        return found.std


@dataclass(frozen=True)
class DrGRPO(GroupAdvantage):
    """R − μ: no division, which would favour prompts that are almost solved or almost hopeless (arXiv:2503.20783)."""

    def __call__(self, rewards: Tensor, group: Tensor, own: Tensor) -> Tensor:
        return self.groups(rewards, group, own).centred.to(rewards.dtype)


@dataclass(frozen=True)
class RLOO(GroupAdvantage):
    """R less the mean of the other answers, (R − μ)·n/(n − 1); 0 for n = 1 (arXiv:2402.14740)."""

    def __call__(self, rewards: Tensor, group: Tensor, own: Tensor) -> Tensor:
        found = self.groups(rewards, group, own)
        return (found.centred * found.size / (found.size - 1.0).clamp(min=1.0)).to(rewards.dtype)


class BatchStd(GRPO):
    """(R − μ)/(s + ε), with μ of the group and the sample deviation s of all counted rewards of the batch."""

    def deviation(self, found: Groups, own: Tensor) -> Tensor:
        counted = found.reward[own] if self.statistics == "own" else found.reward
        return counted.std() if len(counted) > 1 else torch.zeros_like(found.mean[:1])


@dataclass(frozen=True)
class GAE:
    """Generalised advantages of tokens from a critic (arXiv:1506.02438), whose value stands before each token.

    Args:
        discount: γ per token, in [0, 1].
        lambda_: λ, in [0, 1].
        normalize: subtract the mean over tokens and divide by their deviation; returns stay as they are.
    """

    discount: float = 1.0
    lambda_: float = 1.0
    normalize: bool = True

    critic = True

    def __post_init__(self) -> None:
        check_range("discount", self.discount, 0.0, 1.0)
        check_range("lambda_", self.lambda_, 0.0, 1.0)

    def __call__(self, rewards: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and returns (B, T) from rewards of whole answers (B,), values (B, T) and masks (B, T)."""
        return self.of_tokens(rewards, value, mask)

    def of_tokens(
        self,
        rewards: Tensor,
        value: Tensor,
        mask: Tensor,
        last_value: Tensor | None = None,
        learned: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same, with values after the last tokens (B,), None for 0, and the tokens (B, T) that are normalised over,
        None for the mask."""
        reward, kinds = last_token(rewards, mask), {"discount": self.discount, "lambda_": self.lambda_}
        advantage = gae(reward, value, mask, last_value=last_value, **kinds)
        returns = (advantage + value) * mask
        if self.normalize:
            kept = advantage[(mask if learned is None else learned) > 0].double()
            spread = kept.std() if len(kept) > 1 else torch.zeros_like(kept.sum())
            advantage = ((advantage - kept.mean()) / (spread + 1e-8)).to(advantage.dtype) * mask
        return advantage, returns


def last_kept(value: Tensor, mask: Tensor) -> Tensor:
    """The value at the last token of each answer, (B,); 0 for none."""
    rest = mask.flip(-1).cumsum(-1).flip(-1)
    return (value * mask * (rest == 1)).sum(-1)


def last_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards of whole answers (B,) on the last token of each, (B, T)."""
    rest = mask.flip(-1).cumsum(-1).flip(-1)  # tokens from here on
    return rewards[:, None] * mask * (rest == 1)


@dataclass(frozen=True)
class ExtendedGAE(GAE):
    """As GAE; after an answer that was cut, the value is that of its last token (EGAE of T-PPO, arXiv:2506.15050).

    So its last δ is r + (γ − 1)·V. That the critic learns from answers that have ended alone the part ``squared`` says.

    Args:
        discount: as in ``gae``.
        lambda_: likewise.
        normalize: likewise.
    """

    reads = frozenset({"ended", "learned"})

    def __call__(  # type: ignore[override]  # it is told which answers have ended, as it says in `reads`
        self, rewards: Tensor, value: Tensor, mask: Tensor, ended: Tensor, learned: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :class:`GAE`, from ``ended`` (B,) bool and the tokens ``learned`` (B, T) that are normalised over."""
        return self.of_tokens(rewards, value, mask, torch.where(ended, 0.0, last_kept(value, mask)), learned)


def gae(
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    discount: float,
    lambda_: float,
    last_value: Tensor | None = None,
) -> Tensor:
    """A_t = δ_t + γλ·A_{t+1}, δ_t = r_t + γ·V_{t+1} − V_t, over the kept tokens (arXiv:1506.02438, Eq. 16).

    The answer ends after its last kept token; tokens that are not kept are passed over.

    Args:
        reward: r (B, T) of tokens.
        value: V (B, T), of the state before each token.
        mask: (B, T), 1 on kept tokens.
        discount: γ.
        lambda_: λ.
        last_value: V after the last kept token, (B,); None for 0.

    Returns:
        (B, T), 0 outside of the mask.
    """
    advantage = torch.zeros_like(value)
    following = torch.zeros_like(value[:, 0])
    next_value = torch.zeros_like(following) if last_value is None else last_value.to(value)
    for t in reversed(range(value.shape[1])):
        kept = mask[:, t] > 0
        here = reward[:, t] + discount * next_value - value[:, t] + discount * lambda_ * following
        following = torch.where(kept, here, following)
        next_value = torch.where(kept, value[:, t], next_value)
        advantage[:, t] = torch.where(kept, here, 0.0)
    return advantage
