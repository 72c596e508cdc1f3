"""What judges a method in training: episodes in the environment of its data, or numbers on data held out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from offpolicy.errors import DataError, UsageError, described
from offpolicy.evaluation.order import OrderConsistency, make_order
from offpolicy.evaluation.rollout import Evaluator, make_evaluator
from offpolicy.evaluation.scores import score_kind, simulator_note, simulator_version, summarize
from offpolicy.training.checkpoints import checkpoint_name
from offpolicy.training.headlines import keep_best
from offpolicy.training.run_log import RunLog, due
from offpolicy.training.seeds import over_seeds

log = logging.getLogger(__name__)


def told(error: BaseException) -> str:
    """An error as one sentence: our own messages as they are, others with their kind and place."""
    text = str(error) if isinstance(error, (UsageError, DataError)) else described(error)
    return text if text.endswith((".", "!", "?")) else f"{text}."


class EvaluationFailed(UsageError):
    """An evaluation raised an error; the checkpoint of its update had been written before."""


class Measurement(Callback):
    """Base of what judges a method every ``eval_every`` updates and after the last.

    Numbers arrive as ``eval/…`` in the Trainer's metrics and as the ``evaluation`` of the run's log, with the best so
    far. In a run folder the checkpoint of an update is written before its evaluation (unless ``run.save_every`` says
    when), so that an evaluation that fails, hangs or kills the process costs no training; a run that goes on from there
    makes up for the evaluation first, if it has no row.
    """

    everywhere = True  # measured on every process, or on the first alone
    run_log: RunLog

    def __init__(self) -> None:
        self.best: float | None = None
        self.bests: dict[int, float | None] = {}  # of each seed of several
        self.facts: dict[str, str] = {}  # stand in every row
        self.outstanding = False  # the evaluation of the update at hand

    def measure(self, pl_module: Any) -> dict[str, float]:
        """The numbers, asked on every process; those of the first count, none at all write no row."""
        raise NotImplementedError

    def reset(self) -> None:
        """Called after an evaluation that failed: what it worked with may be broken."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.run_log = pl_module.run_log
        self.run_log.measurement = self

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.run_log.evaluation = {}
        if not trainer.ckpt_path:
            pl_module.space_evaluations(trainer.max_steps)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.outstanding |= pl_module.evaluates_first  # where it was evaluated already, that row is taken

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if self.outstanding:
            self.outstanding = False
            self.make_up(trainer, pl_module)

    def make_up(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure now, unless this update was measured before."""
        if self.run_log.evaluation_at(trainer.global_step):
            return
        row = trainer.strategy.broadcast({} if self.run_log.files is None else self.run_log.files.earlier)
        if row.get("step") == trainer.global_step:  # after the checkpoint that training goes on from
            self.keep_best(dict(row), pl_module.seeds)
            self.run_log.evaluation = row
        else:
            self.evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        measures = pl_module.step_ended and due(trainer.global_step, pl_module.eval_every, trainer.max_steps)
        pl_module.stop_clock(wait=measures)
        if not measures:
            return
        if self.run_log.files is not None:
            self.outstanding = True
            self.run_log.files.before_evaluation(trainer, pl_module)
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
        self.keep_best(numbers, pl_module.seeds)
        numbers, reason = trainer.strategy.broadcast((numbers, "" if failure is None else told(failure)))
        if reason:
            self._fail(trainer, pl_module, reason, failure)
        elif numbers:
            pl_module.show_callbacks(numbers)
            pl_module.log_to_loggers(numbers, updates)
            self.run_log.evaluation = {"step": updates, **pl_module.facts_of_update(), **numbers, **self.facts}

    def keep_best(self, numbers: dict[str, float], seeds: tuple[int, ...]) -> None:
        """Add the best so far to the numbers of an evaluation: of the mean over seeds, and of each seed by itself."""
        self.best = keep_best(numbers, self.best)
        self.bests = {seed: keep_best(numbers, self.bests.get(seed), f"_seed{seed}") for seed in seeds}

    def _fail(self, trainer: Trainer, pl_module: Any, reason: str, failure: BaseException | None) -> None:
        updates, files = trainer.global_step, self.run_log.files
        if files is not None and failure is not None:
            files.keep_trace(updates, failure)
        if pl_module.run.eval_errors == "skip":
            log.warning("The evaluation at update %d failed, and the run goes on without it: %s", updates, reason)
            self.run_log.evaluation = {"step": updates, "error": reason, **self.facts}
            return
        self.outstanding = True
        if files is not None:
            files.keep_failed(trainer, pl_module)
        else:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / checkpoint_name(updates))
        error = EvaluationFailed(
            f"the evaluation at update {updates:,} failed: {reason} The checkpoint of this update is kept; "
            "--run.eval_errors=skip goes on without scores."
        )
        error.together = True  # every process has been told
        raise error from failure

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"best": self.best, "outstanding": self.outstanding}
        return state | ({"of_seeds": {k: {"best": best} for k, best in self.bests.items()}} if self.bests else {})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.best, self.outstanding = state_dict["best"], state_dict.get("outstanding", False)
        self.bests = {seed: state["best"] for seed, state in state_dict.get("of_seeds", {}).items()}


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
                self.order = make_order(meta, pl_module.order_steps)
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
        self.keep_best(numbers, method.seeds)
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
