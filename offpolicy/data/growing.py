"""Transitions of a ring, packed as they come: an append costs what it brings, whatever lies in the ring already."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.data.columns import to_numpy
from offpolicy.data.mixing import SHARE, split_items
from offpolicy.data.normalize import Normalizer
from offpolicy.data.replay import Replay
from offpolicy.data.ring import Ring
from offpolicy.data.views import BoundView, PackedTransitions, Transitions


class GrowingTransitions(PackedTransitions):
    """A row of the table for each row of a ring, usable or not; items are its usable rows in their order.

    What an append changes is written into tensors that stay in their places, so that work which was recorded or
    compiled with them goes on.

    Args:
        view: without weights and extra columns.
        ring: every row that may leave it is usable (see :func:`grows`).
    """

    def __init__(self, view: Any, ring: Ring, normalizer: Normalizer, device: torch.device) -> None:
        self.view, self.ring, self.normalizer, self.appends = view, ring, normalizer, ring.appends
        rows = np.sort(ring.usable_rows())
        front = rows[rows < ring.kept]
        self.front = len(front)
        self.front_rows = None if self.front == ring.kept else torch.from_numpy(front).to(device)
        self.place = torch.zeros(3, dtype=torch.int64, device=device)  # items, write head, rows skipped after it
        BoundView.__init__(self, len(rows), device, split=split_items(ring, rows))
        self.lay_out(view, ring, normalizer, ring.capacity)
        self.write(ring, rows, rows)
        self.number = self.place[0]
        self._count()

    def _count(self) -> None:
        head, low, high = self.ring.spans()
        self.count = self.front + head - self.ring.kept + high - low
        self.place.copy_(torch.tensor([self.count, head, low - head], device="cpu"))

    def grow(self, replay: Replay) -> bool:
        if replay is not self.ring or self.ring.appends != self.appends + 1:
            return False
        new, first = self.ring.newest
        types = [(to_numpy(new.steps[name]).dtype, to_numpy(column).dtype) for name, column in self.ring.steps.items()]
        if len(new.unusable) or not all(np.can_cast(*pair, "safe") for pair in types):
            return False  # else it would not be what the ring holds
        for start, length, place in zip(new.start, new.length, first):  # a later one may take the place of an earlier
            self.write(new, np.arange(start, start + length), np.arange(place, place + length))
        self.appends += 1
        self._count()
        return True

    def row(self, items: Tensor) -> Tensor:
        _, head, skipped = self.place.unbind()
        row = items + (self.ring.kept - self.front)
        row = torch.where(row < head, row, row + skipped)
        if self.front_rows is None or not self.front:
            return row
        return torch.where(items < self.front, self.front_rows.take(items.clamp(max=self.front - 1)), row)

    @property
    def rows(self) -> Tensor:  # type: ignore[override]
        return self.row(torch.arange(self.count, device=self.device))

    @rows.setter
    def rows(self, rows: Tensor | None) -> None:
        pass  # they follow from `place`

    def gather(self, items: Tensor) -> Transitions:
        row = self.row(items)
        return self.read(row, row)

    def pairs(self) -> tuple[Tensor, Tensor]:
        return BoundView.pairs(self)


def grows(view: Any, replay: Replay) -> bool:
    """Whether a replay is a ring whose transitions are packed as they come: all rows that may leave are usable."""
    if not isinstance(replay, Ring) or view.weight is not None or view.extra or SHARE in replay.meta:
        return False
    return int((replay.usable_rows() >= replay.kept).sum()) == replay.num_steps - replay.kept
