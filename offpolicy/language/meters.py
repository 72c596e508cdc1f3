"""Metrics of language methods between two rows: sums over micro-batches, steps and processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offpolicy.compute.memory import peak_memory
from offpolicy.losses.health import summarise
from offpolicy.losses.scores import TokenMean


class Sums:
    """Vectors that are added up by name."""

    def __init__(self) -> None:
        self.sums: dict[Any, Tensor] = {}

    @torch.no_grad()
    def put(self, name: Any, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def by_name(self) -> dict[str, Tensor]:
        return self.sums

    def state_dict(self) -> dict[str, Any]:
        return {name: value.cpu() for name, value in self.by_name().items()}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> None:
        """Take this process's own sums; where the number of processes has changed, the first takes all."""
        self.sums = {}
        mine = states[rank : rank + 1] if len(states) == world_size else states if rank == 0 else []
        for state in mine:
            for name, value in state.items():
                self.put(name, value)

    def to(self, device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in self.sums.items()}


class SumMeter(Sums):
    """Sums of vectors, and the metrics that :func:`summarise` makes of them."""

    def add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            self.put(name, value)

    def read(self, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The metrics since the last call; starts anew."""
        sums, self.sums = self.sums, {}
        return summarise({name: sum_over_processes(sums[name]) for name in sorted(sums)})


class RowMeter(Sums):
    """Means of metrics over rows, weighted; NaN is a row that does not count, but in the loss, where it is one of
    training that has diverged. :class:`TokenMean` pools tokens.

    Names that come together are kept together: M names → (M, 2) float64, weighted sums and sums of weights.
    """

    @torch.no_grad()
    def add(self, metrics: Mapping[str, Tensor | TokenMean], weight: Tensor) -> None:
        """Add rows: name → (B,) or a mean over tokens, and their weights (B,)."""
        if not metrics:
            return
        pairs = [m if isinstance(m, TokenMean) else TokenMean(m, torch.ones_like(m)) for m in metrics.values()]
        total, count = (torch.stack(part).double() for part in zip(*pairs))
        known = ~torch.isnan(total)
        if "loss" in metrics:
            known[list(metrics).index("loss")] = True
        w = weight.double() * known
        self.put(tuple(metrics), torch.stack([(torch.where(known, total, 0.0) * w).sum(-1), (count * w).sum(-1)], -1))

    def add_step(self, loss: Tensor, metrics: Mapping[str, Any], *, weight: Tensor, real: Tensor) -> None:
        """Add the rows of a micro-batch: the loss and its parts as they are trained, all others row by row.

        Args:
            loss: (B,).
            metrics: name → (B,) or :class:`TokenMean`; names that end with "loss" are parts of the loss.
            weight: of the rows in the loss, (B,).
            real: (B,), 0 for rows that only fill up.
        """
        parts = {"loss": loss.detach(), **{n: value for n, value in metrics.items() if n.endswith("loss")}}
        self.add(parts, weight * real)
        self.add({n: value for n, value in metrics.items() if n not in parts}, real)

    def by_name(self) -> dict[str, Tensor]:
        single = Sums()
        for names, both in self.sums.items():
            for name, value in zip(names, both):
                single.put(name, value)
        return single.sums

    def read(self, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, in one transfer; starts anew. A metric without rows is left out."""
        found, self.sums = self.by_name(), {}
        names = sorted(found)
        if not names:
            return {}
        sums = sum_over_processes(torch.stack([found[name] for name in names])).tolist()
        return {name: total / weight for name, (total, weight) in zip(names, sums) if weight}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> None:
        super().load_state_dict(states, rank, world_size)
        self.sums = {(name,): value[None] for name, value in self.sums.items()}


class Pace:
    """How quickly steps are made between two rows of metrics.

    Attributes:
        steps: optimiser steps.
        tokens: of the texts learned from, on this process.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._clear()

    def _clear(self) -> None:
        self._seconds, self._filled, self._places = 0.0, 0, 0
        self.steps, self.tokens = 0, 0

    def start(self) -> None:
        """The clock runs from now."""
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Add what the clock shows, and let it run anew."""
        now = time.perf_counter()
        self._seconds, self._began = self._seconds + now - self._began, now

    def add_pass(self, filled: int, places: int) -> None:
        """Count the places of a forward pass that is learned from, and how many of them hold a token."""
        self._filled, self._places = self._filled + filled, self._places + places

    def read(self, sum_over_processes: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Columns of a row of metrics; starts anew."""
        tokens = sum_over_processes(torch.tensor(float(self.tokens), device=device)).item()
        seconds = max(self._seconds, 1e-9)
        row = {
            "perf/updates_per_s": self.steps / seconds,
            "perf/tokens_per_s": tokens / seconds,
            "perf/padding_fraction": 1.0 - self._filled / max(1, self._places),  # of the first process
            "perf/peak_memory_mb": peak_memory(device),
        }
        self._clear()
        return row
