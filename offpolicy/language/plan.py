"""Which rows a step of training takes, and which of them one forward pass of one process takes.

A pure function of (seed, step): every epoch is a permutation by hash, cut into steps, so every row comes once per epoch
and the last step of an epoch may be smaller. The rows of a step are ordered by length and dealt to its slots (one slot
is one micro-batch of one process), so that little is padded while the step itself stays a random sample. How a step is
cut into slots has no influence on what it learns.
"""

from __future__ import annotations

import math

import numpy as np

from offpolicy.data.sampling import permutation
from offpolicy.moved import names_of


class RowPlan:
    """The order of training.

    Args:
        lengths: tokens of each row, (n,).
        batch_size: rows per step, ≥ 1.
        slots: micro-batches per step over all processes, ≥ 1.
        seed: of the permutations.
        by_length: order the rows of a step by length, longest first.
    """

    def __init__(self, lengths: np.ndarray, *, batch_size: int, slots: int, seed: int, by_length: bool = True) -> None:
        self.lengths, self.batch_size, self.slots, self.seed = lengths, batch_size, slots, seed
        self.by_length = by_length
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self._epoch = (-1, np.empty(0, dtype=np.int64))

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, (n,)."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, permutation(self.seed, epoch, len(self.lengths)).numpy())
        return self._epoch[1]

    def place(self, step: int) -> tuple[int, slice]:
        """Epoch of a step (both from 0), and which part of the epoch's order it takes."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return epoch, slice(k * self.batch_size, min((k + 1) * self.batch_size, len(self.lengths)))

    def rows(self, step: int) -> np.ndarray:
        """The rows of a step, in the order of its slots."""
        epoch, part = self.place(step)
        rows = self.order(epoch)[part]
        return rows[np.argsort(-self.lengths[rows], kind="stable")] if self.by_length else rows

    def slot(self, step: int, i: int) -> np.ndarray:
        """The rows of slot i in [0, slots); empty where a small last step has fewer rows than slots."""
        rows = self.rows(step)
        return np.array_split(rows, self.slots)[i]

    def before(self, epoch: int, prompts: np.ndarray) -> np.ndarray:
        """For every row the nearest one before it in the epoch's order (cyclic) that has another prompt, (n,)."""
        return previous_of_other_prompt(self.order(epoch), prompts)

    def rows_until(self, last: int) -> np.ndarray:
        """The distinct rows of the first ``last`` steps, sorted."""
        if last >= self.steps_per_epoch:
            return np.arange(len(self.lengths))
        return np.sort(self.order(0)[: last * self.batch_size])


def previous_of_other_prompt(order: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """For every row the nearest one before it in an order (cyclic) that has another prompt.

    Args:
        order: a permutation of the rows, (n,).
        prompts: number of the prompt of each row, (n,); two different ones at least.

    Returns:
        Row → row, (n,).
    """
    own = prompts[order]
    begins = own != np.roll(own, 1)  # places where another prompt begins
    place = np.where(begins, np.arange(len(order)), -1)
    place = np.maximum.accumulate(place)
    place[place < 0] = np.flatnonzero(begins)[-1]  # the first places go on with what stands at the end
    previous = np.empty_like(order)
    previous[order] = order[place - 1]
    return previous


__getattr__ = names_of("offpolicy.language.plan")  # the names that stood here in version 0.1
