"""DRPO and DisCO: right answers of a group against its wrong ones, in the slots ``advantage`` and ``terms``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from offpolicy.errors import check_range
from offpolicy.losses.answers import Answers
from offpolicy.losses.policy.groups import RIGHT, AnswerAdvantage, group_largest, group_total
from offpolicy.losses.tokens import Tokens, Totals, column, difference


@dataclass(frozen=True)
class ShortnessAdvantage(AnswerAdvantage):
    """n·softmax((1 − length/L)/λ) over the right answers of a group of n; 0 for wrong ones, and in groups without both
    (DRPO, arXiv:2510.04474).

    With ``ratio`` and ``trust`` "none" and ``aggregation`` "seq_mean_token_mean" it is the part of the objective for
    right answers, Σ w·(mean log-probability) averaged over the groups; ``drpo_contrast`` is that for wrong ones.

    Args:
        statistics: as of ``grpo``.
        eps: without influence.
        lambda_: λ > 0; ∞ weighs all right answers alike. .1 in the authors' code.
        max_length: L, the longest answer that may be drawn, tokens; 0 takes the longest of the iteration.
    """

    lambda_: float = 0.1
    max_length: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("lambda_", self.lambda_, 0.0, lower_open=True, infinite=True)
        check_range("max_length", self.max_length, 0)

    def __call__(self, answers: Answers) -> Tensor:
        counted, group = self.counted(answers), answers.group
        right, wrong = counted & (answers.reward > RIGHT), counted & (answers.reward <= RIGHT)
        longest = float(self.max_length) if self.max_length else answers.length.double().max()
        score = torch.where(right, (1 - answers.length.double() / longest) / self.lambda_, -torch.inf)
        best = group_largest(score, group)
        mass = torch.where(right, (score - torch.where(right, best, 0.0)).exp(), 0.0)
        rights, wrongs = (group_total(x.double(), group) for x in (right, wrong))
        weight = mass / group_total(mass, group).clamp(min=1.0)  # the best has mass 1
        contrast = right & (rights > 0) & (wrongs > 0)
        return torch.where(contrast, weight * (rights + wrongs), 0.0).to(answers.reward.dtype)


@dataclass(frozen=True)
class WrongAnswers:
    """τ·log mean exp(s/τ) over the wrong answers of a group, s the mean log-probability of an answer's tokens; averaged
    over the groups of the step, 0 for groups without both (DRPO, arXiv:2510.04474; DisCO, arXiv:2505.12366).

    Args:
        tau: τ > 0; large numbers weigh wrong answers alike, small ones the likeliest. 10 in the authors' code.
    """

    tau: float = 10.0

    columns = frozenset({"group", "reward"})
    whole_groups = True

    def __post_init__(self) -> None:
        check_range("tau", self.tau, 0.0, lower_open=True)

    def step_facts(self, step: Tokens) -> Mapping[str, Tensor]:
        same = _same_group(step)
        return {"groups": (same.any(-1).to(step.mask) / same.sum(-1).clamp(min=1)).sum().round()}

    def __call__(self, tokens: Tokens, totals: Totals, *, iteration: int) -> Tensor:
        same, reward = _same_group(tokens), column(tokens, "reward")
        mean_logp = torch.where(tokens.kept, tokens.logp, 0.0).sum(-1) / tokens.mask.sum(-1).clamp(min=1.0)
        wrong, right = same & (reward <= RIGHT), same & (reward > RIGHT)  # [i, j]: j is a wrong answer of i's group
        wrongs = wrong.sum(-1)
        scores = torch.where(wrong, (mean_logp / self.tau)[None, :], torch.finfo(mean_logp.dtype).min)
        level = self.tau * (scores.logsumexp(-1) - wrongs.clamp(min=1).log())
        counted = (wrongs > 0) & right.any(-1) & (reward <= RIGHT)
        share = torch.where(counted, level / wrongs.clamp(min=1), 0.0).sum()  # each group once, over its wrong answers
        groups = self.step_facts(tokens)["groups"] if tokens.step is None else tokens.step["groups"]
        return share / groups.to(share).clamp(min=1.0)


@dataclass(frozen=True)
class DivergenceLimit:
    """β·max(K − δ, 0)·K with the factor before K held fast, K = KL(π_k ‖ π_θ) averaged over the own tokens of the step
    (DisCO, arXiv:2505.12366; DRPO, arXiv:2510.04474).

    K is estimated by e^d − 1 − d with d = log π_θ − log π_k.

    Args:
        delta: δ ≥ 0, nats per token.
        beta: β ≥ 0.
    """

    delta: float = 1e-4
    beta: float = 1e3

    def __post_init__(self) -> None:
        check_range("delta", self.delta, 0.0)
        check_range("beta", self.beta, 0.0)

    def step_facts(self, step: Tokens) -> Mapping[str, Tensor]:
        divergence, own = self._of(step), step.own
        return {"tokens": own.sum(), "divergence": divergence.sum() / own.sum().clamp(min=1)}

    def __call__(self, tokens: Tokens, totals: Totals, *, iteration: int) -> Tensor:
        facts = self.step_facts(tokens) if tokens.step is None else tokens.step
        factor = self.beta * (facts["divergence"].detach() - self.delta).clamp(min=0.0)
        return factor * self._of(tokens).sum() / facts["tokens"].clamp(min=1)

    def _of(self, tokens: Tokens) -> Tensor:
        d = difference(tokens.logp, tokens.previous_logp, tokens.own)
        return torch.expm1(d) - d


def _same_group(tokens: Tokens) -> Tensor:
    """(R, R) bool: rows that are answers of one group; nothing for padding."""
    group, real = column(tokens, "group"), tokens.kept.any(-1)
    return (group[:, None] == group[None, :]) & real[:, None] & real[None, :]
