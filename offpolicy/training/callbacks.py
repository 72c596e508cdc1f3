"""Beside training: the end after a signal, the settings of the process, threads that stand in the way."""

from __future__ import annotations

import logging
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from offpolicy.compute.processes import gathered, is_loss
from offpolicy.compute.threads import threads_in_the_way, times_displaced
from offpolicy.training.checkpoints import checkpoint_name
from offpolicy.training.run_log import RunLog

log = logging.getLogger(__name__)


class RestoreSettings(Callback):
    """Undo what a fit changed in the process (threads, matmul) when it ends by an exception or by itself."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.restore_settings()  # type: ignore[operator]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        pl_module.restore_settings()  # type: ignore[operator]


class ThreadWatch(Callback):
    """Says once that several threads are slower than one, as they are where other work has one of their cores.

    The number of threads stays: another one would change the last bits of the weights.
    """

    displaced = 10  # times since the last look, from which on a look costs its 0.1 s
    pause = 10.0  # seconds between two looks
    looks = 6  # in one run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        several = pl_module.device.type == "cpu" and torch.get_num_threads() > 1
        self._left = self.looks if several and trainer.is_global_zero else 0
        self._before, self._looked = times_displaced(), -self.pause

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        now = time.monotonic()
        if not self._left or now - self._looked < self.pause or times_displaced() - self._before < self.displaced:
            return
        pl_module.stop_clock()
        found = threads_in_the_way()
        self._left, self._looked, self._before = self._left - 1, now, times_displaced()
        if found:
            self._left = 0
            log.warning(
                "Several threads slow training down here, as other work has their cores: %s. Wait until the cores are "
                "free, or start a run on one thread: --run.threads 1. A run that goes on keeps its number of threads, "
                "on which the last digits of its weights depend.",
                found,
            )


class Interruption(Callback):
    """The first Ctrl-C or SIGTERM ends the run after the current block, with a whole checkpoint; the second at once."""

    run_log: RunLog

    def __init__(self) -> None:
        self._former: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.run_log = pl_module.run_log

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.run_log.interrupted_by = self.run_log.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.run_log.received:
            self._restore()
            raise KeyboardInterrupt
        self.run_log.received = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.step_ended and trainer.strategy.reduce_boolean_decision(bool(self.run_log.received), all=False):
            numbers = gathered(self.run_log.received)  # whoever got it, all end with its exit code
            self.run_log.interrupted_by = max(numbers) or signal.SIGINT
            trainer.should_stop = True
            if self.run_log.files is None:
                path = Path(trainer.default_root_dir) / "checkpoints" / checkpoint_name(trainer.global_step)
                trainer.save_checkpoint(path)
                log.warning("Interrupted at update %d; saved %s.", trainer.global_step, path)

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        ours = bool(self._former)
        self._restore()
        if ours and is_loss(exception):  # the launcher stops the others at once, and there is something to say first
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
