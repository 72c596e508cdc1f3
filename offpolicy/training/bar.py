"""The bar of a run in training."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from offpolicy.compute.progress import terminal_bar
from offpolicy.training.headlines import SHOWN
from offpolicy.training.run_log import RunLog, due


class UpdateBar(ProgressBar):
    """One bar in updates: total, rate, and a few numbers; plain lines at evaluations where there is no terminal.

    Args:
        names: metrics shown, the first five of these that exist.
        every: least seconds between two drawings.
    """

    NAMES = tuple(one.name for one in SHOWN)
    run_log: RunLog

    def __init__(self, names: tuple[str, ...] = NAMES, every: float = 0.5) -> None:
        super().__init__()
        self.names, self.every = names, every
        self._enabled = True
        self._bar: Any = None
        self._drawn = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.run_log = pl_module.run_log

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first, self._began = trainer.global_step, time.perf_counter()
        if not (self._enabled and trainer.is_global_zero):
            return
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

            self._bar = terminal_bar(
                BarColumn(20),
                MofNCompleteColumn(),
                "{task.fields[rate]}",
                TimeRemainingColumn(compact=True),
                "{task.fields[numbers]}",
                auto_refresh=False,
            )
            self._task = self._bar.add_task("", total=trainer.max_steps, completed=self._first, rate="", numbers="")
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:  # type: ignore[override]
        if not (self._enabled and trainer.is_global_zero and pl_module.step_ended):
            return
        now, updates = time.perf_counter(), trainer.global_step
        if self._bar is not None:
            if now - self._drawn < self.every and updates < trainer.max_steps:
                return
            self._drawn = now
            rate, numbers = self.rate(updates, now), self.numbers(trainer)
            self._bar.update(self._task, completed=updates, rate=rate, numbers=numbers, refresh=True)
        elif due(updates, pl_module.eval_every, trainer.max_steps) or trainer.should_stop:
            count = f"{updates:>{len(str(trainer.max_steps))}}/{trainer.max_steps}"
            print(f"{count}  {self.rate(updates, now)}  {self.numbers(trainer)}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Show what keeps the run from its updates."""
        if self._bar is not None:
            self._bar.update(self._task, numbers=text, refresh=True)

    def rate(self, updates: int, now: float) -> str:
        return f"{(updates - self._first) / max(now - self._began, 1e-9):,.0f} updates/s"

    def numbers(self, trainer: Trainer) -> str:
        found = trainer.callback_metrics
        if self.run_log.failed:  # the numbers of an earlier one would mislead
            found = {name: value for name, value in found.items() if not name.startswith("eval/")}
        shown = [n for n in self.names if n in found][:5]
        return "  ".join(f"{short(n)} {float(found[n]):.4g}{plus_minus(found.get(f'{n}_seed_std'))}" for n in shown)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()


def plus_minus(std: Any) -> str:
    """The standard deviation of a number over seeds, to stand behind it; nothing for one seed."""
    return "" if std is None else f" ± {float(std):.3g}"


def short(name: str) -> str:
    """A metric's name for the bar: "eval/score" as score, "eval/rewards/accuracies" as eval accuracies,
    "train/reward/own" as reward, "eval/order_consistency/high" as order_consistency (high)."""
    parts = name.removesuffix("/own").removesuffix("/high").split("/")
    level = " (high)" if name.endswith("/high") else ""
    return (parts[-1] if len(parts) == 2 and parts[-1] != "loss" else f"{parts[0]} {parts[-1]}") + level
