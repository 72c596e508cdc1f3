"""Means of metrics over the updates between two rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offpolicy.compute.torch_private import foreach_add_, foreach_zero_
from offpolicy.errors import UsageError

Metrics = dict[str, Any]  # (B,) or one number per seed each; of language methods also means over tokens


class Meter:
    """Running means of metrics on the device: nothing is read back before a row is wanted.

    The sums stay in their places, as a CUDA graph adds to them where they were when it was recorded.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()  # a metric that was not detached must not keep the graphs of all updates
    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Take the metrics of one update.

        Raises:
            UsageError: the first are no mapping.
        """
        if not self.sums and not isinstance(metrics, Mapping):
            raise UsageError(
                f"`update` returned {type(metrics).__name__}; expected a dict of metrics by name. Write, as the last "
                "line, return {'loss': loss.detach()}."
            )
        new = [name for name in metrics if name not in self.sums]
        for name in new:
            self.sums[name] = torch.zeros_like(metrics[name], dtype=torch.float32)
            self.counts[name] = 0
        if metrics:
            foreach_add_([self.sums[name] for name in metrics], list(metrics.values()))
        for name in metrics:
            self.counts[name] += 1

    def count(self, times: Mapping[str, int]) -> None:
        """Take note of sums that were made on the device without :meth:`add`."""
        for name, more in times.items():
            self.counts[name] += more

    def read(self, mean_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float | list[float]]:
        """Means since the last call, in one transfer; starts anew."""
        sums = self.by_name()
        if not sums:
            return {}
        means = torch.stack([total / self.counts[name] for name, total in sums.items()])
        row = dict(zip(sums, mean_over_processes(means).tolist(), strict=True))
        foreach_zero_(list(sums.values()))
        self.counts = dict.fromkeys(self.counts, 0)
        return row

    def by_name(self) -> dict[str, Tensor]:
        """The sums since the last row."""
        return {name: total for name, total in self.sums.items() if self.counts[name]}

    def state_dict(self) -> dict[str, Any]:
        sums = self.by_name()
        return {"sums": {k: v.cpu() for k, v in sums.items()}, "counts": {k: self.counts[k] for k in sums}}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> None:
        """Take this process's own state, or the mean of all when their number has changed."""
        mine = states[rank : rank + 1] if len(states) == world_size else states
        self.counts = dict(mine[0]["counts"])
        self.sums = {k: torch.stack([state["sums"][k] for state in mine]).mean(0) for k in self.counts}

    def to(self, device: torch.device) -> None:
        self.sums = {k: v.to(device) for k, v in self.sums.items()}
