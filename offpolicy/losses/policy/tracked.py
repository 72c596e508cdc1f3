"""The slot ``advantage``: comparisons with what was seen in earlier iterations, which is kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_choice, check_range
from offpolicy.losses.advantages import group_statistics
from offpolicy.losses.answers import Answers, Judged
from offpolicy.losses.policy.groups import group_numbers, group_places, group_total

SUMS = ("paper", "code")


@dataclass
class Tracked:
    """What advantages with a memory share: it changes at their call alone, of which every process makes the same."""

    memory: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    takes_answers = True

    def state_dict(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self.memory.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory = {name: torch.as_tensor(value, dtype=torch.float64, device="cpu") for name, value in state.items()}


@dataclass
class RunningBaseline(Tracked):
    """R − b with the running mean reward b, b ← κ·b + (1 − κ)·(mean reward of the iteration) (REINFORCE).

    For one answer per problem as for groups. The mean reward of the first iteration is its baseline.

    Args:
        decay: κ in [0, 1).
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        check_range("decay", self.decay, 0.0, 1.0, upper_open=True)

    def __call__(self, answers: Answers) -> Tensor:
        reward = answers.reward.double()
        own = reward[answers.own] if bool(answers.own.any()) else reward
        baseline = self.memory.get("baseline", own.mean().cpu())
        self.memory["baseline"] = self.decay * baseline + (1 - self.decay) * own.mean().cpu()
        return (reward - baseline.to(reward.device)).to(answers.reward.dtype)


@dataclass
class MedianOfGroups(Tracked):
    """R − P50, the median of the mean rewards of recent groups; answers below are left out (SPEAR, arXiv:2509.22601).

    The groups of this iteration are among the recent ones. Published for the replay of successes alone. The authors'
    code keeps answers at P50, which have no advantage and pay for terms beside the policy's.

    Args:
        capacity: groups that are remembered, ≥ 1; the oldest are forgotten.
        normalize: divide by the median of their deviations too, where that is above 0.
    """

    capacity: int = 10240
    normalize: bool = False

    def __post_init__(self) -> None:
        check_range("capacity", self.capacity, 1)

    def __call__(self, answers: Answers) -> Judged:
        found = group_statistics(answers.reward, answers.group, answers.own)
        first = group_places(answers.group) == 0
        for name, value in (("means", found.mean), ("deviations", found.std)):
            before = self.memory.get(name, torch.zeros(0, dtype=torch.float64, device="cpu"))
            self.memory[name] = torch.cat([before, value[first].cpu()])[-self.capacity :]
        middle = {name: value.sort().values for name, value in self.memory.items()}
        level, spread = ((x[(len(x) - 1) // 2] + x[len(x) // 2]).to(found.mean.device) / 2 for x in middle.values())
        advantage = found.reward - level
        kept = advantage >= 0
        if self.normalize:
            advantage = advantage / torch.where(spread > 0, spread, 1.0)
        return Judged(advantage.to(answers.reward.dtype), kept)


@dataclass
class RiskAdvantage(Tracked):
    """(1 + ω)·min(S − q_α, 0) + clip(S, q_α, q_β) − q_β, S the rewards of a bundle (RiskPO, arXiv:2510.00911).

    A bundle is the j-th answer to each of B problems; all its answers share its advantage. The last bundle takes what
    problems are left; a bundle with fewer than B answers has their mean times B as S. The quantiles are tracked,
    q_s ← q_s + η·(s − mean 1[S < q_s]), after they were used; at first they are those of the first iteration. Published
    with one ratio per answer (``sequence``).

    The authors' code, ``form`` "code", divides the terms by α and by β − α, adds them as (w·lower + middle)/(w + 1)
    with w = 1 + ω, and divides by the deviation of S over the bundles of the same problems plus 1e-6.

    Args:
        alpha: α, the lower level, in (0, 1).
        beta: β, the upper level, in (α, 1).
        bundle: B, problems, ≥ 1.
        omega: ω ≥ 0; published from .5 to 1.5, .5 in the authors' scripts (w 1.5).
        rate: η > 0.
        form: "paper" or "code".
    """

    alpha: float = 0.2
    beta: float = 0.8
    bundle: int = 5
    omega: float = 0.5
    rate: float = 0.1
    form: str = "paper"

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0.0, 1.0, lower_open=True, upper_open=True)
        check_range("beta", self.beta, self.alpha, 1.0, lower_open=True, upper_open=True)
        check_range("bundle", self.bundle, 1)
        check_range("omega", self.omega, 0.0)
        check_range("rate", self.rate, 0.0, lower_open=True)
        check_choice("form", self.form, SUMS)

    def __call__(self, answers: Answers) -> Tensor:
        reward = answers.reward.double()
        problems = group_numbers(answers.group)[0] // self.bundle
        place = group_places(answers.group)
        paper = problems * (place.max() + 1) + place if len(place) else place
        score = group_total(reward, paper) * (self.bundle / group_total(torch.ones_like(reward), paper))
        scores = score[group_places(paper) == 0].cpu()  # one per bundle
        levels = torch.tensor([self.alpha, self.beta], dtype=torch.float64, device="cpu")
        quantiles = self.memory.get("quantiles", torch.quantile(scores, levels))
        low, high = quantiles.to(score.device)
        lower, middle = (score - low).clamp(max=0.0), torch.minimum(torch.maximum(score, low), high) - high
        if self.form == "paper":
            advantage = (1 + self.omega) * lower + middle
        else:
            weight, spread = 1 + self.omega, self._spread(score, problems, place)
            mixed = weight * lower / (self.alpha + 1e-6) + middle / (self.beta - self.alpha + 1e-6)
            advantage = mixed / (weight + 1) / (spread + 1e-6)
        below = (scores < quantiles[:, None]).double().mean(1)
        self.memory["quantiles"] = quantiles + self.rate * (levels - below)
        return advantage.to(answers.reward.dtype)

    def _spread(self, score: Tensor, problems: Tensor, place: Tensor) -> Tensor:
        """The deviation of S over the bundles of the same problems; 1 where there is one bundle."""
        first = group_places(problems * (place.max() + 1) + place) == 0
        found = group_statistics(score, problems, first)
        return torch.where(found.size > 1, found.std, 1.0)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        quantiles = self.memory.get("quantiles")
        if quantiles is not None and quantiles.shape != (2,):
            raise UsageError(f"the checkpoint has {quantiles.numel()} quantiles of 'risk'; expected 2.")
