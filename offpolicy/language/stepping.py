"""Optimiser steps of language methods: their rate over a run, and how a step is cut into micro-batches."""

from __future__ import annotations

import math
from typing import Any

from offpolicy.errors import UsageError

SCHEDULES = ("cosine", "linear", "constant")
FORWARD_TOKENS = 8192  # of one forward pass where the user does not say


def rate_at(step: int, horizon: int, *, lr: float, warmup_ratio: float, lr_schedule: str) -> float:
    """The learning rate of a step: a linear rise, then the schedule, down to 0 after the last step.

    Args:
        step: from 0.
        horizon: steps in all.
        lr: the peak.
        warmup_ratio: part of the steps in which the rate rises.
        lr_schedule: one of ``SCHEDULES``.
    """
    horizon = max(1, horizon)
    rise = round(warmup_ratio * horizon)
    if step < rise:
        return lr * (step + 1) / rise
    done = min(1.0, (step - rise) / max(1, horizon - rise))
    left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return lr * left[lr_schedule]


class MicroBatches:
    """How the rows of a step are cut, and which part of a step is being computed.

    Attributes:
        rows: largest number of rows of one forward pass on one process.
        number: forward passes of one process in a step.
        current: of the step, from 0.
    """

    def __init__(self) -> None:
        self.rows, self.number, self.current = 1, 1, 0

    def cut(self, batch_size: int, world: int, wanted: int | None, longest: int, together: int = 1) -> None:
        """Cut a step.

        Args:
            batch_size: rows of a step over all processes.
            world: processes.
            wanted: rows of a forward pass; None for as many as fit into ``FORWARD_TOKENS``.
            longest: tokens of the longest row.
            together: rows that stay in one forward pass; ``batch_size`` is a multiple.

        Raises:
            UsageError: fewer rows were wanted than stay together.
        """
        if wanted is not None and wanted < together:
            raise UsageError(
                f"`micro_batch_size` is {wanted}, and a part of the objective compares the answers of a group, of "
                f"which there are {together}; expected ≥ {together}, as a forward pass holds whole groups. Pass "
                f"--model.micro_batch_size {together}, or a smaller --model.group_size."
            )
        share = math.ceil(batch_size / together / world) * together
        self.rows = min(share, (wanted or max(1, FORWARD_TOKENS // longest)) // together * together or together)
        self.number = math.ceil(batch_size / (self.rows * world))

    def begin(self, loop: Any, step: int) -> None:
        """Begin with a whole step, and let Lightning's count fit, as a resumed run may be cut in another way.

        Args:
            loop: the Trainer's loop over batches.
            step: optimiser steps made so far.
        """
        self.current = 0
        progress, count = loop.batch_progress.current, step * self.number
        if progress.ready != count:
            progress.ready = progress.started = progress.processed = count
            progress.completed = count - loop.restarted_on_train_batch_end

    def end(self) -> bool:
        """Count a micro-batch; whether it was the last of its step."""
        self.current = (self.current + 1) % self.number
        return self.current == 0

    def place(self, step: int) -> int:
        """The number of the current micro-batch among all of a run, from 0."""
        return step * self.number + self.current
