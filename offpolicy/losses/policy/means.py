"""The slot ``aggregation``: the mean over the tokens of a step.

From numbers per token L and their mask m each gives the micro-batch's share, 0-d; the shares of a step add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offpolicy.errors import check_choice
from offpolicy.losses.tokens import Totals


def token_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Σ_t L·m of each row, (B,)."""
    return torch.where(mask > 0, values * mask, 0.0).sum(-1)


@dataclass(frozen=True)
class SeqMeanTokenMean:
    """Mean over answers of the mean over their tokens: GRPO. An answer without tokens counts as 0."""

    def __call__(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        return (token_sums(values, mask) / mask.sum(-1).clamp(min=1.0)).sum() / totals.rows


@dataclass(frozen=True)
class StepTokenMean:
    """Mean over all tokens of the step: DAPO (arXiv:2503.14476)."""

    def __call__(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        return token_sums(values, mask).sum() / max(1, totals.tokens)


@dataclass(frozen=True)
class TokenMeanLocal:
    """Mean over the tokens of a micro-batch, micro-batches weighted by their answers. Depends on how a step is split.

    What others do by accident or default; for comparison only.
    """

    def __call__(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        share = (mask.sum(-1) > 0).sum().to(values.dtype) / totals.rows
        return token_sums(values, mask).sum() / mask.sum().clamp(min=1.0) * share


@dataclass(frozen=True)
class DrGRPOSum:
    """Σ L·m / (answers · longest answer that may be generated): no weight depends on length (arXiv:2503.20783)."""

    def __call__(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        return token_sums(values, mask).sum() / (totals.rows * totals.max_length)


@dataclass(frozen=True)
class SumOverT:
    """Σ L·m / T without the number of answers, as in the code of LUFFY and RL-PLUS; grows with the batch.

    Args:
        length: T: "max", as configured, or "padded", of the step's longest answer.
    """

    length: str = "max"

    def __post_init__(self) -> None:
        check_choice("length", self.length, ("max", "padded"))

    def __call__(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        return token_sums(values, mask).sum() / (totals.max_length if self.length == "max" else totals.padded_length)


@dataclass(frozen=True)
class SeqSum:
    """Mean over answers of the sum over their tokens."""

    def __call__(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        return token_sums(values, mask).sum() / totals.rows
