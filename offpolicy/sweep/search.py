"""A search for settings by Optuna: its trials are runs like any other, pruned by the scores of their evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from offpolicy.errors import UsageError, amount
from offpolicy.report.runs import Run, read_run
from offpolicy.sweep.jobs import DONE, PRUNED, STOPPED, Job, run_job
from offpolicy.sweep.plan import RunCell, SweepPlan, cell_of, settings_of
from offpolicy.sweep.pool import Tell, threads_of

FEWEST_TRIALS = 5  # before anything is pruned


def open_study(plan: SweepPlan, method: str, data: str) -> Any:
    """The study of a method on data, kept in a journal in the folder of the sweep."""
    try:
        import optuna
    except ImportError:
        raise UsageError("`search` needs the package optuna; install the extra: pip install -e '.[search]'.") from None
    assert plan.search is not None
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what failed is told
    plan.folder.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(plan.folder / "search.journal"))
    pruners = {
        "none": optuna.pruners.NopPruner(),
        "median": optuna.pruners.MedianPruner(n_startup_trials=FEWEST_TRIALS),
        "asha": optuna.pruners.SuccessiveHalvingPruner(),
    }
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=f"{method} on {data}",
        direction="maximize",
        pruner=pruners[plan.search.pruner],
        load_if_exists=True,
    )
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):  # of a sweep that was killed
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    begun = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=begun)  # the seed of an earlier call repeats its trials
    return study


def suggested(trial: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trial."""
    found = {}
    for name, one in space.items():
        if not isinstance(one, Mapping):
            found[name] = trial.suggest_categorical(name, list(one))
        elif all(isinstance(one[end], int) for end in ("low", "high")):
            found[name] = trial.suggest_int(name, one["low"], one["high"], log=bool(one.get("log")))
        else:
            found[name] = trial.suggest_float(name, float(one["low"]), float(one["high"]), log=bool(one.get("log")))
    return found


def search_settings(
    plan: SweepPlan, method: str, data: str, tell: Tell, run: Callable[..., Job] = run_job
) -> list[RunCell]:
    """Search for settings of a method on data; trials of an earlier call count.

    A trial's value is the mean over its seeds of the last evaluation (of a held-out loss its negative). Its first seed
    is compared with other trials at every evaluation and ends, with its checkpoint, where the pruner says so. A run
    that fails is a failed trial, never a score of 0.

    Returns:
        The runs of the best settings, empty where no trial has a value.

    Raises:
        KeyboardInterrupt: a run was ended by Ctrl-C or SIGTERM.
    """
    import optuna

    search = plan.search
    assert search is not None
    study, threads = open_study(plan, method, data), threads_of(plan)
    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    left = search.trials - len(study.get_trials(deepcopy=False, states=ended))
    stopped: list[Job] = []

    def objective(trial: Any) -> float:
        settings = settings_of(method, plan.set | suggested(trial, search.space))
        values = []
        for i, seed in enumerate(search.seeds):
            cell = cell_of(plan, method, data, settings, seed)
            log = plan.folder / "logs" / f"trial-{cell.folder.parent.name}-seed{seed}.log"
            watch = Pruning(trial, cell) if i == 0 and search.pruner != "none" else None
            job = Job([cell], log)
            try:
                job = run(job, plan, threads, None, watch)
            except KeyboardInterrupt:  # of this process: the run has saved by then
                job.state = STOPPED
            if watch is not None and job.state == PRUNED:
                tell(f"{method} on {data}, trial {trial.number}: pruned at update {watch.step:,}, {trial.params}")
                raise optuna.TrialPruned
            if job.state == STOPPED:
                stopped.append(job)
                study.stop()
                study.enqueue_trial(trial.params)  # the next call begins with it, and its run goes on
            if job.state != DONE:
                tell(f"{method} on {data}, trial {trial.number}: {job.state}, see {job.log}")
                raise TrialFailed(f"{job.name} is {job.state} with exit code {job.code}, see {job.log}")
            values.append(judged_values(read_run(cell.folder))[-1][1])
        value = sum(values) / len(values)
        tell(f"{method} on {data}, trial {trial.number}: {value:.4g}, {trial.params}")
        return value

    if left > 0:
        study.optimize(objective, n_trials=left, n_jobs=plan.workers, catch=(TrialFailed,))
    if stopped:
        tell(f"{stopped[0].name} was stopped, so no other trial begins. Run the same command again to go on.")
        raise KeyboardInterrupt
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if not done:
        tell(f"{method} on {data}: no trial has a value; see {plan.folder / 'logs'}.")
        return []
    best = study.best_trial
    tell(f"{method} on {data}: best of {amount(len(done), 'trial')} {best.value:.4g} with {best.params}")
    settings = settings_of(method, plan.set | best.params)
    return [cell_of(plan, method, data, settings, seed) for seed in search.seeds]


class TrialFailed(RuntimeError):
    """A run of a trial has failed."""


class Pruning:
    """Tells a study of every new evaluation of a run, and whether the run is to end.

    Attributes:
        pruned: whether it was ended.
        step: update of the newest evaluation.
    """

    def __init__(self, trial: Any, cell: RunCell) -> None:
        self.trial, self.cell, self.step, self.pruned = trial, cell, 0, False

    def __call__(self, job: Job) -> bool:
        try:
            found = judged_values(read_run(self.cell.folder))
        except UsageError:  # nothing there yet
            return False
        for step, value in found:
            if step > self.step:
                self.trial.report(value, step)
                self.step = step
                self.pruned = self.pruned or bool(self.trial.should_prune())
        return self.pruned


def judged_values(run: Run) -> list[tuple[int, float]]:
    """Update and value of every evaluation of a run, more being better.

    Raises:
        UsageError: it has none.
    """
    column = run.judged_by()
    sign = -1.0 if column and column.endswith("loss") else 1.0
    found = [(int(row["step"]), sign * float(row[column])) for row in run.rows if column and column in row]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    if not found:
        raise UsageError(f"{run.folder} has no evaluation; a search needs one. Set run.eval_every and eval_episodes.")
    return found
