"""Numbers of language methods on held-out texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.compute.processes import rank as process_rank
from offpolicy.compute.processes import sum_over_processes, world_size
from offpolicy.data.sampling import permutation
from offpolicy.data.texts.sequences import BoundTexts, row_weights
from offpolicy.language.meters import RowMeter
from offpolicy.losses.preference import idealised_ranking_accuracy
from offpolicy.training.meter import Metrics


def eval_sample(rows: int, limit: int) -> np.ndarray:
    """The held-out rows that are looked at: all, or a sample, which is the same in every run."""
    return np.arange(rows) if not limit or limit >= rows else np.sort(permutation(0, 0, rows)[:limit].numpy())


def evaluate(
    texts: BoundTexts, rows: np.ndarray, judge: Callable[[np.ndarray], tuple[Tensor, Metrics]], size: int, device: Any
) -> dict[str, float]:
    """Means of loss and metrics over held-out rows; processes share the rows.

    Args:
        texts: the table.
        rows: of the table, (n,), in the order of the forward passes.
        judge: rows of one forward pass, (B,) → loss and metrics, (B,) each.
        size: rows of a forward pass, at most.
        device: of the policy.
    """
    world, rank = world_size(), process_rank()
    padded = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % world)])
    counted = (np.arange(len(padded)) < len(rows)).astype(np.float64)
    mine, real, meter = padded[rank::world], torch.from_numpy(counted[rank::world]).to(device), RowMeter()
    for start in range(0, len(mine), size):
        part = slice(start, start + size)
        loss, metrics = judge(mine[part])
        weight = torch.from_numpy(row_weights(texts, mine[part])).to(device)
        meter.add_step(loss, metrics, weight=weight, real=real[part])
    return meter.read(sum_over_processes)


def idealised(scores: Any, beta: float | None) -> dict[str, Tensor]:
    """What a perfectly optimised policy would rank right (arXiv:2405.19534): of pairs, and methods with a β."""
    if not (beta and hasattr(scores, "chosen")):
        return {}
    chosen, rejected = scores.chosen.ref_logps, scores.rejected.ref_logps
    return {"idealised_ranking_accuracy": idealised_ranking_accuracy(chosen, rejected, beta=beta)}
