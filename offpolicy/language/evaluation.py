"""Numbers that a language method in training has on held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from offpolicy.callbacks import due, keep_best
from offpolicy.data.sampling import permutation
from offpolicy.language.meters import RowMeter
from offpolicy.language.reference import evaluating
from offpolicy.losses.preference import idealised_ranking_accuracy


class HeldOut(Callback):
    """The loss and metrics on held-out rows every ``run.eval_every`` steps and after the last.

    Numbers arrive as ``eval/…`` in the Trainer's metrics and as the method's ``eval_row``. The same rows every time:
    all of them, or a fixed sample of ``eval_rows``. Processes share them.
    """

    def measure(self, method: Any) -> dict[str, float]:
        """The numbers, on every process; none where nothing is held out."""
        return {} if method.eval_table is None else evaluate(method)

    def __init__(self) -> None:
        self.best: float | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.stop_clock()
        updates = trainer.global_step
        if not pl_module.step_ended or not due(updates, pl_module.run.eval_every, trainer.max_steps):
            return
        numbers = {f"eval/{name}": value for name, value in self.measure(pl_module).items()}
        if not numbers:
            return
        self.best = keep_best(numbers, self.best)
        pl_module.log_dict(numbers, logger=False)
        pl_module.log_to_loggers(numbers, updates)
        pl_module.eval_row = {"step": updates, **numbers}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.best = state_dict["best"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.best = None


def eval_sample(rows: int, limit: int) -> np.ndarray:
    """Which held-out rows are looked at: all, or a sample that is the same in every run."""
    return np.arange(rows) if not limit or limit >= rows else np.sort(permutation(0, 0, rows)[:limit].numpy())


def evaluate(method: Any) -> dict[str, float]:
    """Means of loss and metrics over the held-out rows of a method in training."""
    table, rows = method.eval_table, method.eval_table.needed
    rows = rows[np.argsort(-table.texts.lengths[rows].sum(1), kind="stable")]
    world, rank = method.world_size, method.global_rank if method.world_size > 1 else 0
    padded = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % world)])
    weight = (np.arange(len(padded)) < len(rows)).astype(np.float64)
    mine, mine_weight = padded[rank::world], torch.from_numpy(weight[rank::world]).to(method.device)
    size, meter = method.rows_per_forward, RowMeter()
    with evaluating(method.model), method.precision_context():
        means = method.step_means(table, rows)
        for start in range(0, len(mine), size):
            part = slice(start, start + size)
            scores = method.scores(table, mine[part], means, stats=True)
            loss, metrics = method.loss(scores)
            meter.add({"loss": loss, **metrics, **idealised(method, scores)}, mine_weight[part])
    return meter.read(method.sum_over_processes)


def idealised(method: Any, scores: Any) -> dict[str, Tensor]:
    """What a perfectly optimised policy would rank right (arXiv:2405.19534), where there are pairs and a reference."""
    beta = method.option("beta", None)
    if not (method.uses_reference and beta and hasattr(scores, "chosen")):
        return {}
    chosen, rejected = scores.chosen.ref_logps, scores.rejected.ref_logps
    return {"idealised_ranking_accuracy": idealised_ranking_accuracy(chosen, rejected, beta=beta)}
