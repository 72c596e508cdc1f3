"""How a run ends: after a signal with a whole checkpoint, and with the settings of the process as they were."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from offpolicy.compute.processes import gathered, is_loss
from offpolicy.training.checkpoints import checkpoint_name
from offpolicy.training.run_log import RunLog

log = logging.getLogger(__name__)


class RestoreSettings(Callback):
    """Undo what a fit changed in the process (threads, matmul) when it ends by an exception or by itself."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.restore_settings()  # type: ignore[operator]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        pl_module.restore_settings()  # type: ignore[operator]


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
