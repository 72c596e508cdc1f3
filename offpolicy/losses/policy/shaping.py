"""The slot ``advantage``: GRPO with other rewards or with scaled advantages, by what is known of the answers."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_range
from offpolicy.losses.advantages import BatchStd, group_statistics
from offpolicy.losses.answers import Answers
from offpolicy.losses.policy.groups import (
    RIGHT,
    AnswerAdvantage,
    answer_field,
    answer_part,
    check_reward,
    group_largest,
    group_numbers,
    group_places,
    group_ranks,
    group_total,
)


@dataclass(frozen=True)
class UnlikelinessAdvantage(AnswerAdvantage):
    """GRPO with R·(1 − β·rank/n), rank 0 for the rarest of a group's n answers, n − 1 for the likeliest
    (arXiv:2506.02355).

    Answers are ranked by the mean log-probability of their tokens under the policy that drew them, wrong ones too.
    Published with two updates per answer and a divergence of coefficient .1.

    Args:
        statistics: as of ``grpo``.
        eps: ε, > 0; the authors' code has 1e-6.
        beta: β in [0, 1].
    """

    beta: float = 0.25

    reads = frozenset({"mean_logp"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("beta", self.beta, 0.0, 1.0)

    def __call__(self, answers: Answers) -> Tensor:
        counted, group = self.counted(answers), answers.group
        likelihood = torch.where(counted, answer_field(answers, "mean_logp"), torch.inf)
        size = group_total(counted.double(), group).clamp(min=1.0)
        share = torch.where(counted, group_ranks(likelihood, group) / size, 0.0)
        return self.normalised(answers.reward * (1 - self.beta * share), answers).to(answers.reward.dtype)


@dataclass(frozen=True)
class ConfidenceAdvantage(AnswerAdvantage):
    """A + α·(c(group) − c), c the confidence of an answer, in groups with a reward above 0; else A (ProGRPO,
    arXiv:2602.05281).

    A is GRPO's, c = exp of the mean log-probability of the answer's tokens under the policy that drew them. For
    c(group), here its mean over the group, the paper has the policy's confidence in the prompt, and for both the mean
    over the less likely fifth of the tokens; neither is known here. Unverified: α.

    Args:
        statistics: as of ``grpo``.
        eps: ε, > 0.
        alpha: α ≥ 0.
    """

    alpha: float = 0.3

    reads = frozenset({"mean_logp"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0.0)

    def __call__(self, answers: Answers) -> Tensor:
        counted, group = self.counted(answers), answers.group
        confidence = torch.where(counted, answer_field(answers, "mean_logp").exp(), 0.0)
        level = group_statistics(confidence, group, counted).mean
        some = group_largest(torch.where(counted, answers.reward.double(), 0.0), group) > 0
        shift = torch.where(some & counted, self.alpha * (level - confidence), 0.0)
        return (self.normalised(answers.reward, answers) + shift).to(answers.reward.dtype)


@dataclass(frozen=True)
class DynamicAdvantage(AnswerAdvantage):
    """w·A with w = 1 in groups whose longest right answer is longer than the wrong ones on average, or that have no
    right answer, else λ (ADORA, arXiv:2602.10019).

    A is GRPO's. Wrong answers count that ended before the longest length; without any, w = λ. This is the authors' rule
    for images and text; their rule for text alone is unverified.

    Args:
        statistics: as of ``grpo``.
        eps: ε, > 0.
        lambda_: λ ≥ 0.
    """

    lambda_: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("lambda_", self.lambda_, 0.0)

    def __call__(self, answers: Answers) -> Tensor:
        counted, group, length = self.counted(answers), answers.group, answers.length.double()
        right, wrong = counted & (answers.reward > RIGHT), counted & (answers.reward <= RIGHT) & answers.ended
        longest = group_largest(torch.where(right, length, -torch.inf), group)
        wrongs = group_total(wrong.double(), group)
        usual = torch.where(wrongs > 0, group_total(length * wrong, group) / wrongs.clamp(min=1.0), torch.inf)
        useful = (longest > usual) | (longest == -torch.inf)
        weight = torch.where(useful, torch.ones_like(length), self.lambda_)
        return (weight * self.normalised(answers.reward, answers)).to(answers.reward.dtype)


@dataclass(frozen=True)
class SignGate(AnswerAdvantage):
    """GRPO's advantage; from an iteration on, what is positive of it is multiplied by a number (two-stage view,
    arXiv:2510.04028).

    Late in training only what is worse than its group teaches. Unverified: when the paper switches.

    Args:
        statistics: as of ``grpo``.
        eps: ε, > 0.
        switch: the first iteration of the second stage, from 1.
        positive: in [0, 1]; 0 drops advantages above 0.
    """

    switch: int = 100
    positive: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("switch", self.switch, 1)
        check_range("positive", self.positive, 0.0, 1.0)

    def __call__(self, answers: Answers) -> Tensor:
        advantage = self.normalised(answers.reward, answers)
        if answers.iteration >= self.switch:
            advantage = torch.where(advantage > 0, self.positive * advantage, advantage)
        return advantage.to(answers.reward.dtype)


@dataclass(frozen=True)
class TruncatedAdvantage(AnswerAdvantage):
    """(R − μ)/(s + ε) with the deviation s of all rewards of the batch, and R = 0 for answers that were cut (DLER,
    arXiv:2510.15110).

    Args:
        statistics: as of ``batch_std``.
        eps: ε, > 0.
    """

    def __call__(self, answers: Answers) -> Tensor:
        reward = torch.where(answers.ended, answers.reward, 0.0)
        return BatchStd(self.statistics, self.eps)(reward, answers.group, answers.own)


@dataclass(frozen=True)
class RareFormatAdvantage(AnswerAdvantage):
    """GRPO with α(t)·R, α = n/F·(F/n + (1 − F/n)·(1 + cos(πt/T))/2) (Ada-GRPO of ARM, arXiv:2505.20258).

    F of a group's n answers have the format of this one. α falls from n/F at the beginning to 1 after T iterations.

    Args:
        statistics: as of ``grpo``.
        eps: ε, > 0.
        format: name of a reward that has equal numbers for answers of equal format; its weight may be 0.
        iterations: T ≥ 1; published as the length of the training. Unverified.
    """

    format: str = "format"
    iterations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("iterations", self.iterations, 1)

    def check_answers(self, rewards: Collection[str], size: int) -> None:
        check_reward(self.format, rewards)

    def __call__(self, answers: Answers) -> Tensor:
        counted, (index, _) = self.counted(answers), group_numbers(answers.group)
        kind = answer_part(answers, self.format).double()
        _, pair = torch.unique(torch.stack([index.double(), kind], 1), dim=0, return_inverse=True)
        same = group_total(counted.double(), pair).clamp(min=1.0)
        share = same / group_total(counted.double(), answers.group).clamp(min=1.0)
        passed = min(1.0, (answers.iteration - 1) / self.iterations)
        decay = share + (1 - share) * 0.5 * (1 + math.cos(math.pi * passed))
        return self.normalised(answers.reward * decay / share, answers).to(answers.reward.dtype)


@dataclass(frozen=True)
class BudgetAdvantage(AnswerAdvantage):
    """(mean of the subgroup − f(b)) + (R′ − μ)/(s + ε), with rewards by budget (HBPO, arXiv:2507.15844).

    A group is cut into as many subgroups as there are budgets, in the order of its answers. Of a right answer of n ≤ L
    tokens with the budget b, R′ = f(b) where n ≤ b, else f(n) − α·(n − b); f(x) = β·cos(πx/2L). Of all others R′ = 0.
    Published with the budget said to the model, "I will answer the question within b tokens". Nothing here says it: a
    data set whose prompts do so, with one budget per group, takes a single budget each.

    Args:
        statistics: as of ``grpo``.
        eps: ε, > 0.
        budgets: tokens, rising.
        limit: L, tokens.
        beta: β > 0; 4 in the authors' code.
        alpha: α ≥ 0, per token; 1/4096 in the authors' code.
    """

    budgets: tuple[int, ...] = (512, 1024, 2048, 2560)
    limit: int = 4096
    beta: float = 4.0
    alpha: float = 1 / 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "budgets", tuple(self.budgets))
        check_range("limit", self.limit, 1)
        check_range("beta", self.beta, 0.0, lower_open=True)
        check_range("alpha", self.alpha, 0.0)
        if not self.budgets or sorted(set(self.budgets)) != list(self.budgets) or self.budgets[0] < 1:
            raise UsageError(f"`budgets` is {list(self.budgets)}; expected rising numbers of tokens, from 1.")

    def __call__(self, answers: Answers) -> Tensor:
        group, length, many = answers.group, answers.length.double(), len(self.budgets)
        size = group_total(torch.ones_like(group), group)
        subgroup = group_places(group) * many // size
        budget = torch.tensor(self.budgets, dtype=torch.float64, device=group.device)[subgroup]
        above = self.curve(length) - self.alpha * (length - budget)
        right = (answers.reward > RIGHT) & (length <= self.limit)
        reward = torch.where(right, torch.where(length <= budget, self.curve(budget), above), 0.0)
        index, _ = group_numbers(group)
        within = group_statistics(reward, index * many + subgroup, self.counted(answers)).mean - self.curve(budget)
        return (within + self.normalised(reward, answers)).to(answers.reward.dtype)

    def curve(self, tokens: Tensor) -> Tensor:
        """f of numbers of tokens."""
        return self.beta * torch.cos(math.pi / 2 * tokens / self.limit)


@dataclass(frozen=True)
class TemperedAdvantage(AnswerAdvantage):
    """(1 − a)·A + a·w on right answers, (1 − a)·A on others, w = π_T/π the ratio to the policy at another temperature
    (DCPO, arXiv:2601.12730).

    A is GRPO's. With the mean entropy H of the iteration, T is ``hot`` where H ≤ ``target``, else ``cold``, and
    a = min(|H − target|, cap)/(rate of success), at most 1. Unverified as a whole. π_T/π needs the whole vocabulary at
    every place; here it is taken of an answer, w = exp((1/T − 1)·m) over its mean over the answers, m the mean
    log-probability of the answer's tokens.

    Args:
        statistics: as of ``grpo``.
        eps: ε, > 0.
        target: entropy, nats per token.
        cap: > 0.
        hot: T > 1.
        cold: T in (0, 1).
    """

    target: float = 0.5
    cap: float = 0.1
    hot: float = 1.2
    cold: float = 0.8

    reads = frozenset({"mean_logp", "mean_entropy"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("target", self.target, 0.0)
        check_range("cap", self.cap, 0.0, lower_open=True)
        check_range("hot", self.hot, 1.0, lower_open=True)
        check_range("cold", self.cold, 0.0, 1.0, lower_open=True, upper_open=True)

    def __call__(self, answers: Answers) -> Tensor:
        counted, length = answers.own, answers.length.double() * answers.own
        entropy = (answer_field(answers, "mean_entropy") * length).sum() / length.sum().clamp(min=1.0)
        many = counted.sum().clamp(min=1)
        right = counted & (answers.reward > RIGHT)
        rate = right.sum().double() / many
        share = torch.where(rate > 0, (entropy - self.target).abs().clamp(max=self.cap) / rate, 0.0).clamp(max=1.0)
        power = torch.where(entropy <= self.target, torch.full_like(entropy, 1 / self.hot - 1), 1 / self.cold - 1)
        tilt = torch.where(counted, (power * answer_field(answers, "mean_logp")).exp(), 0.0)
        weight = tilt * many / tilt.sum().clamp(min=1e-300)
        advantage = (1 - share) * self.normalised(answers.reward, answers) + share * torch.where(right, weight, 0.0)
        return advantage.to(answers.reward.dtype)
