"""What a run has found so far: one object for everything that writes it down or shows it.

``fit`` makes a new one and gives it to the method; under a plain Trainer a method uses its own. The callbacks of a run
take it from the method when they are set up. Between two blocks of updates they are called in this order:

1. the user's own callbacks, and ``ThreadWatch``,
2. ``Divergence``: looks at the losses of a new row and at the weights,
3. the measurement: has the files keep the checkpoint of this update, then writes ``evaluation``,
4. ``Interruption``: writes ``interrupted_by``,
5. the bar: shows ``metrics`` and ``evaluation``,
6. ``RunFolder``: writes both down, and a checkpoint. Lightning calls what writes checkpoints last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Callback


class Files(Protocol):
    """What keeps a run on disk, as others see it: :class:`offpolicy.training.run_folder.RunFolder`."""

    folder: Path
    earlier: dict[str, Any]  # the evaluation of the update that the run goes on from, where it was made

    def before_evaluation(self, trainer: Any, pl_module: Any) -> None:
        """Row of metrics and checkpoint of this update, before anything that may fail."""

    def keep_failed(self, trainer: Any, pl_module: Any) -> None:
        """A checkpoint of this update, whose evaluation has failed, on the disk before the run ends."""

    def save(self, trainer: Any, pl_module: Any) -> None:
        """Write a checkpoint now."""

    def settle(self) -> None:
        """Wait until the newest checkpoint is on the disk."""

    def best_words(self) -> str:
        """The checkpoint with the best evaluation, in words; empty where there is none."""

    def keep_trace(self, updates: int, error: BaseException) -> None:
        """Write where an evaluation failed."""


class Measuring(Protocol):
    """What judges a method in training: :class:`offpolicy.training.measurement.Measurement`."""

    def make_up(self, trainer: Any, pl_module: Any) -> None:
        """Measure now, unless this update was measured before."""


@dataclass
class RunLog:
    """What a run has found so far.

    Attributes:
        metrics: the newest row of metrics, with its ``step``; empty before the first.
        evaluation: the newest row of an evaluation; one that failed has an ``error`` and no numbers.
        received: the signal that this process was sent, 0 when none was.
        interrupted_by: the signal that ended the run, 0 when none did.
        files: what keeps the run on disk; None under a plain Trainer.
        bar: what shows the run to the user, if anything does.
        measurement: what judges the method, if anything does.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    received: int = 0
    interrupted_by: int = 0
    files: Files | None = None
    bar: Callback | None = None
    measurement: Measuring | None = None

    def metrics_at(self, updates: int) -> dict[str, Any]:
        """The row of metrics of this update; empty when there is none."""
        return self.metrics if self.metrics.get("step") == updates else {}

    def evaluation_at(self, updates: int) -> dict[str, Any]:
        """The row of the evaluation of this update; empty when there is none."""
        return self.evaluation if self.evaluation.get("step") == updates else {}

    @property
    def failed(self) -> bool:
        """Whether the newest evaluation raised an error."""
        return "error" in self.evaluation

    def scores(self) -> dict[str, float]:
        """The numbers of the newest evaluation by their short names, without "eval/"."""
        return scores_of(self.evaluation)


def scores_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation's row by their short names."""
    return {name.removeprefix("eval/"): value for name, value in row.items() if isinstance(value, float)}


def due(updates: int, every: int, last: int) -> bool:
    """Whether something that happens every n updates, and after the last one, happens now."""
    return updates == last or (every > 0 and updates % every == 0)
