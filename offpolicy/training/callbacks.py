"""What happens between blocks of updates: evaluation, files of the run, the progress bar, interruption.

All intervals are in updates (``trainer.global_step``); a block always ends on them.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar

from offpolicy.compute.processes import is_loss
from offpolicy.environments.checks import described
from offpolicy.errors import DataError, DivergenceError, UsageError
from offpolicy.evaluation.order import OrderConsistency, make_order
from offpolicy.evaluation.rollout import Evaluator, make_evaluator
from offpolicy.evaluation.scores import score_kind, simulator_note, simulator_version, summarize
from offpolicy.files import Table, WriteError, atomic_write, plot_curves
from offpolicy.training.seeds import over_seeds

log = logging.getLogger(__name__)


def run_folder(trainer: Trainer) -> RunFolder | None:
    """The callback that writes the files of the run, where there is one."""
    return next((c for c in trainer.callbacks if isinstance(c, RunFolder)), None)  # type: ignore[attr-defined]


def told(error: BaseException) -> str:
    """An error as one sentence: our own messages as they are, others with their kind and place."""
    text = str(error) if isinstance(error, (UsageError, DataError)) else described(error)
    return text if text.endswith((".", "!", "?")) else f"{text}."


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


class EvaluationFailed(UsageError):
    """An evaluation raised an error; the checkpoint of its update had been written before."""


class Measurement(Callback):
    """Base of what judges a method every ``run.eval_every`` updates and after the last.

    Numbers arrive as ``eval/…`` in the Trainer's metrics and as the method's ``eval_row``, with the best so far. In a
    run folder the checkpoint of an update is written before its evaluation, so that one that fails, hangs or kills the
    process costs no training; a run that goes on from there makes up for the evaluation first, if it has no row.
    """

    everywhere = True  # measured on every process, or on the first alone

    def __init__(self) -> None:
        self.best: float | None = None
        self.facts: dict[str, str] = {}  # stand in every row
        self.outstanding = False  # the evaluation of the update at hand

    def measure(self, pl_module: Any) -> dict[str, float]:
        """The numbers, asked on every process; those of the first count, none at all write no row."""
        raise NotImplementedError

    def reset(self) -> None:
        """Called after an evaluation that failed: what it worked with may be broken."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.eval_row = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not self.outstanding:
            return
        self.outstanding, folder = False, run_folder(trainer)
        row = trainer.strategy.broadcast({} if folder is None else folder.earlier)
        if row:  # it was made, after the checkpoint that training goes on from
            self.best = keep_best(dict(row), self.best)
            pl_module.eval_row = row
        else:
            self.evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        measures = pl_module.step_ended and due(trainer.global_step, pl_module.run.eval_every, trainer.max_steps)
        pl_module.stop_clock(wait=measures)
        if not measures:
            return
        folder = run_folder(trainer)
        if folder is not None:
            self.outstanding = True
            folder.before_evaluation(trainer, pl_module)
            self.outstanding = False
        self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure now. An error ends the run, or leaves a row without numbers, as ``run.eval_errors`` says."""
        updates, failure = trainer.global_step, None
        numbers: dict[str, float] = {}
        try:
            numbers = {f"eval/{name}": value for name, value in self.measure(pl_module).items()}
        except (Exception, SystemExit) as error:
            if self.everywhere and pl_module.world_size > 1:  # the others wait inside the measurement
                raise EvaluationFailed(f"the evaluation at update {updates:,} failed: {told(error)}") from error
            failure = error
            self.reset()
        self.best = keep_best(numbers, self.best)
        numbers, reason = trainer.strategy.broadcast((numbers, "" if failure is None else told(failure)))
        if reason:
            self._fail(trainer, pl_module, reason, failure)
        elif numbers:
            pl_module.log_dict(numbers, logger=False)
            pl_module.log_to_loggers(numbers, updates)
            pl_module.eval_row = {"step": updates, **numbers, **self.facts}

    def _fail(self, trainer: Trainer, pl_module: Any, reason: str, failure: BaseException | None) -> None:
        updates, folder = trainer.global_step, run_folder(trainer)
        if folder is not None and failure is not None:
            folder.keep_trace(updates, failure)
        if pl_module.run.eval_errors == "skip":
            log.warning("The evaluation at update %d failed, and the run goes on without it: %s", updates, reason)
            pl_module.eval_row = {"step": updates, "error": reason, **self.facts}
            return
        if folder is None:
            self.outstanding = True
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / checkpoint_name(updates))
        raise EvaluationFailed(
            f"the evaluation at update {updates:,} failed: {reason} The checkpoint of this update is kept; "
            "--run.eval_errors=skip goes on without scores."
        ) from failure

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "outstanding": self.outstanding}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.best, self.outstanding = state_dict["best"], state_dict.get("outstanding", False)


class Evaluation(Measurement):
    """Runs the policy in the data's environment, on the first process.

    Nothing of the training is touched: environments have their own fixed seeds and the generators are put back. Of a
    method with several seeds each plays the same episodes by itself, and the numbers are the means over seeds, with
    those of each under ``eval/<name>_seed<seed>``.
    """

    everywhere = False

    def __init__(self) -> None:
        super().__init__()
        self.evaluator: Evaluator | None = None
        self.order: OrderConsistency | None = None
        self._broken = False  # the environments of an evaluation that failed are made anew

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        reason = self.open(pl_module)
        if reason:
            log.warning("No evaluation: %s eval/return_mean and eval/score will be missing.", reason)
            return
        note = simulator_note(pl_module.data_meta)
        if note:
            log.warning(note)

    def open(self, pl_module: Any) -> str:
        """Make the environments; returns why there are none, else the empty string."""
        meta = pl_module.data_meta
        self.evaluator, reason = make_evaluator(meta, pl_module.sizes, episodes=pl_module.run.eval_episodes)
        if self.evaluator is not None:
            if hasattr(pl_module, "value_of"):
                self.order = make_order(meta, pl_module.option("subgoal_steps", 25))
            self.facts = {"env": simulator_version(meta["env_id"]), "score_kind": score_kind(meta)}
        return reason

    def measure(self, pl_module: Any) -> dict[str, float]:
        if self._broken:
            reason = self.open(pl_module)
            if reason:
                raise UsageError(reason)
            self._broken = False
        if self.evaluator is None:
            return {}
        return over_seeds(pl_module, self.play)

    def play(self, method: Any) -> dict[str, float]:
        """The numbers of a method of one seed."""
        assert self.evaluator is not None
        found = summarize(self.evaluator.run(method.agent()), method.data_meta)
        return found | (self.order(method.value_of) if self.order else {})

    def late(self, method: Any, updates: int) -> dict[str, Any]:
        """The row that a finished run still owes, of a method loaded from its last checkpoint; empty for none."""
        try:
            self.open(method)
            numbers = {f"eval/{name}": value for name, value in self.measure(method).items()}
        except (Exception, SystemExit) as error:
            if method.run.eval_errors == "stop":
                raise EvaluationFailed(f"the evaluation at update {updates:,} failed: {told(error)}") from error
            return {"step": updates, "error": told(error), **self.facts}
        finally:
            self.close()
        self.best = keep_best(numbers, self.best)
        return {"step": updates, **numbers, **self.facts} if numbers else {}

    def reset(self) -> None:
        self._broken = True
        self.close()

    def close(self) -> None:
        """Close the environments."""
        if self.evaluator is not None:
            self.evaluator.close()
            self.evaluator = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.close()


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
            numbers = pl_module._of_all_processes(self.received)  # whoever got it, all end with its exit code
            pl_module.interrupted_by = max(numbers) or signal.SIGINT
            trainer.should_stop = True
            if run_folder(trainer) is None:
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


class RunFolder(Checkpoint):
    """The files of a run: ``metrics.csv``, ``evals.csv``, ``checkpoints/step=….ckpt`` and, at the end, ``curves.png``.

    Checkpoints are written before every evaluation (and after it, see ``Module.saved_again``), at the last update, on
    interruption and when the method asks. The newest two are kept and the one with the best evaluation. Rows beyond the
    checkpoint that a run continues from are cut, never others, and checkpoints beyond it are set aside as
    ``….ckpt.replaced``: "last" means the last of the run as it goes on.
    Lightning runs this callback after all others, so that files hold what the others found.

    Args:
        folder: of the run.
        keep: how many of the newest checkpoints stay, ≥ 1.
    """

    in_run_folder = True  # its checkpoints lie in <folder>/checkpoints, where data look which versions are needed

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.metrics = Table(self.folder / "metrics.csv")
        self.evals = Table(self.folder / "evals.csv")
        self.best_path = ""
        self.best_value: float | None = None
        self.earlier: dict[str, Any] = {}  # row of the evaluation of the update that the run goes on from
        self._saved = -1  # update of the newest checkpoint, and of the newest row of each table
        self._rows: dict[Path, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))  # the first process chose it
        self.metrics, self.evals = Table(self.folder / "metrics.csv"), Table(self.folder / "evals.csv")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.metric_row, pl_module.eval_row = {}, {}
        self.earlier, self._saved, self._rows = {}, -1, {}
        if trainer.is_global_zero:
            for table in (self.metrics, self.evals):
                table.cut(trainer.global_step)
            for path in self.folder.glob("checkpoints/step=*.ckpt"):
                if path.name > checkpoint_name(trainer.global_step):
                    path.rename(path.with_name(path.name + ".replaced"))
            newest: dict[str, Any] = next(reversed(self.evals.rows()), {})
            if newest.get("step") == trainer.global_step:
                self.earlier, self._rows[self.evals.path] = newest, trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.eval_row.get("step") == trainer.global_step != self._saved:  # of the update it goes on from
            self._append(trainer, self.evals, pl_module.eval_row)
            self._judge(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not pl_module.step_ended:
            return
        updates = trainer.global_step
        self._append(trainer, self.metrics, pl_module.metric_row)
        self._append(trainer, self.evals, pl_module.eval_row)
        if (
            due(updates, pl_module.run.eval_every, trainer.max_steps)
            or trainer.should_stop
            or pl_module.wants_checkpoint()
        ):
            evaluated = pl_module.eval_row.get("step") == updates
            if self._saved == updates and not (evaluated and pl_module.saved_again):
                self._judge(trainer, pl_module)
                self._prune(trainer)
            else:
                self.save(trainer, pl_module)

    def before_evaluation(self, trainer: Trainer, pl_module: Any) -> None:
        """Row of metrics and checkpoint of this update, before anything that may fail."""
        self._append(trainer, self.metrics, pl_module.metric_row)
        self.save(trainer, pl_module)

    def save(self, trainer: Trainer, pl_module: Any) -> None:
        """Write a checkpoint, and remove those that nobody needs any more."""
        self._judge(trainer, pl_module)
        trainer.save_checkpoint(self.folder / "checkpoints" / checkpoint_name(trainer.global_step))
        self._saved = trainer.global_step
        self._prune(trainer)

    def keep_trace(self, updates: int, error: BaseException) -> None:
        """Write where an evaluation failed, for whoever mends it."""
        text = "".join(traceback.format_exception(error))
        with contextlib.suppress(WriteError):  # the error itself is told in any case
            atomic_write(self.folder / "evaluation-error.txt", f"Evaluation at update {updates}\n{text}")

    def _append(self, trainer: Trainer, table: Table, row: Mapping[str, Any]) -> None:
        """Write the row of this update, once."""
        updates = trainer.global_step
        if trainer.is_global_zero and row.get("step") == updates and self._rows.get(table.path) != updates:
            table.append(row)
            self._rows[table.path] = updates

    def _judge(self, trainer: Trainer, pl_module: Any) -> None:
        """Remember the checkpoint of this update if its evaluation is the best."""
        row = pl_module.eval_row if pl_module.eval_row.get("step") == trainer.global_step else {}
        key = headline(row)
        if key is not None and is_better(row[key], self.best_value):
            self.best_value, self.best_path = row[key], checkpoint_name(trainer.global_step)

    def _prune(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("checkpoints/step=*.ckpt"))[: -self.keep]:
                if old.name != self.best_path:
                    old.unlink(missing_ok=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            plot_curves(self.folder)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Keep the row in which a run was found to have diverged."""
        if isinstance(exception, DivergenceError):
            self._append(trainer, self.metrics, pl_module.metric_row)

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
        if "error" in getattr(trainer.lightning_module, "eval_row", {}):  # the numbers of an earlier one would mislead
            found = {name: value for name, value in found.items() if not name.startswith("eval/")}
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
