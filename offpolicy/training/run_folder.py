"""The files of a run in training: rows of its tables, its checkpoints, and its curves at the end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from offpolicy.errors import DivergenceError
from offpolicy.files import Table, WriteError, atomic_write
from offpolicy.training.background import Writing
from offpolicy.training.checkpoint_io import AtomicCheckpointIO
from offpolicy.training.checkpoints import checkpoint_name
from offpolicy.training.curves import plot_curves
from offpolicy.training.headlines import is_better_by, judged_by
from offpolicy.training.keeping import Keeping
from offpolicy.training.run_log import RunLog, due
from offpolicy.training.selection import SELECTED, selection_of
from offpolicy.training.sharded import remove
from offpolicy.training.slices import wide_row

log = logging.getLogger(__name__)


class RunFolder(Checkpoint):
    """The files of a run: ``metrics.csv``, ``evals.csv``, ``checkpoints/step=….ckpt`` and, at the end, ``curves.png``.

    Checkpoints are written before every evaluation (and after it, see ``Module.saved_again``) or every
    ``run.save_every`` updates and after the best evaluation, at the last update, on interruption and when the method
    asks. ``run.keep`` says which stay; ``checkpoints/best`` is a link to the one with the best evaluation, and
    ``checkpoints/selected`` to the one that ``run.select`` chose, until which all stay. Rows beyond the
    checkpoint that a run continues from are cut, never others, and checkpoints beyond it are set aside as
    ``….ckpt.replaced``: "last" means the last of the run as it goes on.
    Lightning runs this callback after all others, so that files hold what the others found.
    """

    in_run_folder = True  # its checkpoints lie in <folder>/checkpoints, where data look which versions are needed
    run_log: RunLog

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.keeping = Keeping()
        self.writing = Writing()
        self._unpruned = False  # since a checkpoint is being written
        self.final = False  # the checkpoint at hand is the last, and is to hold weights alone
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
        self.keeping = Keeping.of(pl_module.run.keep if pl_module.run.select == "none" else "all")
        io: Any = trainer.strategy.checkpoint_io
        if isinstance(io, AtomicCheckpointIO):  # under a plain Trainer it can be another
            self.writing, io.beside = io.writing, self.beside(pl_module.run.async_save)
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
        self._look_after_writing(trainer)
        if not pl_module.step_ended:
            return
        updates = trainer.global_step
        self._append(trainer, self.metrics, self.run_log.metrics)
        self._append(trainer, self.evals, self.run_log.evaluation)
        improved = self._judge(trainer) and self.keeping.best
        if (
            improved
            or due(updates, pl_module.save_every, trainer.max_steps)
            or trainer.should_stop
            or pl_module.wants_checkpoint()
        ):
            evaluated = bool(self.run_log.evaluation_at(updates))
            if self._saved == updates and not (evaluated and pl_module.saved_again):
                self._prune(trainer)
            else:
                self.save(trainer, pl_module)

    def go_back(self, updates: int) -> None:
        """Cut the rows and set aside the checkpoints beyond the update that the run goes on from."""
        for table in (self.metrics, self.evals):
            table.cut(updates)
        for path in self.folder.glob("checkpoints/step=*.ckpt"):
            if path.name > checkpoint_name(updates):
                aside = path.with_name(path.name + ".replaced")
                remove(aside)  # a sharded one is a folder, which takes the place of no other
                path.rename(aside)
        if selection_of(self.folder).get("step", 0) > updates:  # it was one of those
            for left in (self.folder / SELECTED, self.folder / "checkpoints" / "selected"):
                left.unlink(missing_ok=True)

    def keep_settings(self, config: str, versions: Mapping[str, Any], command: str) -> None:
        """Write what repeats the run, and add the command that it starts with now."""
        atomic_write(self.folder / "config.yaml", config)
        atomic_write(self.folder / "versions.json", json.dumps(versions, indent=2) + "\n")
        commands = self.folder / "command.txt"
        atomic_write(commands, (commands.read_text() if commands.exists() else "") + f"{command}\n")

    def before_evaluation(self, trainer: Trainer, pl_module: Any) -> None:
        """Row of metrics and checkpoint of this update, before anything that may fail."""
        self._append(trainer, self.metrics, self.run_log.metrics)
        if due(trainer.global_step, pl_module.save_every, trainer.max_steps):
            self.save(trainer, pl_module)

    def keep_failed(self, trainer: Trainer, pl_module: Any) -> None:
        """A checkpoint of this update, whose evaluation has failed, on the disk before the run ends."""
        if self._saved != trainer.global_step:
            self.save(trainer, pl_module)
        self.settle()

    def settle(self) -> None:
        """Wait until the newest checkpoint is on the disk.

        Raises:
            WriteError: it cannot be written.
        """
        self.writing.wait()

    def beside(self, choice: bool | str) -> bool | str:
        """Whether checkpoints are written while training goes on, as ``run.async_save`` asks."""
        return choice

    def _look_after_writing(self, trainer: Trainer) -> None:
        """Stop where a checkpoint could not be written; once it is on the disk, remove those that nobody needs."""
        if not self.writing.pending:
            self.writing.check()
            if self._unpruned:
                self._prune(trainer)

    def save(self, trainer: Trainer, pl_module: Any) -> None:
        """Write a checkpoint, and remove those that nobody needs any more."""
        self._append(trainer, self.evals, self.run_log.evaluation)
        self._judge(trainer)
        self.final = pl_module.run.final == "weights_only" and trainer.global_step == trainer.max_steps
        self.settle()  # one at a time, and the data ask which checkpoints there are
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

    def _judge(self, trainer: Trainer) -> bool:
        return self.judge(self.run_log.evaluation_at(trainer.global_step), trainer.global_step)

    def _prune(self, trainer: Trainer) -> None:
        self._unpruned = self.writing.pending  # nothing is removed before its successor is whole
        if trainer.is_global_zero and not self._unpruned:
            self.prune()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.settle()
        self._look_after_writing(trainer)
        if trainer.is_global_zero:
            self.draw()

    # -- without a Trainer ---------------------------------------------------------------------------------------------

    def path_of(self, updates: int) -> Path:
        """The checkpoint of an update."""
        return self.folder / "checkpoints" / checkpoint_name(updates)

    def write(self, table: Table, row: Mapping[str, Any]) -> None:
        """Add a row to a table."""
        table.append(row)

    def judge(self, row: Mapping[str, Any], updates: int) -> bool:
        """Remember the checkpoint of an update if its evaluation is the best so far; whether it is."""
        key = judged_by(row)
        if key is None or not is_better_by(key, row[key], self.best_value):
            return False
        self.best_value, self.best_path = row[key], checkpoint_name(updates)
        return True

    def prune(self) -> None:
        """Remove the checkpoints that nobody needs any more, and let the link lead to the best."""
        lying = {path.name: path for path in self.folder.glob("checkpoints/step=*.ckpt")}
        selected = selection_of(self.folder)
        stays = {checkpoint_name(selected["step"])} if selected else set()
        for name in lying.keys() - self.keeping.kept(lying, self.best_path) - stays:
            remove(lying[name])
        self.link_best()

    def link_best(self) -> None:
        """Let ``best`` lead to the checkpoint with the best evaluation; none where that does not lie there."""
        self.link("best", self.best_path or "none")

    def link(self, name: str, target: str) -> None:
        """Let a name lead to a checkpoint, or to none where that does not lie there."""
        link = self.folder / "checkpoints" / name
        with contextlib.suppress(OSError):  # a file system without links
            if not link.with_name(target).exists():
                link.unlink(missing_ok=True)
            elif not link.is_symlink() or os.readlink(link) != target:
                temporary = link.with_name(f".{name}.{os.getpid()}.tmp")
                temporary.symlink_to(target)
                os.replace(temporary, link)

    def best_words(self) -> str:
        """The checkpoint with the best evaluation, in words; empty where there is none."""
        if self.best_value is None or not (self.folder / "checkpoints" / self.best_path).exists():
            return ""
        updates = int(re.findall(r"\d+", self.best_path)[0])
        return f"update {updates:,} ({self.best_value:.4g}), checkpoints/{self.best_path}"

    def draw(self) -> None:
        """Draw the curves of the tables."""
        plot_curves(self.folder)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Keep the row in which a run was found to have diverged, and let what is being written come to its end."""
        if not isinstance(exception, KeyboardInterrupt):
            try:
                self.settle()
            except Exception as error:  # the run ends for another reason, which is told
                log.warning("The newest checkpoint was not written: %s", error)
        if isinstance(exception, DivergenceError):
            self._append(trainer, self.metrics, self.run_log.metrics)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Leave out what training goes on with, where the last checkpoint is to hold weights alone."""
        for name in ("optimizer_states", "lr_schedulers", "loops") if self.final else ():
            checkpoint.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        return {"best_path": self.best_path, "best_value": self.best_value}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.best_path, self.best_value = state_dict["best_path"], state_dict["best_value"]
