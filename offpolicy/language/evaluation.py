"""Numbers that a language method in training has on held-out data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.compute.processes import sum_over_processes
from offpolicy.data.sampling import permutation
from offpolicy.data.texts.sequences import row_weights
from offpolicy.language.meters import RowMeter
from offpolicy.language.reference import evaluating
from offpolicy.losses.preference import idealised_ranking_accuracy


def eval_sample(rows: int, limit: int) -> np.ndarray:
    """Which held-out rows are looked at: all, or a sample that is the same in every run."""
    return np.arange(rows) if not limit or limit >= rows else np.sort(permutation(0, 0, rows)[:limit].numpy())


def evaluate(method: Any) -> dict[str, float]:
    """Means of loss and metrics over the held-out rows of a method in training."""
    table, rows = method.eval_table, method.eval_table.needed
    rows = rows[np.argsort(-table.texts.lengths[rows].sum(1), kind="stable")]
    world, rank = method.world_size, method.process_rank
    padded = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % world)])
    counted = (np.arange(len(padded)) < len(rows)).astype(np.float64)
    mine, real = padded[rank::world], torch.from_numpy(counted[rank::world]).to(method.device)
    size, meter = method.micro.rows, RowMeter()
    with evaluating(method.model), method.precision_context():
        means = method.step_means(table, rows)
        for start in range(0, len(mine), size):
            part = slice(start, start + size)
            scores = method.scores(table, mine[part], means, stats=True)
            loss, metrics = method.loss(scores)
            weight = torch.from_numpy(row_weights(table.texts, mine[part])).to(method.device)
            meter.add_step(loss, {**metrics, **idealised(method, scores)}, weight=weight, real=real[part])
    return meter.read(sum_over_processes)


def idealised(method: Any, scores: Any) -> dict[str, Tensor]:
    """What a perfectly optimised policy would rank right (arXiv:2405.19534), where there are pairs and a reference."""
    beta = method.hparams.get("beta")
    if not (method.uses_reference and beta and hasattr(scores, "chosen")):
        return {}
    chosen, rejected = scores.chosen.ref_logps, scores.rejected.ref_logps
    return {"idealised_ranking_accuracy": idealised_ranking_accuracy(chosen, rejected, beta=beta)}
