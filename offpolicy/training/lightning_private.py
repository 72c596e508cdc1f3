"""Everything that Lightning does not document and this library uses, each with the reason.

A test asks for every one of them, so that a version of Lightning without it is noticed before a run is. What torch
does not document stands in :mod:`offpolicy.compute.torch_private`.
"""

from __future__ import annotations

import threading
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy


def count_updates(trainer: Any, k: int) -> None:
    """Let ``global_step`` count k more updates: under manual optimisation it counts calls of Lightning's optimisers,
    which methods do not use, and it has no setter."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    for part in (progress.total, progress.current):
        part.ready += k
        part.completed += k


def save_interval(callback: Any) -> Any:
    """The updates between checkpoints of Lightning's ``ModelCheckpoint``, at which a block must end; else 0.

    It takes ``every_n_train_steps`` and keeps it under another name.
    """
    return getattr(callback, "_every_n_train_steps", 0)


def trainer_of(module: LightningModule) -> Any:
    """The Trainer of a module, None without one; the public ``trainer`` raises an error there."""
    return module.__dict__.get("_trainer")


def stop_watching() -> None:
    """Keep Lightning's launcher from killing this process because another one of the run has ended.

    Its watcher, a thread, does so within five seconds whenever a child ends with a code other than 0, as an
    interrupted child does, and nothing public stops it.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer" and hasattr(thread, "_child_processes"):
            thread._child_processes = []


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for sharded models, with all processes in one group that shares the data.

    Checkpoints are whole files, as those of every other strategy, so a run can go on with any number of processes.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def _setup_distributed(self) -> None:  # the only place where Lightning decides how processes are grouped
        super()._setup_distributed()
        self._data_parallel_size = self.world_size
