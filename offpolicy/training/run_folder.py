"""The files of a run in training: rows of its tables, its checkpoints, and its curves at the end."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from offpolicy.errors import DivergenceError
from offpolicy.files import Table, WriteError, atomic_write
from offpolicy.training.checkpoints import checkpoint_name
from offpolicy.training.curves import plot_curves
from offpolicy.training.headlines import headline, is_better
from offpolicy.training.run_log import RunLog, due
from offpolicy.training.slices import wide_row


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
    run_log: RunLog

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.metrics = Table(self.folder / "metrics.csv")
        self.evals = Table(self.folder / "evals.csv")
        self.best_path = ""
        self.best_value: float | None = None
        self.seeds: tuple[int, ...] = ()
        self.earlier: dict[str, Any] = {}  # row of the evaluation of the update that the run goes on from
        self._saved = -1  # update of the newest checkpoint, and of the newest row of each table
        self._rows: dict[Path, int] = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.run_log = pl_module.run_log
        self.run_log.files, self.seeds = self, pl_module.seeds
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))  # the first process chose it
        self.metrics, self.evals = Table(self.folder / "metrics.csv"), Table(self.folder / "evals.csv")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.run_log.metrics, self.run_log.evaluation = {}, {}
        self.earlier, self._saved, self._rows = {}, -1, {}
        if trainer.is_global_zero:
            self.go_back(trainer.global_step)
            newest: dict[str, Any] = next(reversed(self.evals.rows()), {})
            if newest.get("step") == trainer.global_step:
                self.earlier, self._rows[self.evals.path] = newest, trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        row = self.run_log.evaluation_at(trainer.global_step)
        if row and trainer.global_step != self._saved:  # of the update it goes on from
            self._append(trainer, self.evals, row)
            self._judge(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not pl_module.step_ended:
            return
        updates = trainer.global_step
        self._append(trainer, self.metrics, self.run_log.metrics)
        self._append(trainer, self.evals, self.run_log.evaluation)
        if (
            due(updates, pl_module.run.eval_every, trainer.max_steps)
            or trainer.should_stop
            or pl_module.wants_checkpoint()
        ):
            evaluated = bool(self.run_log.evaluation_at(updates))
            if self._saved == updates and not (evaluated and pl_module.saved_again):
                self._judge(trainer)
                self._prune(trainer)
            else:
                self.save(trainer, pl_module)

    def go_back(self, updates: int) -> None:
        """Cut the rows and set aside the checkpoints beyond the update that the run goes on from."""
        for table in (self.metrics, self.evals):
            table.cut(updates)
        for path in self.folder.glob("checkpoints/step=*.ckpt"):
            if path.name > checkpoint_name(updates):
                path.rename(path.with_name(path.name + ".replaced"))

    def keep_settings(self, config: str, versions: Mapping[str, Any], command: str) -> None:
        """Write what repeats the run, and add the command that it starts with now."""
        atomic_write(self.folder / "config.yaml", config)
        atomic_write(self.folder / "versions.json", json.dumps(versions, indent=2) + "\n")
        commands = self.folder / "command.txt"
        atomic_write(commands, (commands.read_text() if commands.exists() else "") + f"{command}\n")

    def before_evaluation(self, trainer: Trainer, pl_module: Any) -> None:
        """Row of metrics and checkpoint of this update, before anything that may fail."""
        self._append(trainer, self.metrics, self.run_log.metrics)
        self.save(trainer, pl_module)

    def save(self, trainer: Trainer, pl_module: Any) -> None:
        """Write a checkpoint, and remove those that nobody needs any more."""
        self._judge(trainer)
        trainer.save_checkpoint(self.path_of(trainer.global_step))
        self._saved = trainer.global_step
        self._prune(trainer)

    def keep_trace(self, updates: int, error: BaseException) -> None:
        """Write where an evaluation failed, for whoever mends it."""
        text = "".join(traceback.format_exception(error))
        with contextlib.suppress(WriteError):  # the error itself is told in any case
            atomic_write(self.folder / "evaluation-error.txt", f"Evaluation at update {updates}\n{text}")

    def _append(self, trainer: Trainer, table: Table, row: Mapping[str, Any]) -> None:
        """Write the row of this update, once."""
        updates, row = trainer.global_step, wide_row(row, self.seeds)
        if trainer.is_global_zero and row.get("step") == updates and self._rows.get(table.path) != updates:
            self.write(table, row)
            self._rows[table.path] = updates

    def _judge(self, trainer: Trainer) -> None:
        self.judge(self.run_log.evaluation_at(trainer.global_step), trainer.global_step)

    def _prune(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self.prune()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.draw()

    # -- without a Trainer ---------------------------------------------------------------------------------------------

    def path_of(self, updates: int) -> Path:
        """The checkpoint of an update."""
        return self.folder / "checkpoints" / checkpoint_name(updates)

    def write(self, table: Table, row: Mapping[str, Any]) -> None:
        """Add a row to a table."""
        table.append(row)

    def judge(self, row: Mapping[str, Any], updates: int) -> None:
        """Remember the checkpoint of an update if its evaluation is the best."""
        key = headline(row)
        if key is not None and is_better(row[key], self.best_value):
            self.best_value, self.best_path = row[key], checkpoint_name(updates)

    def prune(self) -> None:
        """Remove the checkpoints that nobody needs any more."""
        for old in sorted(self.folder.glob("checkpoints/step=*.ckpt"))[: -self.keep]:
            if old.name != self.best_path:
                old.unlink(missing_ok=True)

    def draw(self) -> None:
        """Draw the curves of the tables."""
        plot_curves(self.folder)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Keep the row in which a run was found to have diverged."""
        if isinstance(exception, DivergenceError):
            self._append(trainer, self.metrics, self.run_log.metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"best_path": self.best_path, "best_value": self.best_value}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.best_path, self.best_value = state_dict["best_path"], state_dict["best_value"]
