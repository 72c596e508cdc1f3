"""Held-out numbers of a language method, and means of metrics over rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from offpolicy.callbacks import due, keep_best
from offpolicy.data.sampling import permutation
from offpolicy.language.reference import evaluating
from offpolicy.losses.preference import idealised_ranking_accuracy


class RowMeter:
    """Means of metrics over rows, weighted, over micro-batches and processes; NaN is a row that does not count."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}  # M names → (M, 2) float64: weighted sums, sums of weights

    @torch.no_grad()
    def add(self, metrics: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add rows: name → (B,), and their weights (B,)."""
        names, values = tuple(metrics), torch.stack(list(metrics.values())).double()
        counts = ~torch.isnan(values)
        w = weight.double() * counts
        both = torch.stack([(torch.where(counts, values, 0.0) * w).sum(-1), w.sum(-1)], -1)
        self.sums[names] = self.sums[names] + both if names in self.sums else both

    def _by_name(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for names, both in self.sums.items():
            for name, value in zip(names, both):
                found[name] = found[name] + value if name in found else value
        return found

    def read(self, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, in one transfer; starts anew. A metric without rows is left out."""
        found = self._by_name()
        names = sorted(found)
        if not names:
            return {}
        sums = sum_over_processes(torch.stack([found[name] for name in names])).tolist()
        self.sums = {}
        return {name: total / weight for name, (total, weight) in zip(names, sums) if weight}

    def state_dict(self) -> dict[str, Any]:
        return {name: value.cpu() for name, value in self._by_name().items()}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> None:
        """Take this process's own sums; where the number of processes has changed, the first takes all."""
        if len(states) == world_size:
            mine = dict(states[rank])
        else:
            everything = set().union(*states) if rank == 0 else set()
            mine = {n: torch.stack([state[n] for state in states if n in state]).sum(0) for n in everything}
        self.sums = {(name,): value[None] for name, value in mine.items()}

    def to(self, device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in self.sums.items()}


class HeldOut(Callback):
    """The loss and metrics on held-out rows every ``run.eval_every`` steps and after the last.

    Numbers arrive as ``eval/…`` in the Trainer's metrics and as the method's ``eval_row``. The same rows every time:
    all of them, or a fixed sample of ``eval_rows``. Processes share them.
    """

    def __init__(self) -> None:
        self.best: float | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.stop_clock()
        updates = trainer.global_step
        if not pl_module.step_ended or not due(updates, pl_module.run.eval_every, trainer.max_steps):
            return
        if pl_module.eval_table is None:
            return
        numbers = {f"eval/{name}": value for name, value in evaluate(pl_module).items()}
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
