"""What happens between blocks of updates: evaluation, files of the run, the progress bar, interruption.

All intervals are in updates (``trainer.global_step``); a block always ends on them.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar

from offpolicy.evaluation.order import OrderConsistency, make_order
from offpolicy.evaluation.rollout import Evaluator, make_evaluator
from offpolicy.evaluation.scores import score_kind, simulator_note, simulator_version, summarize
from offpolicy.files import Table, plot_curves

log = logging.getLogger(__name__)


def due(updates: int, every: int, last: int) -> bool:
    """Whether something that happens every n updates, and after the last one, happens now."""
    return updates == last or (every > 0 and updates % every == 0)


def is_better(value: float, best: float | None) -> bool:
    """Whether a value beats the best so far; NaN (a policy that diverged) never does."""
    return value == value and (best is None or value > best)


def headline(numbers: Mapping[str, Any]) -> str | None:
    """The number by which an evaluation is judged, the first of these that exists; None when nothing was evaluated."""
    names = ("eval/score", "eval/success_rate", "eval/return_mean", "eval/rewards/accuracies", "eval/accuracy")
    return next((name for name in names if name in numbers), None)


def keep_best(numbers: dict[str, float], best: float | None) -> float | None:
    """Add the best headline so far to the numbers of an evaluation; returns it."""
    key = headline(numbers)
    if key is not None:
        if is_better(numbers[key], best):
            best = numbers[key]
        if best is not None:
            numbers[f"{key}_best"] = best
    return best


class RestoreSettings(Callback):
    """Undo what a fit changed in the process (threads, matmul) when it ends by an exception or by itself."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.restore_settings()  # type: ignore[operator]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        pl_module.restore_settings()  # type: ignore[operator]


class Measurement(Callback):
    """Base of what judges a method every ``run.eval_every`` updates and after the last.

    Numbers arrive as ``eval/…`` in the Trainer's metrics and as the method's ``eval_row``, with the best so far.
    """

    def __init__(self) -> None:
        self.best: float | None = None
        self.facts: dict[str, str] = {}  # stand in every row

    def measure(self, pl_module: Any) -> dict[str, float]:
        """The numbers, asked on every process; those of the first count, none at all write no row."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.eval_row = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.stop_clock()
        updates = trainer.global_step
        if not pl_module.step_ended or not due(updates, pl_module.run.eval_every, trainer.max_steps):
            return
        numbers = {f"eval/{name}": value for name, value in self.measure(pl_module).items()}
        self.best = keep_best(numbers, self.best)
        numbers = trainer.strategy.broadcast(numbers)
        if numbers:
            pl_module.log_dict(numbers, logger=False)
            pl_module.log_to_loggers(numbers, updates)
            pl_module.eval_row = {"step": updates, **numbers, **self.facts}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.best = state_dict["best"]


class Evaluation(Measurement):
    """Runs the policy in the data's environment, on the first process.

    Nothing of the training is touched: environments have their own fixed seeds and the generators are put back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.evaluator: Evaluator | None = None
        self.order: OrderConsistency | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        meta = pl_module.data_meta
        self.evaluator, reason = make_evaluator(meta, pl_module.sizes, episodes=pl_module.run.eval_episodes)
        if self.evaluator is None:
            log.warning("No evaluation: %s eval/return_mean and eval/score will be missing.", reason)
            return
        if hasattr(pl_module, "value_of"):
            self.order = make_order(meta, pl_module.option("subgoal_steps", 25))
        self.facts = {"env": simulator_version(meta["env_id"]), "score_kind": score_kind(meta)}
        note = simulator_note(meta)
        if note:
            log.warning(note)

    def measure(self, pl_module: Any) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        found = summarize(self.evaluator.run(pl_module.agent()), pl_module.data_meta)
        return found | (self.order(pl_module.value_of) if self.order else {})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.evaluator is not None:
            self.evaluator.close()
            self.evaluator = None


class HeldOut(Measurement):
    """What the method itself measures on data held out of its training: its ``held_out()``, on every process."""

    def measure(self, pl_module: Any) -> dict[str, float]:
        return pl_module.held_out()


class Interruption(Callback):
    """The first Ctrl-C or SIGTERM ends the run after the current block, with a whole checkpoint; the second at once."""

    def __init__(self) -> None:
        self.received = 0
        self._former: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.interrupted_by = self.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            self._restore()
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.step_ended and trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            pl_module.interrupted_by = self.received or signal.SIGINT
            trainer.should_stop = True
            if not any(isinstance(callback, RunFolder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
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
        self._restore()


class RunFolder(Checkpoint):
    """The files of a run: ``metrics.csv``, ``evals.csv``, ``checkpoints/step=….ckpt`` and, at the end, ``curves.png``.

    Checkpoints are written after every evaluation, at the last update, on interruption and when the method asks. The
    newest two are kept and the one with the best evaluation. Rows beyond the checkpoint that a run continues from are
    cut, never others, and checkpoints beyond it are set aside as ``….ckpt.replaced``: "last" means the last of the run
    as it goes on.
    Lightning runs this callback after all others, so that files hold what the others found.

    Args:
        folder: of the run.
        keep: how many of the newest checkpoints stay, ≥ 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.metrics = Table(self.folder / "metrics.csv")
        self.evals = Table(self.folder / "evals.csv")
        self.best_path = ""
        self.best_value: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))  # the first process chose it
        self.metrics, self.evals = Table(self.folder / "metrics.csv"), Table(self.folder / "evals.csv")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.metric_row, pl_module.eval_row = {}, {}
        if trainer.is_global_zero:
            for table in (self.metrics, self.evals):
                table.cut(trainer.global_step)
            for path in self.folder.glob("checkpoints/step=*.ckpt"):
                if path.name > checkpoint_name(trainer.global_step):
                    path.rename(path.with_name(path.name + ".replaced"))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not pl_module.step_ended:
            return
        updates = trainer.global_step
        if trainer.is_global_zero:
            for table, row in ((self.metrics, pl_module.metric_row), (self.evals, pl_module.eval_row)):
                if row.get("step") == updates:
                    table.append(row)
        if (
            due(updates, pl_module.run.eval_every, trainer.max_steps)
            or trainer.should_stop
            or pl_module.wants_checkpoint()
        ):
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, pl_module: Any) -> None:
        """Write a checkpoint, and remove those that nobody needs any more."""
        path = self.folder / "checkpoints" / checkpoint_name(trainer.global_step)
        row = pl_module.eval_row if pl_module.eval_row.get("step") == trainer.global_step else {}
        key = headline(row)
        if key is not None and is_better(row[key], self.best_value):
            self.best_value, self.best_path = row[key], path.name
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            kept = sorted(path.parent.glob("step=*.ckpt"))
            for old in kept[: -self.keep]:
                if old.name != self.best_path:
                    old.unlink(missing_ok=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            plot_curves(self.folder)

    def state_dict(self) -> dict[str, Any]:
        return {"best_path": self.best_path, "best_value": self.best_value}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.best_path, self.best_value = state_dict["best_path"], state_dict["best_value"]


class UpdateBar(ProgressBar):
    """One bar in updates: total, rate, and a few numbers; plain lines at evaluations where there is no terminal.

    Args:
        names: metrics shown, the first five of these that exist.
        every: least seconds between two drawings.
    """

    NAMES = (
        "eval/score",
        "eval/score_best",
        "eval/order_consistency",
        "eval/order_consistency/high",
        "eval/success_rate",
        "eval/return_mean",
        "train/critic_loss",
        "train/actor_loss",
        "train/q_mean",
        "eval/rewards/accuracies",
        "eval/accuracy",
        "train/reward/own",
        "train/iteration",
        "eval/loss",
        "train/loss",
        "train/rewards/accuracies",
        "train/rewards/margins",
    )

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # after the method's own callbacks, so that the line of an evaluation shows its numbers; checkpoints stay last
        trainer.callbacks = sorted(trainer.callbacks, key=lambda c: 2 * isinstance(c, Checkpoint) + (c is self))  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first, self._began = trainer.global_step, time.perf_counter()
        if not (self._enabled and trainer.is_global_zero):
            return
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[numbers]}"),
                console=Console(stderr=True),
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
        elif due(updates, pl_module.run.eval_every, trainer.max_steps) or trainer.should_stop:
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
        shown = [(short(n), float(found[n])) for n in self.names if n in found][:5]
        return "  ".join(f"{name} {value:.4g}" for name, value in shown)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()


def short(name: str) -> str:
    """A metric's name for the bar: "eval/score" as score, "eval/rewards/accuracies" as eval accuracies,
    "train/reward/own" as reward."""
    parts = name.removesuffix("/own").split("/")
    return parts[-1] if len(parts) == 2 and parts[-1] != "loss" else f"{parts[0]} {parts[-1]}"


def checkpoint_name(updates: int) -> str:
    return f"step={updates:08d}.ckpt"
