"""Sections on the runs themselves: what was run and how it ended, speed, settings, versions and commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.errors import amount
from offpolicy.report.page import Section, folded, notes, unknown
from offpolicy.report.records import FINISHED, MEMORY, RATE, TOKENS, RunRecord
from offpolicy.report.writing import Markup, html_table, tag

Labels = Mapping[Path, str]
MOST_LINES = 1000  # of a table of single runs


def overview(records: Sequence[RunRecord], labels: Labels) -> Section:
    """What was run, and how many runs ended how."""
    states = Counter(one.state for one in records)
    groups = by_cell(records, labels)
    methods, tasks = {method for _, method in groups}, {task for task, _ in groups}
    seeds = {one.run.seed for one in records}
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    what = " × ".join(
        amount(n, word) for n, word in ((len(methods), "method"), (len(tasks), "task"), (len(seeds), "seed"))
    )
    found = Section("runs", "Runs", [tag("p", f"{amount(len(records), 'run')} ({what}): {told}.")])
    rows = []
    for (task, method), some in groups.items():
        ended = Counter(one.state for one in some)
        others = ", ".join(f"{count} {state}" for state, count in sorted(ended.items()) if state != FINISHED)
        seeds_told = ", ".join(str(one.run.seed) for one in sorted(some, key=lambda one: one.run.seed)[:20])
        rows.append([task, method, len(some), ended[FINISHED], others or "–", seeds_told + "…" * (len(some) > 20)])
    found.parts.append(html_table(["task", "method", "runs", "finished", "others", "seeds"], rows))
    found.parts += notes([*unfinished(records), *unlike_versions(records)])
    return found


def unfinished(records: Iterable[RunRecord]) -> list[str]:
    """A sentence on every run that has not finished."""
    lines = []
    for one in records:
        if one.state != FINISHED:
            planned = f" of {one.run.planned:,}" if one.run.planned else ""
            lines.append(f"{one.run.folder} is {one.state} at update {one.run.updates:,}{planned}.")
    return lines[:50] + ([f"{len(lines) - 50} more have not finished."] if len(lines) > 50 else [])


def unlike_versions(records: Sequence[RunRecord]) -> list[str]:
    """Sentences on runs of one task that saw other data, and on versions that differ."""
    found = []
    prints: dict[str, set[str]] = {}
    for one in records:
        data = one.versions.get("data")
        fingerprint = data.get("fingerprint") if isinstance(data, Mapping) else None
        if isinstance(fingerprint, str):
            prints.setdefault(one.run.data, set()).add(fingerprint)
    for task, several in sorted(prints.items()):
        if len(several) > 1:
            found.append(f"{task}: runs have seen {len(several)} different data sets of this name.")
    for key, values in version_values(records).items():
        if len(values) > 1 and key in ("offpolicy", "git", "torch", "simulator", "score_kind"):
            if key in ("simulator", "score_kind") and len({one.run.data for one in records}) > 1:
                continue  # every task has its own
            found.append(f"Runs were made with {len(values)} versions of {key}: {', '.join(list(values)[:5])}.")
    return found


def version_values(records: Iterable[RunRecord]) -> dict[str, Counter[str]]:
    """What each entry of ``versions.json`` is, with the number of runs."""
    found: dict[str, Counter[str]] = {}
    for one in records:
        for key, value in one.versions.items():
            if not isinstance(value, (Mapping, list)) and value is not None:
                found.setdefault(str(key), Counter())[str(value)] += 1
    return found


def by_cell(records: Iterable[RunRecord], labels: Labels) -> dict[tuple[str, str], list[RunRecord]]:
    """Runs by (task, method), in the order of their names."""
    found: dict[tuple[str, str], list[RunRecord]] = {}
    for one in sorted(records, key=lambda one: (one.run.data, labels[one.run.folder], one.run.seed)):
        found.setdefault((one.run.data, labels[one.run.folder]), []).append(one)
    return found


def speed(records: Sequence[RunRecord], labels: Labels) -> tuple[Section, list[dict[str, Any]]]:
    """How fast runs were, in medians over their rows and then over runs; the same as rows."""
    rows, table = [], []
    for (task, method), some in by_cell(records, labels).items():
        numbers = {
            "updates/s": _median(some, lambda one: one.median(RATE)),
            "tokens/s": _median(some, lambda one: one.median(TOKENS)),
            "peak memory, MiB": _median(some, lambda one: one.median(MEMORY)),
            "hours": _median(some, lambda one: one.hours),
        }
        if all(value is None for value in numbers.values()):
            continue
        packed = {len(one.versions.get("trained_with_seeds") or ()) for one in some} - {0}
        together = ", ".join(map(str, sorted(packed))) or "–"
        where = ", ".join(sorted({_device(one) for one in some}))
        table.append({"data": task, "method": method, "runs": len(some), **numbers, "seeds together": together})
        cells = [
            (unknown("not recorded"), "") if value is None else (f"{value:,.4g}", value) for value in numbers.values()
        ]
        rows.append([task, method, len(some), *cells, together, where])
    head = ["task", "method", "runs", "updates/s", "tokens/s", "peak memory, MiB", "hours", "seeds together", "device"]
    found = Section("speed", "Speed")
    if rows:
        words = (
            "Medians over the rows of a run, then over runs. Hours are of training, evaluations left out. Runs of "
            "several seeds together have the speed of all of them."
        )
        found.parts += [tag("p", words), html_table(head, rows)]
    return found, table


def _device(one: RunRecord) -> str:
    device, threads = one.versions.get("device"), one.versions.get("threads")
    return f"{device or 'not known'}" + (f", {threads} threads" if threads and str(device).startswith("cpu") else "")


def _median(records: Sequence[RunRecord], number: Callable[[RunRecord], float | None]) -> float | None:
    values = [value for one in records if (value := number(one)) is not None]
    return float(np.median(values)) if values else None


def settings_section(records: Sequence[RunRecord], labels: Labels) -> Section:
    """The settings in which runs of one method differ, over seeds and tasks."""
    found = Section("settings", "Settings that differ")
    methods: dict[str, list[RunRecord]] = {}
    for one in records:
        methods.setdefault(one.run.method, []).append(one)
    rows = []
    for method, some in sorted(methods.items()):
        for key in dict.fromkeys(key for one in some for key in one.run.settings):
            values: dict[str, set[str]] = {}
            for one in some:
                values.setdefault(str(one.run.settings.get(key)), set()).add(one.run.data)
            if len(values) > 1:
                told = "; ".join(
                    f"{value} ({', '.join(sorted(tasks)[:4])})" for value, tasks in sorted(values.items())[:8]
                )
                rows.append([method, key, told])
    if rows:
        found.parts.append(html_table(["method", "setting", "values (tasks)"], rows))
    elif records:
        found.parts.append(tag("p", "The runs of each method have the same settings."))
    return found


def provenance(records: Sequence[RunRecord], labels: Labels) -> Section:
    """Versions, and the commands of every run."""
    versions = [
        [key, "; ".join(f"{value} ({count} runs)" for value, count in values.most_common(6))]
        for key, values in sorted(version_values(records).items())
    ]
    parts = [html_table(["", "version (runs)"], versions)] if versions else []
    lines: list[Markup] = []
    for (task, method), some in by_cell(records[:MOST_LINES], labels).items():
        told = [f"# {one.run.folder}: {one.state}\n" + "\n".join(one.commands or ("# not known",)) for one in some]
        lines.append(folded(f"{method} on {task}: {len(some)} runs", tag("pre", "\n".join(told))))
    if len(records) > MOST_LINES:
        lines.append(tag("p", f"{len(records) - MOST_LINES} more runs are in tables/runs.csv."))
    return Section("commands", "Versions and commands", [*parts, *lines])


def run_rows(records: Sequence[RunRecord], labels: Labels) -> list[dict[str, Any]]:
    """One row per run."""
    rows = []
    for one in records:
        column = one.run.judged_by()
        values = one.run.values(column) if column else []
        better = min if column and column.endswith("loss") else max
        rows.append(
            {
                "data": one.run.data,
                "method": labels[one.run.folder],
                "seed": one.run.seed,
                "state": one.state,
                "updates": one.run.updates,
                "planned": one.run.planned,
                "measure": column,
                "last": values[-1] if values else None,
                "best": better(values) if values else None,
                "hours": one.hours,
                "folder": str(one.run.folder),
                "command": "; ".join(one.commands),
            }
        )
    return rows
