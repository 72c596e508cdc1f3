"""A store that grows during training."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from offpolicy.data.columns import Column, to_numpy
from offpolicy.data.replay import Replay
from offpolicy.errors import DataError, UsageError


class Ring(Replay):
    """A replay of bounded size that grows during training by whole episodes; the oldest leave whole.

    Each episode lies in one piece: one that does not fit before the end of the columns starts at row 0 again, so no
    window can span the write head.

    Args:
        first: replay whose columns and content the ring starts with.
        capacity: rows, at least ``first.num_steps``.
        keep: whether the content that it starts with never leaves.
    """

    kept = 0  # rows at the front that no episode takes the place of
    appends = 0
    newest: tuple[Replay, list[int]]  # what was appended last, and the row where each episode of it begins

    def __init__(self, first: Replay, capacity: int, *, keep: bool = False) -> None:
        if capacity < first.num_steps:
            raise UsageError(f"capacity is {capacity}; expected at least the {first.num_steps} rows to start with.")
        rows = first.rows
        steps: dict[str, Column] = {}
        for name, column in first.steps.items():
            source = to_numpy(column)
            space = np.zeros((capacity, *source.shape[1:]), dtype=source.dtype)
            space[: len(rows)] = source[rows]
            steps[name] = space
        super().__init__(
            steps,
            start=np.cumsum(first.length) - first.length,
            length=first.length.copy(),
            tail={k: to_numpy(v) for k, v in first.tail.items()},
            episodes=first.episodes,
            meta=first.meta,
        )
        self.capacity = capacity
        self.head = first.num_steps
        self.kept = first.num_steps if keep else 0

    @classmethod
    def reopen(cls, saved: Replay, head: int) -> Ring:
        """The ring whose columns, index and write position were saved with :meth:`Replay.save`."""
        ring = cls.__new__(cls)
        Replay.__init__(
            ring,
            {k: np.array(to_numpy(v)) for k, v in saved.steps.items()},
            start=saved.start,
            length=saved.length,
            tail=saved.tail,
            episodes=saved.episodes,
            meta=saved.meta,
        )
        ring.capacity, ring.head = len(next(iter(ring.steps.values()))), head
        return ring

    def append(self, new: Replay) -> None:
        """Add the episodes of another replay in order, evicting the oldest ones whose rows are needed.

        Raises:
            DataError: the columns differ, or an episode is longer than the capacity. Nothing is added then.
        """
        for kind, ours, theirs in (
            ("columns", self.steps, new.steps),
            ("tails", self.tail, new.tail),
            ("episode columns", self.episodes, new.episodes),
        ):
            if ours.keys() != theirs.keys():
                raise DataError(f"the new episodes have {kind} {sorted(theirs)}; expected {sorted(ours)}.")
        shapes = [{k: v.shape[1:] for k, v in steps.items()} for steps in (self.steps, new.steps)]
        if shapes[0] != shapes[1]:
            raise DataError(f"the new steps have shapes {shapes[1]}; expected {shapes[0]}.")
        if new.length.max() > self.capacity - self.kept:
            raise DataError(
                f"an episode has {new.length.max()} steps; expected at most {self.capacity - self.kept} (the ring)."
            )
        self.newest = new, [self._append_one(new, episode) for episode in range(new.num_episodes)]
        self.appends += 1
        for name in [n for n in vars(self) if isinstance(getattr(type(self), n, None), cached_property)]:
            del self.__dict__[name]
        self.version += 1

    def spans(self) -> tuple[int, int, int]:
        """The rows in use: all below the write head, and those from the second number to the third, which the last way
        round the ring has left."""
        older = self.start >= self.head
        if not older.any():
            return self.head, self.head, self.head
        return self.head, int(self.start[older].min()), int((self.start + self.length)[older].max())

    def _append_one(self, new: Replay, episode: int) -> int:
        length, source = int(new.length[episode]), int(new.start[episode])
        first = self.head if self.head + length <= self.capacity else self.kept
        alive = (self.start >= first + length) | (self.start + self.length <= first)
        if (
            first == self.kept and self.head != self.kept
        ):  # the rows skipped at the end hold the oldest episodes of the last round
            alive &= self.start < self.head
        for name, column in self.steps.items():
            to_numpy(column)[first : first + length] = to_numpy(new.steps[name])[source : source + length]
        self.start = np.append(self.start[alive], first)
        self.length = np.append(self.length[alive], length)
        tails: Any = (self.tail, new.tail)
        for ours, theirs in (tails, (self.episodes, new.episodes)):
            for name in ours:
                row = to_numpy(theirs[name])[episode : episode + 1]
                ours[name] = np.concatenate([to_numpy(ours[name])[alive], row])
        self.head = first + length
        return first
