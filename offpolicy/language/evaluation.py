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
from offpolicy.losses.preference import idealised_ranking_accuracy, loss_to_rank
from offpolicy.training.meter import Metrics

BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)  # of the paper's table
IDEAL = "idealised_ranking_accuracy"


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


def idealised(scores: Any, beta: float | None, reference_weight: float = 1.0) -> dict[str, Tensor]:
    """What a perfectly optimised policy would rank right (arXiv:2405.19534): of pairs, and methods with a β.

    At the β of the method, by sums and by means per token; and at every β of a grid, which `ranges_of_grid` sums up.
    The column ``agreement`` says how many people agree with a label.
    """
    if not (beta and hasattr(scores, "chosen")):
        return {}
    sides = (scores.chosen, scores.rejected)
    sums = [reference_weight * side.ref_logps for side in sides]
    means = [one / side.length for one, side in zip(sums, sides)]
    agreement = scores.facts.get("agreement", 0.75)
    found = {
        IDEAL: idealised_ranking_accuracy(*sums, beta=beta, agreement=agreement),
        f"{IDEAL}_normalised": idealised_ranking_accuracy(*means, beta=beta, agreement=agreement),
        "loss_to_rank": loss_to_rank(*sums, beta=beta),
    }
    for name, logps in ((IDEAL, sums), (f"{IDEAL}_normalised", means)):
        found |= {f"{name}@{b}": idealised_ranking_accuracy(*logps, beta=b, agreement=agreement) for b in BETAS}
    return found


def ranges_of_grid(numbers: dict[str, float]) -> dict[str, float]:
    """The least, the median and the largest idealised accuracy over the grid in place of one number for every β."""
    found = {name: value for name, value in numbers.items() if "@" not in name}
    for name in (IDEAL, f"{IDEAL}_normalised"):
        grid = sorted(numbers[f"{name}@{b}"] for b in BETAS if f"{name}@{b}" in numbers)
        if grid:
            found |= {f"{name}_min": grid[0], f"{name}_median": grid[len(grid) // 2], f"{name}_max": grid[-1]}
    return found
