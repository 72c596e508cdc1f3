"""HPT's choice between reinforcement and a demonstration, problem by problem (arXiv:2509.04419)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_range
from offpolicy.losses.advantages import group_statistics
from offpolicy.losses.answers import Answers, Judged
from offpolicy.losses.tokens import Tokens, Totals, column

EIGHTHS = 8  # answers of a problem in the authors' scripts
OWN_WEIGHT = (1.0, 0.0, 0.125, 0.25, 0.5, 1.0, 1.0, 1.0, 1.0)  # by right answers of eight, from the authors' code
SFT_WEIGHT = (1.0, 1.0, 0.5, 0.25, 0.125, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class HybridAdvantage:
    """R − mean of the own answers, with s ≤ ``gate`` right ones none of them but the demonstration, by its likelihood.

    With gate < s ≤ ``gate_off`` the demonstration stands beside the own answers as another answer, with R − their mean.
    Else it is left out. A problem without a demonstration keeps its answers. ``weight`` of a demonstration says how far
    it counts in the term ``hybrid_sft``.

    Args:
        gate: right answers of a problem, ≥ −1 (never a demonstration); 0 in the authors' scripts for Qwen, 2 for Llama.
        gate_off: ≥ ``gate``; None for ``gate``, as in all scripts.
        soft: in place of the gates the weights of the authors' code by s of eight own answers, own 1 (s = 0), 0, ⅛, ¼,
            ½, 1 … and demonstration 1, 1, ½, ¼, ⅛, 0 …; of n answers by 8s/n rounded up, which is ours.
        success: reward from which an answer is right.
    """

    gate: int = 0
    gate_off: int | None = None
    soft: bool = False
    success: float = 1.0

    takes_answers: ClassVar[bool] = True
    gives: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __post_init__(self) -> None:
        check_range("gate", self.gate, -1)
        check_range("gate_off", self.gate if self.gate_off is None else self.gate_off, self.gate)
        check_range("success", self.success)
        if self.soft and (self.gate_off is not None or self.gate != 0):
            raise UsageError("`soft` takes the place of `gate` and `gate_off`; expected one or the other.")

    def __call__(self, answers: Answers) -> Judged:
        own = answers.own
        right = ((answers.reward >= self.success) & own).to(answers.reward)
        _, index = torch.unique(answers.group, return_inverse=True)

        def total(x: Tensor) -> Tensor:
            return x.new_zeros(len(x)).index_add_(0, index, x)[index]

        solved, asked, shown = total(right), total(own.to(right)), total((~own).to(right)) > 0
        advantage = group_statistics(answers.reward, answers.group, own).centred.to(answers.reward)
        if self.soft:
            place = torch.ceil(EIGHTHS * solved / asked.clamp(min=1.0)).long()
            mine, weight = (advantage.new_tensor(one)[place] for one in (OWN_WEIGHT, SFT_WEIGHT))
            beside = torch.zeros_like(own)
        else:
            gate_off = self.gate if self.gate_off is None else self.gate_off
            weight = (solved <= self.gate).to(advantage)
            mine, beside = 1 - weight, (solved > self.gate) & (solved <= gate_off)
        mine, weight = torch.where(shown, mine, 1.0), torch.where(own, 0.0, weight)
        factor = torch.where(own, mine, beside.to(mine))
        return Judged(advantage * factor, torch.where(own, mine > 0, (weight > 0) | beside), weight)


@dataclass(frozen=True)
class HybridLikelihood:
    """coef times Σ weight·(−ℓ) over the tokens of the demonstrations that have a weight, divided by their number.

    Over the whole step; 0 where there are none. The authors' code takes the mean of a micro-batch, which depends on how
    a step is cut, and is NaN where that has no demonstration.

    Args:
        coef: ≥ 0; 1 in the authors' scripts, 0.3 for the model of 1.5 billion weights.
    """

    coef: float = 1.0

    columns: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __post_init__(self) -> None:
        check_range("coef", self.coef, 0.0)

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        return {"count": (step.outside & (column(step, "weight") > 0)[:, None]).sum().clamp(min=1)}

    def __call__(self, tokens: Tokens, totals: Totals, *, iteration: int) -> Tensor:
        assert tokens.step is not None
        weight = column(tokens, "weight").to(tokens.logp)[:, None]
        total = torch.where(tokens.outside, tokens.logp * weight, 0.0).sum()
        return -self.coef * total / tokens.step["count"]
