"""EMPG: the steps of an answer by their entropy, in the slots ``weight`` and ``terms``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from offpolicy.errors import check_choice, check_range
from offpolicy.losses.tokens import Tokens, Totals, column, difference, field, per_token

STEPS = ("turn", "segment", "answer")


class EntropySteps(NamedTuple):
    """The steps of the answers of a step of the optimiser.

    Attributes:
        number: (B, T) int64, the number of a token's step within its answer; 0 outside.
        real: (B, T) bool, whether the answer has a step of this number.
        entropy: (B, T), of the step of this number: its mean over the step's tokens, mapped to [0, 1] by the least and
            the largest of all steps.
    """

    number: Tensor
    real: Tensor
    entropy: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all steps, 0-d."""
        return torch.where(self.real, x, 0.0).sum() / self.real.sum().clamp(min=1)

    def of_tokens(self, x: Tensor) -> Tensor:
        """(B, T): what each token's step has."""
        return x.gather(1, self.number)


def step_numbers(kept: Tensor, number: Tensor) -> Tensor:
    """Of each kept token the number of its step within its answer, from 0; 0 elsewhere, (B, T) int64.

    Args:
        kept: (B, T) bool.
        number: (B, T) int64; a step is a run of kept tokens with equal numbers, whatever stands between them.
    """
    place = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
    last = torch.where(kept, place, -1).cummax(1).values  # the last kept token up to here
    before = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)
    begins = kept & ((before < 0) | (number != number.gather(1, before.clamp(min=0))))
    return torch.where(kept, begins.long().cumsum(1) - 1, 0)


def step_means(x: Tensor, index: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the kept tokens of each step, (B, T) by its number, 0 where there is none; and whether there is."""
    size = torch.zeros_like(x).scatter_add(1, index, kept.to(x))
    total = torch.zeros_like(x).scatter_add(1, index, torch.where(kept, x, 0.0))
    return total / size.clamp(min=1.0), size > 0


def find_steps(tokens: Tokens, by: str) -> EntropySteps:
    """The steps of answers: runs of tokens with equal numbers in a column, or whole answers."""
    kept, entropy = tokens.kept, field(tokens, "entropy").detach()
    index = step_numbers(kept, torch.zeros_like(kept, dtype=torch.int64) if by == "answer" else column(tokens, by))
    mean, real = step_means(entropy, index, kept)
    least = torch.where(real, mean, torch.inf).amin()
    spread = torch.where(real, mean, -torch.inf).amax() - least
    return EntropySteps(index, real, torch.where(real, (mean - least) / (spread + 1e-8), 0.0))


@dataclass(frozen=True)
class StepEntropyWeight:
    """g = exp(−k·Ĥ) over its mean over all steps, Ĥ the entropy of a token's step, mapped to [0, 1] over the steps of
    all answers (EMPG, arXiv:2509.09265, Eq. 10 and 12).

    Certain steps move further than uncertain ones. The paper takes the entropy under the policy that drew the answers;
    here it is that of the policy being trained, the same at the first step of an iteration.

    Args:
        k: ≥ 0; 0 is no weight.
        by: what a step is: a run of tokens of one "turn" or "segment", or the whole "answer".
    """

    k: float = 1.0
    by: str = "turn"

    reads_values = frozenset({"entropy"})

    def __post_init__(self) -> None:
        check_range("k", self.k, 0.0)
        check_choice("by", self.by, STEPS)

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({self.by} - {"answer"})

    def step_facts(self, step: Tokens) -> Mapping[str, Tensor]:
        steps = find_steps(step, self.by)
        return {"weight": steps.of_tokens(self.scale(steps))}

    def scale(self, steps: EntropySteps) -> Tensor:
        """g of each step, (B, T)."""
        weight = (-self.k * steps.entropy).exp()
        return weight / steps.mean(weight).clamp(min=1e-8)

    def __call__(self, tokens: Tokens) -> Tensor:
        facts = self.step_facts(tokens) if tokens.step is None else tokens.step
        return torch.where(tokens.own, facts["weight"], 1.0)


@dataclass(frozen=True)
class ClarityBonus:
    """−mean over tokens of ρ·(ζ·f − c), f = exp(−k′·Ĥ) of the next step, 0 after the last, c the mean over all steps of
    A·g + ζ·f (EMPG, arXiv:2509.09265, Eq. 8, 11 and 13).

    With the weight ``empg`` of the same ``k`` and ``by``, the advantage of a token is A·g + ζ·f − c. This part of it is
    not clipped. Its mean is over the tokens of the step of the optimiser; take ``token_mean`` for the policy's.

    Args:
        zeta: ζ ≥ 0; .05 in a public implementation. Unverified.
        k_future: k′ ≥ 0.
        k: of the weight ``empg``.
        by: of the weight ``empg``.
    """

    zeta: float = 0.05
    k_future: float = 1.0
    k: float = 1.0
    by: str = "turn"

    reads_values = frozenset({"entropy"})

    def __post_init__(self) -> None:
        check_range("zeta", self.zeta, 0.0)
        check_range("k_future", self.k_future, 0.0)
        StepEntropyWeight(self.k, self.by)

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({self.by} - {"answer"})

    def step_facts(self, step: Tokens) -> Mapping[str, Tensor]:
        steps = find_steps(step, self.by)
        clear = torch.where(steps.real, (-self.k_future * steps.entropy).exp(), 0.0)
        following = torch.cat([clear[:, 1:], torch.zeros_like(clear[:, :1])], 1)
        scale = StepEntropyWeight(self.k, self.by).scale(steps)
        advantage = per_token(step.advantage).expand(scale.shape)
        of_steps, _ = step_means(advantage, steps.number, step.kept)
        center = steps.mean(of_steps * scale + self.zeta * following)
        return {"bonus": self.zeta * steps.of_tokens(following) - center}

    def __call__(self, tokens: Tokens, totals: Totals, *, iteration: int) -> Tensor:
        facts = self.step_facts(tokens) if tokens.step is None else tokens.step
        ratio = difference(tokens.logp, tokens.behavior_logp, tokens.own).exp()
        return -torch.where(tokens.own, ratio * facts["bonus"], 0.0).sum() / max(totals.tokens, 1)
