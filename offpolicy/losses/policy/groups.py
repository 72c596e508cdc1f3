"""What advantages compute within the groups of an iteration beside mean and deviation: ranks, medians, extremes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_range
from offpolicy.losses.advantages import GRPO, GroupAdvantage
from offpolicy.losses.answers import Answers

RIGHT = 0.5  # a reward above it is that of a right answer, where right and wrong are all that counts


@dataclass(frozen=True)
class AnswerAdvantage(GroupAdvantage):
    """What components share that see the record of the answers and end with (R − μ)/(s + ε).

    Args:
        statistics: as of ``grpo``.
        eps: ε, > 0.
    """

    eps: float = 1e-4

    takes_answers = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("eps", self.eps, 0.0, lower_open=True)

    def normalised(self, reward: Tensor, answers: Answers) -> Tensor:
        """The advantage of GRPO with these rewards in place of the answers' own, (B,) float64."""
        return GRPO(self.statistics, self.eps)(reward.double(), answers.group, answers.own)

    def counted(self, answers: Answers) -> Tensor:
        """(B,) bool: answers that enter the statistics."""
        return answers.own if self.statistics == "own" else torch.ones_like(answers.own)


def group_numbers(group: Tensor) -> tuple[Tensor, int]:
    """Of each row the number of its group from 0, in the order of the groups' numbers, (B,) int64; and how many."""
    _, index = torch.unique(group, return_inverse=True)
    return index, int(index.max()) + 1 if len(index) else 0


def group_total(x: Tensor, group: Tensor) -> Tensor:
    """Σ over the group of each row, (B,)."""
    index, groups = group_numbers(group)
    return x.new_zeros(groups).index_add_(0, index, x)[index]


def group_largest(x: Tensor, group: Tensor) -> Tensor:
    """The largest number in the group of each row, (B,)."""
    index, groups = group_numbers(group)
    return x.new_full((groups,), -torch.inf).scatter_reduce_(0, index, x, "amax")[index]


def group_ranks(key: Tensor, group: Tensor) -> Tensor:
    """The place of each row in its group by rising key, from 0, (B,) int64; equal keys stand in the order of rows."""
    index, groups = group_numbers(group)
    order = torch.argsort(key, stable=True)
    order = order[torch.argsort(index[order], stable=True)]
    sizes = torch.bincount(index, minlength=groups)
    place = torch.arange(len(index), device=index.device) - (sizes.cumsum(0) - sizes)[index[order]]
    return torch.empty_like(place).index_copy_(0, order, place)


def group_places(group: Tensor) -> Tensor:
    """The place of each row in its group by the order of rows, from 0, (B,) int64."""
    return group_ranks(torch.zeros_like(group), group)


def group_median(x: Tensor, group: Tensor, counted: Tensor) -> Tensor:
    """The median of the counted rows in the group of each row, (B,); of two in the middle their mean, of none 0."""
    size = group_total(counted.long(), group)
    place = group_ranks(torch.where(counted, x, torch.inf), group)
    middle = [torch.where(counted & (place == at), x, 0.0) for at in ((size - 1) // 2, size // 2)]
    return (group_total(middle[0], group) + group_total(middle[1], group)) / 2


def answer_field(answers: Answers, name: str) -> Tensor:
    """An optional number of the answers that a component reads, (B,) float64.

    Raises:
        UsageError: it was not given.
    """
    found = getattr(answers, name)
    if found is None:
        raise UsageError(f"the advantage reads `{name}`, which these answers do not have; expected (B,) numbers.")
    return found.double()


def answer_part(answers: Answers, name: str) -> Tensor:
    """A reward of the answers by its name, (B,).

    Raises:
        UsageError: there is none of that name.
    """
    check_reward(name, answers.parts)
    return answers.parts[name]


def check_reward(name: str, rewards: Collection[str]) -> None:
    """Raise :class:`UsageError` unless there is a reward of this name."""
    if name not in rewards:
        raise UsageError(
            f"the advantage reads the reward '{name}'; there {'are' if len(rewards) > 1 else 'is'} "
            f"{', '.join(rewards) or 'none by name'}. Add one of that name to --model.rewards; its weight may be 0."
        )


def success_rates(answers: Answers, counted: Tensor) -> Tensor:
    """(B,) float64 in [0, 1]: the rewards, which are read as rates of success.

    Raises:
        UsageError: one lies outside.
    """
    reward = answers.reward.double()
    outside = reward[counted & ((reward < 0) | (reward > 1))]
    if len(outside):
        raise UsageError(
            f"a reward is {outside[0].item():g}, and the advantage reads rewards as rates of success; expected numbers"
            " in [0, 1]. Rescale the rewards or choose another advantage."
        )
    return reward
