"""What a run folder tells beside its evaluations: how the run ended, its curves of training, its speed, its origin."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import socket
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.compute.processes import LOCK
from offpolicy.files import MARGINS, read_file
from offpolicy.report.runs import Run, printable, versions_of
from offpolicy.training.headlines import is_loss_name
from offpolicy.training.switching import FILE as SWITCH

MOST_ROWS = 500  # of metrics that are drawn of one run
MOST_TEXT = 1 << 20  # characters of a file of margins
RATE, TOKENS, MEMORY = "perf/updates_per_s", "perf/tokens_per_s", "perf/peak_memory_mb"
Curve = tuple[np.ndarray, np.ndarray]  # updates (T,) and values (T,)

FINISHED, RUNNING, DIVERGED, FAILED, INTERRUPTED, KILLED = (
    "finished", "running", "diverged", "evaluation failed", "interrupted", "killed",
)  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """One run with all that its folder tells.

    Attributes:
        run: its settings and evaluations.
        state: "finished", "running", "diverged", "evaluation failed", "interrupted" or "killed".
        curves: columns of ``metrics.csv`` by name, at most :data:`MOST_ROWS` rows of each, without empty cells.
        clock: seconds of training at the update of each row, (T,) and (T,); empty where the files do not say.
        versions: ``versions.json``.
        commands: that started it, in order.
        switch: measures of the update at which an offline run began to collect (``online.json``); empty for others.
    """

    run: Run
    state: str
    curves: dict[str, Curve]
    clock: Curve
    versions: dict[str, Any] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    switch: dict[str, float] = field(default_factory=dict)

    @cached_property
    def hours(self) -> float | None:
        """Of training, evaluations left out; None where the files do not say."""
        return float(self.clock[1][-1]) / 3600.0 if len(self.clock[1]) else None

    def median(self, column: str) -> float | None:
        """The median over rows of a column of metrics; None where there is none."""
        values = self.curves.get(column, ((), ()))[1]
        return float(np.median(values)) if len(values) else None

    @property
    def batch_size(self) -> int | None:
        """Samples of an update; None where its settings do not say."""
        found = self.run.settings.get("model.batch_size")
        return found if isinstance(found, int) else None


def read_record(run: Run) -> RunRecord:
    """Everything else in the folder of a run; what cannot be read is left out."""
    columns, clock = read_metrics(run.folder / "metrics.csv")
    text = _text(run.folder / "command.txt")
    commands = tuple(printable(line) for line in text.splitlines() if line.strip())
    return RunRecord(
        run, run_state(run, columns), columns, clock, versions_of(run.folder), commands, switch_of(run.folder)
    )


def switch_of(folder: Path) -> dict[str, float]:
    """What ``online.json`` of a run says; empty where it is absent or lacks a number."""
    with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        found = json.loads(_text(folder / SWITCH))
        numbers = {name: float(found[name]) for name in ("switch", "at_switch", "lowest", "dip", "mean", "last")}
        return numbers if all(map(math.isfinite, numbers.values())) else {}
    return {}


def read_margins(folder: Path, column: int = 0) -> np.ndarray:
    """The finite margins of single pairs at the newest evaluation of a run, (n,); empty where it keeps none.

    The second column has the losses below which they are ranked right.
    """
    rows = csv.reader(io.StringIO(_text(folder / MARGINS)[:MOST_TEXT]))
    try:
        values = [_number(row, 2 + column) for row in rows if row and row[0].isdigit()]
    except csv.Error:
        return np.empty(0)
    known = np.array([value for value in values if value is not None], np.float64)
    return known[np.isfinite(known)]


def run_state(run: Run, columns: dict[str, Curve]) -> str:
    """How a run ended, or that it goes on, by its files alone."""
    if run.finished:
        return FINISHED
    lock = run.folder / LOCK
    if lock.exists():
        return RUNNING if _alive(lock) else KILLED
    if any(
        is_loss_name(name) and len(values) and not math.isfinite(values[-1]) for name, (_, values) in columns.items()
    ):
        return DIVERGED
    return FAILED if (run.folder / "evaluation-error.txt").exists() and run.failed_last else INTERRUPTED


def _alive(lock: Path) -> bool:
    """Whether the process that holds a lock goes on, as far as this machine can tell: one elsewhere is taken to."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads(_text(lock))
        if holder["host"] == socket.gethostname():
            try:
                os.kill(int(holder["pid"]), 0)
            except ProcessLookupError:
                return False
            except PermissionError:
                pass
    return True


def read_metrics(path: Path) -> tuple[dict[str, Curve], Curve]:
    """The columns of ``metrics.csv`` and the clock of its run.

    Of long tables evenly spaced rows are taken, with the last. Infinite losses and NaN stay, as they say that a run has
    diverged. The clock adds up updates by the rate of the row that they belong to.
    """
    lines = _text(path).split("\n")[:-1]  # what comes after the last line end was torn
    none: Curve = (np.empty(0), np.empty(0))
    try:
        head, *rows = list(csv.reader(lines)) or [[]]
    except csv.Error:
        return {}, none
    rows = [row for row in rows if row and row[0].isdigit()]
    clock = _clock(head, rows) if rows else none
    if len(rows) > MOST_ROWS:
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, MOST_ROWS).astype(int)]
    found: dict[str, Curve] = {}
    for i, name in enumerate(head[1:], 1):
        pairs = [(int(row[0]), value) for row in rows if (value := _number(row, i)) is not None]
        if pairs:
            steps, values = np.array(pairs, np.float64).T
            found[printable(name)] = steps, values
    return found, clock


def _clock(head: list[str], rows: list[list[str]]) -> Curve:
    if RATE not in head:
        return np.empty(0), np.empty(0)
    rates = np.array([_number(row, head.index(RATE)) or math.nan for row in rows], np.float64)
    steps = np.array([int(row[0]) for row in rows], np.float64)
    seconds = np.where(rates > 0, np.diff(steps, prepend=0.0) / np.where(rates > 0, rates, 1.0), 0.0)
    return steps, np.cumsum(np.maximum(seconds, 0.0))


def _number(row: list[str], i: int) -> float | None:
    try:
        return float(row[i])
    except (ValueError, IndexError):
        return None


def _text(path: Path) -> str:
    try:
        return read_file(path).decode(errors="replace").replace("\r\n", "\n")
    except OSError:
        return ""
