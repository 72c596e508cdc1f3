"""Parts of an objective that ask for what a slot can give; small enough to be checked by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offpolicy.losses.answers import Answers, Judged
from offpolicy.losses.tokens import Tokens, Totals, column

MANY_PARTS: dict[str, Any] = {
    "advantage": "made_parts.LeavesOut",
    "weight": ["made_parts.AboveMean"],
    "terms": ["made_parts.Pairs"],
    "lr": "made_parts.slower",
}


class AboveMean:
    """A weight of answers by where they stand in the step, which drifts with the number of steps seen."""

    columns = frozenset({"group", "reward", "length", "turn"})
    reads_values = frozenset({"entropy"})

    def __init__(self) -> None:
        self.looks = 0

    def step_facts(self, step: Tokens) -> dict[str, Tensor]:
        self.looks += 1
        total = torch.where(step.kept, step.logp, 0.0).sum(-1)
        rank = torch.arange(len(total), device=total.device).to(total) / len(total)  # the order of the step
        turns = torch.where(column(step, "turn") >= 0, 1.0, 0.0).to(total)
        return {
            "over": total - total.mean(),
            "rank": rank,
            "grid": step.mask * turns,
            "looks": total.sum() * 0 + self.looks,
        }

    def __call__(self, tokens: Tokens) -> Tensor:
        said, entropy = tokens.step, tokens.entropy
        assert said is not None and entropy is not None and not entropy.requires_grad
        assert (column(tokens, "length") == tokens.mask.sum(-1)).logical_or(tokens.mask.sum(-1) == 0).all()
        row = 1.0 + torch.sigmoid(said["over"]) + said["rank"] + 0.01 * said["looks"]
        return said["grid"] * row[:, None] + 0.1 * column(tokens, "reward")[:, None].to(row)

    def state_dict(self) -> dict[str, int]:
        return {"looks": self.looks}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.looks = state["looks"]


class Pairs:
    """Mean over answers of squares of their distance from their group's mean log-probability."""

    whole_groups = True
    columns = frozenset({"group"})

    def __call__(self, tokens: Tokens, totals: Totals, *, iteration: int) -> Tensor:
        total = torch.where(tokens.kept, tokens.logp, 0.0).sum(-1)
        real = (tokens.mask.sum(-1) > 0).to(total)
        same = (column(tokens, "group")[:, None] == column(tokens, "group")).to(total) * real
        mean = (same * total).sum(-1) / same.sum(-1).clamp(min=1.0)
        return 0.01 * (real * (total - mean).square()).sum() / totals.rows


class LeavesOut:
    """Reward less the mean log-probability of the group; its rarest answer is left out."""

    takes_answers = True
    reads = frozenset({"mean_logp", "mean_entropy"})

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, answers: Answers) -> Judged:
        assert answers.mean_logp is not None and answers.mean_entropy is not None
        self.seen += len(answers.reward)
        _, index = torch.unique(answers.group, return_inverse=True)
        rarest = torch.full((int(index.max()) + 1,), torch.inf, dtype=answers.mean_logp.dtype, device="cpu")
        rarest = rarest.scatter_reduce_(0, index, answers.mean_logp, "amin")[index]
        advantage = answers.reward - answers.mean_logp + 0.1 * answers.mean_entropy + 0.001 * self.seen
        return Judged(advantage, answers.mean_logp > rarest)

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def slower(step: Tokens, *, iteration: int) -> Tensor:
    """1/(1 + mean A²)."""
    return 1.0 / (1.0 + step.advantage.square().mean())


def skips(step: Tokens, *, iteration: int) -> Tensor:
    """0 in the second iteration."""
    return torch.ones_like(step.logp[0, 0]) * (iteration != 2)


def asks(tokens: Tokens) -> Tensor:
    """A weight that asks for a column that nobody has."""
    return tokens.mask


asks.columns = frozenset({"rewards"})  # type: ignore[attr-defined]


class Vocabulary:
    """Facts over the vocabulary, and numbers drawn by the hash, all in one anchor; keeps what it saw of each answer."""

    reads = frozenset({"nucleus_entropy", "uniform"})
    reads_values = frozenset({"top_logp", "mean_log_ratio"})
    nucleus = 0.9
    columns = frozenset({"group"})

    def __call__(self, tokens: Tokens, *, iteration: int) -> Tensor:
        few, top, mean, drawn = (
            getattr(tokens, n) for n in ("nucleus_entropy", "top_logp", "mean_log_ratio", "uniform")
        )
        kept = tokens.kept
        assert few.requires_grad or not torch.is_grad_enabled()
        assert (top[kept] >= tokens.logp[kept].detach() - 1e-9).all() and (drawn >= 0).all() and (drawn < 1).all()
        return torch.where(kept, 0.1 * few + mean * tokens.logp + drawn * tokens.logp, 0.0)
