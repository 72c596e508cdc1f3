"""Means of metrics over the updates between two rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offpolicy.compute.torch_private import foreach_add_

Metrics = dict[str, Any]  # (B,) or one number per seed each; of language methods also means over tokens


class Meter:
    """Running means of metrics on the device: nothing is read back before a row is wanted."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()  # a metric that was not detached must not keep the graphs of all updates
    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Take the metrics of one update."""
        new = [name for name in metrics if name not in self.sums]
        for name in new:
            self.sums[name] = torch.zeros_like(metrics[name], dtype=torch.float32)
            self.counts[name] = 0
        if metrics:
            foreach_add_([self.sums[name] for name in metrics], list(metrics.values()))
        for name in metrics:
            self.counts[name] += 1

    def read(self, mean_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float | list[float]]:
        """Means since the last call, in one transfer; starts anew."""
        if not self.sums:
            return {}
        means = torch.stack([self.sums[name] / self.counts[name] for name in self.sums])
        values = mean_over_processes(means).tolist()
        row = dict(zip(self.sums, values, strict=True))
        self.sums, self.counts = {}, {}
        return row

    def by_name(self) -> dict[str, Tensor]:
        """The sums since the last row."""
        return self.sums

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {k: v.cpu() for k, v in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> None:
        """Take this process's own state, or the mean of all when their number has changed."""
        mine = states[rank : rank + 1] if len(states) == world_size else states
        self.counts = dict(mine[0]["counts"])
        self.sums = {k: torch.stack([state["sums"][k] for state in mine]).mean(0) for k in self.counts}

    def to(self, device: torch.device) -> None:
        self.sums = {k: v.to(device) for k, v in self.sums.items()}
