"""The slot ``advantage``: what a group or the iteration is compared with, other than its mean and deviation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_choice, check_range
from offpolicy.losses.advantages import GRPO, group_statistics
from offpolicy.losses.answers import Answers, Judged
from offpolicy.losses.policy.anchors import Coefficient, check_coefficient, coefficient
from offpolicy.losses.policy.groups import (
    AnswerAdvantage,
    answer_field,
    answer_part,
    check_reward,
    group_largest,
    group_median,
    group_numbers,
    group_places,
    group_ranks,
    group_total,
    success_rates,
)


@dataclass(frozen=True)
class SplitGRPO(GRPO):
    """As GRPO, with μ and s of the group's own answers alone, for demonstrations too (``statistics: own``)."""

    statistics: str = "own"


@dataclass(frozen=True)
class MedianAdvantage(AnswerAdvantage):
    """(R − median)/(MAD + ε), MAD the median of |R − median|; the answer at the median is left out (MC-GRPO,
    arXiv:2601.22582).

    Groups have an odd number of answers, one more than are learned from. Of several at the median the first is left
    out. Where most rewards of a group are equal MAD is 0, and the others have (R − median)/ε.

    Args:
        statistics: as of ``grpo``.
        eps: ε, > 0.
        rescale: multiply by n/n′ with n′ answers of the group that are not 0, as the authors' code does; the paper, and
            the default, do not.
    """

    eps: float = 1e-3
    rescale: bool = False

    def __call__(self, answers: Answers) -> Judged:
        reward, counted, group = answers.reward.double(), self.counted(answers), answers.group
        size = group_total(counted.long(), group)
        for even in size[counted & (size % 2 == 0)][:1]:
            self._check_odd(int(even))
        off = reward - group_median(reward, group, counted)
        advantage = off / (group_median(off.abs(), group, counted) + self.eps)
        if self.rescale:
            moved = group_total((counted & (off != 0)).double(), group)
            advantage = advantage * size / moved.clamp(min=1.0)
        candidate = counted & (off == 0)
        pivot = candidate & (group_ranks((~candidate).long(), group) == 0)
        return Judged(advantage.to(answers.reward.dtype), ~pivot)

    def check_answers(self, rewards: Collection[str], size: int) -> None:
        if self.statistics == "all":
            self._check_odd(size)

    def _check_odd(self, size: int) -> None:
        if size % 2 == 0:
            raise UsageError(
                f"a group has {size} answers, of which none is the median; expected an odd number for 'median'. Pass "
                f"--model.group_size {size + 1} and a --model.batch_size that is a multiple of it."
            )


@dataclass(frozen=True)
class NegativeGRPO(GRPO):
    """(R − μ)/(s + ε) with μ and s over the group and one more answer of the best reward (NGRPO,
    arXiv:2509.18851).

    A group of n wrong answers has −1/√(n + 1) each, one of right answers 0.

    Args:
        statistics: as of ``grpo``.
        eps: ε, > 0; the authors' code has 1e-6.
        best: the best reward that there is.
    """

    eps: float = 1e-6
    best: float = 1.0

    def __call__(self, rewards: Tensor, group: Tensor, own: Tensor) -> Tensor:
        found = self.groups(rewards, group, own)
        mean = found.mean + (self.best - found.mean) / (found.size + 1.0)  # exactly `best` where all have it
        squares = found.std.square() * (found.size - 1.0).clamp(min=0.0) + found.size * (found.mean - mean).square()
        std = ((squares + (self.best - mean).square()) / found.size.clamp(min=1.0)).sqrt()
        return ((found.reward - mean) / (std + self.eps)).to(rewards.dtype)


@dataclass(frozen=True)
class BetaAdvantage(AnswerAdvantage):
    """(R − p)/Beta(p; α, β), p the group's mean reward, 1/Beta at most 1e6 (BNPO, arXiv:2506.02864).

    α = max(1, 1 + a/3) and β = max(1, 1 + b/3), with a and b of the beta distribution that has mean and sample variance
    of the groups' p: a = (m(1 − m)/v − 1)·m, b = (m(1 − m)/v − 1)·(1 − m). With one group, or all p equal, there is
    nothing to fit: 1/Beta is 1. Another thing is TRL's loss type "bnpo", a mean over tokens.

    Args:
        statistics: as of ``grpo``.
        eps: without influence.
        low: the worst reward; ``low`` to ``high`` is mapped to [0, 1].
        high: the best reward.
        parts: take every reward by itself, all within ``low`` to ``high``, and average their advantages.
    """

    low: float = 0.0
    high: float = 1.0
    parts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("high", self.high, self.low, lower_open=True)

    def __call__(self, answers: Answers) -> Tensor:
        rewards = list(answers.parts.values()) if self.parts else [answers.reward]
        found = [self.of(answers._replace(reward=(x.double() - self.low) / (self.high - self.low))) for x in rewards]
        return torch.stack(found).mean(0).to(answers.reward.dtype)

    def of(self, answers: Answers) -> Tensor:
        counted = self.counted(answers)
        reward = success_rates(answers, counted)
        p = group_statistics(reward, answers.group, counted).mean
        rates = p[group_places(answers.group) == 0]  # one per group
        mean, spread = rates.mean(), rates.var() if len(rates) > 1 else torch.zeros_like(rates.sum())
        excess = torch.where(spread > 0, mean * (1 - mean) / spread - 1, 0.0)
        alpha, beta = (1 + excess * mean / 3).clamp(min=1.0), (1 + excess * (1 - mean) / 3).clamp(min=1.0)
        log_norm = torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)
        density = (log_norm + torch.xlogy(alpha - 1, p) + torch.xlogy(beta - 1, 1 - p)).exp()
        return (1 / density).clamp(0.0, 1e6) * (reward - p)


@dataclass(frozen=True)
class NormBaseline(AnswerAdvantage):
    """R − b with b = Σw²‖g‖²R/Σw²‖g‖² over the group, the constant for which the importance-weighted gradient varies
    least (OPOB of VCPO, arXiv:2602.17616); w = exp Σ_t(ℓ_k − ℓ_b), not bounded.

    g is the gradient of the answer's log-probability. The authors make a backward pass for each answer and take all
    weights. Ours is the gradient by the output layer's weight alone, from the states of one forward pass, under the
    policy at the start of the iteration: what the first step has, and later ones no longer quite. Where Σw²‖g‖² is 0, b
    is the mean.

    Args:
        statistics: as of ``grpo``.
        eps: with ``std``, groups of a deviation up to it are not divided; 1e-8 in the authors' code.
        std: divide by the population deviation of the group's rewards, as the authors' code does where that is asked.
    """

    eps: float = 1e-8
    std: bool = False

    reads: ClassVar[frozenset[str]] = frozenset({"log_weight", "head_norm"})

    def __call__(self, answers: Answers) -> Tensor:
        counted, group = self.counted(answers), answers.group
        found = group_statistics(answers.reward, group, counted)
        log_weight = torch.where(counted, answer_field(answers, "log_weight"), -torch.inf)
        largest = group_largest(log_weight, group).clamp(min=torch.finfo(torch.float64).min)  # of no row: no number
        square = (2 * (log_weight - largest)).exp() * answer_field(answers, "head_norm").square()
        square = torch.where(counted, square, 0.0)
        total, moment = group_total(square, group), group_total(square * found.centred, group)
        advantage = found.centred - torch.where(total > 0, moment / total, 0.0)
        if self.std:
            spread = found.std * ((found.size - 1).clamp(min=0.0) / found.size.clamp(min=1.0)).sqrt()
            advantage = advantage / torch.where(spread > self.eps, spread, 1.0)
        return advantage.to(answers.reward.dtype)


@dataclass(frozen=True)
class ConditionalAdvantage(AnswerAdvantage):
    """μ·(R − mean of the other half) + (1 − μ)·(R − mean of the own half), a group's halves by a metric (CANON,
    arXiv:2509.23962).

    The half with the larger metric has the smaller number of answers where that is odd. With μ = ½ and equal halves it
    is Dr. GRPO. Unverified: the published schedules of μ, and the factor .9 beside length.

    Args:
        statistics: as of ``grpo``.
        eps: without influence.
        metric: "entropy", the mean over the tokens of an answer under the policy that drew it, or "length", in tokens.
        mu: μ in [0, 1], or knots (iteration, μ), linear between them.
    """

    metric: str = "entropy"
    mu: Coefficient = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("metric", self.metric, ("entropy", "length"))
        check_coefficient("mu", self.mu)
        for value in [self.mu] if isinstance(self.mu, int | float) else [knot[1] for knot in self.mu]:
            check_range("mu", value, 0.0, 1.0)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"mean_entropy"} if self.metric == "entropy" else ())

    def __call__(self, answers: Answers) -> Tensor:
        counted, group = self.counted(answers), answers.group
        metric = answer_field(answers, "mean_entropy") if self.metric == "entropy" else answers.length.double()
        size = group_total(counted.long(), group)
        upper = group_ranks(torch.where(counted, metric, torch.inf), group) >= (size + 1) // 2
        above, below = (group_statistics(answers.reward, group, counted & half).mean for half in (upper, ~upper))
        own, other = torch.where(upper, above, below), torch.where(upper, below, above)
        mu, reward = coefficient(self.mu, answers.iteration), answers.reward.double()
        return (mu * (reward - other) + (1 - mu) * (reward - own)).to(answers.reward.dtype)


@dataclass(frozen=True)
class ConsistencyAdvantage(AnswerAdvantage):
    """w·A + (1 − w)·(g − mean g)/(std g + ε), g of the group against all groups, w = σ(γ(H − ρ)) (COPO,
    arXiv:2508.04138).

    A is GRPO's. H is the entropy of the answers of a group, in bits: consistent groups, which GRPO learns nothing from,
    are compared with other groups. g is the group's mean reward. The authors' code has the terms with w and 1 − w as
    two clipped losses; here their advantages are added. Unverified: which way w runs in the paper.

    Args:
        statistics: as of ``grpo``.
        eps: ε, > 0, of both; the authors' code has 1e-6.
        gamma: γ ≥ 0; 20 in the runs with 7B, 5 in those with 3B.
        rho: ρ, bits; .5 in the runs with 7B, 1 in those with 3B.
        answer: name of a reward that has equal numbers for equal answers of a group; empty takes answers of equal
            reward as equal.
        consistency: multiply g by 1 − H·(1 − 1/n)/log₂ n for n answers, which the published runs leave out.
    """

    eps: float = 1e-6
    gamma: float = 20.0
    rho: float = 0.5
    answer: str = ""
    consistency: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("gamma", self.gamma, 0.0)

    def check_answers(self, rewards: Collection[str], size: int) -> None:
        if self.answer:
            check_reward(self.answer, rewards)

    def __call__(self, answers: Answers) -> Tensor:
        counted, group = self.counted(answers), answers.group
        kind = answer_part(answers, self.answer) if self.answer else answers.reward
        entropy, size = outcome_entropy(kind, group, counted), group_total(counted.double(), group)
        level = group_statistics(answers.reward, group, counted).mean
        if self.consistency:
            level = level * (1 - entropy * (1 - 1 / size.clamp(min=1.0)) / size.clamp(min=2.0).log2())
        levels = level[group_places(group) == 0]
        spread = levels.std() if len(levels) > 1 else torch.zeros_like(levels.sum())
        weight = torch.sigmoid(self.gamma * (entropy - self.rho))
        local, across = self.normalised(answers.reward, answers), (level - levels.mean()) / (spread + self.eps)
        return (weight * local + (1 - weight) * across).to(answers.reward.dtype)


def outcome_entropy(kind: Tensor, group: Tensor, counted: Tensor) -> Tensor:
    """The entropy of the numbers of a group, bits, (B,) float64.

    Args:
        kind: (B,), equal for equal outcomes.
        group: (B,) int64.
        counted: (B,) bool, rows that enter.
    """
    index, _ = group_numbers(group)
    _, pair = torch.unique(torch.stack([index.double(), kind.double()], 1), dim=0, return_inverse=True)
    size = group_total(counted.double(), group)
    share = group_total(counted.double(), pair) / size.clamp(min=1.0)
    return -group_total(torch.where(counted, share.clamp(min=1e-300).log2() / size.clamp(min=1.0), 0.0), group)


@dataclass(frozen=True)
class AsymmetricGRPO(AnswerAdvantage):
    """ω/2·z/√p + (1 − ω)/2·z/√(1 − p), times min(1, ω/α) where it is positive (A-GRAE, arXiv:2602.05548).

    z is the advantage of GRPO, p the group's rate of success, ω the mean reward of the iteration: from easy problems to
    hard ones as the policy improves, and answers that are right count less while few are.

    Args:
        statistics: as of ``grpo``.
        eps: ε of z, > 0; the authors' code has 1e-6.
        alpha: α, in (0, 1]; 1 for mathematics, .5 for geometry and medicine in the authors' code. The paper's type
            leaves open whether it divides; the code divides.
        form: "paper"; or "code", which has 1 − √p in place of √(1 − p).
    """

    alpha: float = 1.0
    form: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0.0, 1.0, lower_open=True)
        check_choice("form", self.form, ("paper", "code"))

    def __call__(self, answers: Answers) -> Tensor:
        counted = self.counted(answers)
        reward = success_rates(answers, counted)
        p = group_statistics(reward, answers.group, counted).mean
        level = reward[counted].mean() if self.statistics == "own" else reward.mean()
        z = self.normalised(reward, answers)
        rest = (1 - p).sqrt() if self.form == "paper" else 1 - p.sqrt()
        signal = (p > 0) & (p < 1)  # elsewhere a group's own answers say nothing
        hard, easy = (torch.where(signal, z / torch.where(signal, by, 1.0), 0.0) for by in (p.sqrt(), rest))
        advantage = (level * hard + (1 - level) * easy) / 2
        shrunk = advantage * (level / self.alpha).clamp(max=1.0)
        return torch.where(advantage > 0, shrunk, advantage).to(answers.reward.dtype)
