"""Learning curves of several seeds on one axis: the mean or IQM, how sure it is, and each seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from offpolicy.errors import UsageError
from offpolicy.evaluation.aggregates import bootstrap_band, interquartile_mean
from offpolicy.evaluation.scores import FEWEST, interval
from offpolicy.report.records import RunRecord

MOST_POINTS = 200  # of a mean curve; evaluations beyond them are left out evenly
AXES = ("updates", "samples", "steps", "hours")
ENV_STEPS = ("env/steps", "train/env/steps", "env_steps", "train/env_steps")  # columns of runs that play


class Line(NamedTuple):
    """The numbers of one run along an axis, (T,) each."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class MeanCurve:
    """What several runs have in common.

    Attributes:
        x, y: mean or IQM on the union of the evaluations of all runs, up to the end of the shortest, (T,).
        low, high: 95 % interval at each, (T,); None of fewer than three seeds.
        lines: of each run.
        switch: place at which all of them began to collect, after training on data; None where they did not.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    lines: tuple[Line, ...]
    switch: float | None = None


def line_of(record: RunRecord, column: str, axis: str = "updates", *, of_metrics: bool = False) -> Line:
    """A column of a run's evaluations, or of its metrics, along an axis: empty where the run does not count that.

    Args:
        record: the run.
        column: name of the numbers.
        axis: "updates", "samples" (updates times the batch), "steps" of an environment (for runs that play while they
            learn), or "hours" of training.
        of_metrics: take ``metrics.csv``.
    """
    if of_metrics:
        steps, values = record.curves.get(column, (np.empty(0), np.empty(0)))
    else:
        pairs = [(row["step"], row[column]) for row in record.run.rows if _is_number(row.get(column))]
        steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    x = along(record, steps, axis)
    return Line(x, values) if x is not None else Line(np.empty(0), np.empty(0))


def along(record: RunRecord, steps: np.ndarray, axis: str) -> np.ndarray | None:
    """Updates as places on an axis; None where the run does not count that."""
    if axis == "updates":
        return steps
    if axis == "samples":
        return None if record.batch_size is None else steps * record.batch_size
    if axis == "hours":
        known, seconds = record.clock
        return np.interp(steps, [0.0, *known], [0.0, *seconds / 3600.0]) if len(known) else None
    column = next((name for name in ENV_STEPS if name in record.curves), None)
    return np.interp(steps, *record.curves[column]) if column else None


def switch_place(records: Sequence[RunRecord], axis: str) -> float | None:
    """Where on an axis runs began to collect; None where some did not, or not at one place."""
    places = [along(one, np.array([one.switch["switch"]]), axis) if one.switch else None for one in records]
    known = {float(place[0]) for place in places if place is not None}
    return known.pop() if len(known) == 1 and all(place is not None for place in places) else None


def check_axis(records: Sequence[RunRecord], axis: str) -> None:
    """Refuse an axis that no run counts.

    Raises:
        UsageError: none does.
    """
    if records and all(along(record, np.ones(1), axis) is None for record in records):
        why = {
            "samples": "says its `batch_size`",
            "hours": "has perf/updates_per_s in metrics.csv",
            "steps": "counts steps of an environment while it learns",
        }
        raise UsageError(f"no run here {why[axis]}; expected one for `--x {axis}`. Take --x updates.")


def on_grid(lines: Sequence[Line]) -> tuple[np.ndarray, np.ndarray]:
    """Runs on the union of their places: at each the last value at or before it, never a value in between.

    Returns:
        Places (T,) from where all runs have begun to where the shortest ends, and values (runs, T).
    """
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return np.empty(0), np.empty((0, 0))
    begin, end = max(line.x[0] for line in lines), min(line.x[-1] for line in lines)
    x = np.unique(np.concatenate([line.x for line in lines]))
    x = x[(x >= begin) & (x <= end)]
    if len(x) > MOST_POINTS:
        x = x[np.linspace(0, len(x) - 1, MOST_POINTS).astype(int)]
    return x, np.stack([line.y[np.searchsorted(line.x, x, side="right") - 1] for line in lines])


def mean_curve(lines: Sequence[Line]) -> MeanCurve | None:
    """The mean over the seeds of one task with Student's 95 % interval; None without a place that all have."""
    lines = [_finite(line) for line in lines]
    x, values = on_grid(lines)
    if not len(x):
        return None
    y, low, high = values.mean(0), None, None
    if len(values) >= FEWEST:
        half = np.array([interval(column) for column in values.T])
        low, high = y - half, y + half
    return MeanCurve(x, y, low, high, tuple(lines))


def suite_curve(
    tasks: Mapping[str, Sequence[Line]], statistic: Callable[..., np.ndarray] = interquartile_mean
) -> MeanCurve | None:
    """The IQM over runs and tasks by the share of training, with the band of the stratified bootstrap.

    Of tasks with unequal numbers of runs the first ones of each count. Tasks differ in length, so x is the share of the
    longest run of each task, in [0, 1].
    """
    shares = []
    for lines in tasks.values():
        found = [_finite(line) for line in lines if len(line.x)]
        longest = max((line.x[-1] for line in found), default=0.0)
        shares.append([Line(line.x / longest, line.y) for line in found if longest > 0])
    runs = min(map(len, shares), default=0)
    if not runs:
        return None
    x, values = on_grid([line for lines in shares for line in lines[:runs]])
    if not len(x):
        return None
    matrix = values.reshape(len(shares), runs, len(x)).swapaxes(0, 1)  # (n, m, T)
    y = np.array([statistic(matrix[..., t]) for t in range(len(x))])
    low, high = bootstrap_band(statistic, matrix) if runs >= FEWEST else (None, None)
    return MeanCurve(x, y, low, high, ())


def _finite(line: Line) -> Line:
    """A line up to its first number that is not finite: there it has diverged."""
    bad = np.flatnonzero(~np.isfinite(line.y))
    return Line(line.x[: bad[0]], line.y[: bad[0]]) if len(bad) else line


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
