"""A table of methods by tasks: the mean over seeds with its interval, and who cannot be told from the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.evaluation.aggregates import AGGREGATES, bootstrap_interval, welch_difference
from offpolicy.evaluation.scores import FEWEST, interval
from offpolicy.report.runs import Run

SIGNIFICANT = 0.05


@dataclass
class Cell:
    """One method on one task.

    Attributes:
        runs: one per seed, in the order of their seeds.
        values: what they are compared by, in the same order.
        among_the_best: whether its mean is the best of the row, or not told from it.
    """

    runs: list[Run] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    among_the_best: bool = False

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


@dataclass
class Comparison:
    """Methods by tasks.

    Attributes:
        measure: what the numbers are: "score", "return", "accuracy", "loss", …
        which: "last" or "best" evaluation of each run.
        tasks, methods: rows and columns, in order.
        column: of ``evals.csv`` that holds it; empty for none.
        cells: by (task, method); a pair that was not run has none.
        notes: sentences on what is missing or not alike.
    """

    measure: str
    which: str
    tasks: list[str]
    methods: list[str]
    cells: dict[tuple[str, str], Cell]
    notes: list[str] = field(default_factory=list)
    column: str = ""

    def told(self, cell: Cell) -> str:
        """A cell in words: mean, interval and number of seeds; with few seeds their values."""
        digits = 1 if self.measure in ("score", "return") else 3
        mark = "*" if cell.among_the_best else ""
        if len(cell.values) < FEWEST:
            return (", ".join(f"{value:.{digits}f}" for value in cell.values) or "–") + mark
        return f"{cell.mean:.{digits}f} ± {interval(cell.values):.{digits}f} ({len(cell.values)}){mark}"


def compare_runs(runs: Sequence[Run], which: str = "last") -> list[Comparison]:
    """Compare finished runs, those that are judged by one measure in one table.

    Runs of one method with other settings on the same task are methods of their own. Of one seed the newest counts.

    Args:
        runs: of any methods and tasks.
        which: evaluation of each run that counts: "last", or its "best", which is chosen in the environment and so
            looks better than it is.
    """
    labels, tables = variants(runs), []
    by_measure: dict[str, list[Run]] = {}
    scoring = _of_runs([run for run in runs if run.estimates], "of fitted Q evaluation, which is no method to compare")
    for run in runs:
        if run.estimates:
            continue
        by_measure.setdefault(run.judged_by() or "", []).append(run)
    without = by_measure.pop("", [])
    for column, members in by_measure.items():
        better = min if column.endswith("loss") else max
        done = [run for run in members if run.finished]
        bad = [run for run in done if not math.isfinite(run.values(column)[-1])]
        cells, older = _cells([run for run in done if run not in bad], labels)
        for cell in cells.values():
            numbers = [run.values(column) for run in cell.runs]
            cell.values = [some[-1] if which == "last" else better(filter(math.isfinite, some)) for some in numbers]
        tasks = sorted({task for task, _ in cells})
        methods = list(dict.fromkeys(method for _, method in cells))
        for task in tasks:
            mark_best([cells[task, method] for method in methods if (task, method) in cells], better)
        notes = _of_runs([run for run in members if not run.finished], "not finished and left out")
        notes += _of_runs(bad, "with a last evaluation that is not finite and left out")
        notes += _of_runs(older, "older than another run of the same seed and settings, and left out")
        measure = column.rpartition("/")[2].removesuffix("_mean")
        found = Comparison(measure, which, tasks, methods, cells, notes, column)
        found.notes += _unlike(found)
        tables.append(found)
    told = [*_of_runs(without, "without an evaluation and left out"), *scoring]
    return [*tables, Comparison("", which, [], [], {}, told)] if told else tables


def _cells(runs: Sequence[Run], labels: Mapping[Path, str]) -> tuple[dict[tuple[str, str], Cell], list[Run]]:
    """Runs by (task, method), one per seed, and the older ones of a seed that has several."""
    newest: dict[tuple[str, str, int], Run] = {}
    for run in sorted(runs, key=_written):
        newest[run.data, labels[run.folder], run.seed] = run
    cells: dict[tuple[str, str], Cell] = {}
    for (task, method, _), run in sorted(newest.items(), key=lambda item: item[0]):
        cells.setdefault((task, method), Cell()).runs.append(run)
    kept = {run.folder for run in newest.values()}
    return cells, [run for run in runs if run.folder not in kept]


def _written(run: Run) -> float:
    path = run.folder / "evals.csv"
    return path.stat().st_mtime if path.exists() else 0.0


def _of_runs(runs: Sequence[Run], words: str) -> list[str]:
    if not runs:
        return []
    names = ", ".join(str(run.folder) for run in runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
    return [f"{len(runs)} {'run is' if len(runs) == 1 else 'runs are'} {words}: {names}."]


def _unlike(found: Comparison) -> list[str]:
    """What is not alike among the runs of one row."""
    notes = []
    for task in found.tasks:
        runs = [run for method in found.methods for run in getattr(found.cells.get((task, method)), "runs", ())]
        updates = sorted({run.updates for run in runs})
        if len(updates) > 1:
            notes.append(f"{task}: runs of {updates[0]:,} to {updates[-1]:,} updates are compared.")
        kinds = sorted({str(run.rows[-1].get("score_kind")) for run in runs})
        if len(kinds) > 1:
            notes.append(f"{task}: scores are of different kinds: {'; '.join(kinds)}.")
    for method in found.methods if len(found.tasks) > 1 else ():
        counts = sorted({len(found.cells[task, method].runs) for task in found.tasks if (task, method) in found.cells})
        if len(counts) > 1:
            notes.append(f"{method}: {counts[0]} to {counts[-1]} seeds by task; aggregates take {counts[0]} of each.")
    if found.measure == "score" and len(found.tasks) > 1 and all(score_matrix(found, m) is None for m in found.methods):
        notes.append("No method has two seeds on every task, so there are no aggregates over tasks.")
    few = [cell for cell in found.cells.values() if len(cell.values) < FEWEST]
    if few:
        cells = "1 cell has" if len(few) == 1 else f"{len(few)} cells have"
        notes.append(f"{cells} fewer than {FEWEST} seeds: the values are shown and no interval.")
    return notes


def variants(runs: Sequence[Run]) -> dict[Path, str]:
    """A name for the method of each run, by its folder: with the settings in which runs of one task differ."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.data, run.method), []).append(run)
    names = {}
    for (_, method), members in groups.items():
        keys = dict.fromkeys(key for run in members for key in run.settings)
        differ = [key for key in keys if len({repr(run.settings.get(key)) for run in members}) > 1]
        for run in members:
            told = ", ".join(f"{key.removeprefix('model.')}={run.settings.get(key)}" for key in differ)
            names[run.folder] = f"{method} {told}".strip()
    return names


def mark_best(cells: Sequence[Cell], better: Callable[..., Any] = max) -> None:
    """Mark the best mean of a row, its equals, and every method that Welch's test does not tell from it at 5 %."""
    if len(cells) < 2:
        return
    best = better(cells, key=lambda cell: cell.mean)
    for cell in cells:
        several = min(len(cell.values), len(best.values)) >= FEWEST
        alike = several and welch_difference(best.values, cell.values).p >= SIGNIFICANT
        cell.among_the_best = math.isclose(cell.mean, best.mean) or alike


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, which is None where there are too few seeds for one."""

    value: float
    low: float | None = None
    high: float | None = None

    def told(self, digits: int = 1) -> str:
        span = "" if self.low is None else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{self.value:.{digits}f}{span}"


def aggregates_of(found: Comparison, replicates: int = 20_000) -> dict[str, list[Estimate | None]]:
    """Aggregates over all tasks by method, with intervals of the stratified bootstrap; none for a single task, or where
    no method has two seeds on every task.

    Returns:
        By the name of an aggregate a number per method, in the order of the methods and in the unit of the table. None
        for a method that lacks a task or has a single seed somewhere. Of unequal numbers of seeds the first ones of
        each task count. With fewer than three seeds there is no interval.
    """
    if len(found.tasks) < 2 or found.measure != "score":
        return {}
    matrices = [score_matrix(found, method) for method in found.methods]
    if all(x is None for x in matrices):
        return {}
    return {
        name: [None if x is None else _estimate(statistic, x, replicates) for x in matrices]
        for name, statistic in AGGREGATES.items()
    }


def _estimate(statistic: Callable[..., Any], x: np.ndarray, replicates: int) -> Estimate:
    value = 100.0 * float(statistic(x))
    if len(x) < FEWEST:
        return Estimate(value)
    low, high = bootstrap_interval(statistic, x, replicates=replicates)
    return Estimate(value, 100.0 * float(low), 100.0 * float(high))


def aggregate_lines(found: Comparison, replicates: int = 20_000) -> list[tuple[str, list[str]]]:
    """The same as texts: the name of an aggregate with a text per method, "–" where there is no number."""
    return [
        (name, ["–" if one is None else one.told() for one in line])
        for name, line in aggregates_of(found, replicates).items()
    ]


def score_matrix(found: Comparison, method: str, fewest: int = 2) -> np.ndarray | None:
    """Scores of a method, runs by tasks, with 1 as the reference; None of fewer runs on some task."""
    columns = [getattr(found.cells.get((task, method)), "values", []) for task in found.tasks]
    runs = min(map(len, columns))
    return np.stack([column[:runs] for column in columns], -1) / 100.0 if runs >= fewest else None


def as_text(found: Comparison, aggregates: Sequence[tuple[str, list[str]]] = ()) -> str:
    """The table for a terminal."""
    if not found.cells:
        return "\n".join(found.notes)
    rows = [["", *found.methods]]
    rows += [[task, *(found.told(found.cells.get((task, m), Cell())) for m in found.methods)] for task in found.tasks]
    rows += [[name, *texts] for name, texts in aggregates]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    told = [
        f"{found.measure}, {found.which} evaluation of each run: mean ± half of Student's 95 % interval (seeds).",
        f"* the best mean of a row, or not told from it by Welch's test at {SIGNIFICANT:.0%}.",
    ]
    if aggregates:
        told.append("Aggregates over tasks with 95 % intervals of the stratified bootstrap (arXiv:2108.13264).")
    return "\n".join([*lines, "", *told, *found.notes])


def as_rows(found: Comparison) -> list[Mapping[str, Any]]:
    """The same as rows, one per run."""
    return [
        {
            "data": task,
            "method": method,
            "seed": run.seed,
            "updates": run.updates,
            "measure": found.measure,
            "evaluation": found.which,
            "value": value,
            "folder": str(run.folder),
        }
        for (task, method), cell in sorted(found.cells.items())
        for run, value in zip(cell.runs, cell.values, strict=True)
    ]
