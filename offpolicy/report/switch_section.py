"""Runs that were offline first and then collected: what their scores did at the switch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offpolicy.evaluation.scores import FEWEST, interval
from offpolicy.report.page import Section
from offpolicy.report.records import RunRecord
from offpolicy.report.runs_section import Labels, by_cell
from offpolicy.report.scores_section import newest
from offpolicy.report.writing import csv_text, html_table, tag

MEASURES = {
    "at_switch": "at the switch",
    "lowest": "lowest after it",
    "dip": "dip",
    "mean": "mean after it",
    "last": "last",
}
WORDS = (
    "Runs that went on in an environment after training on data: the last evaluation until the switch, and those after "
    "it; the dip is how far the lowest lies below. Means over seeds, from three on ± half of Student's 95 % interval. "
    "A dotted line in the learning curves stands at the switch."
)


def switches(records: Sequence[RunRecord], labels: Labels, files: dict[str, str]) -> Section:
    """A row for the runs of each method on each task; empty where no run has a switch."""
    rows, plain = [], []
    for (task, method), some in by_cell(records, labels).items():
        found = [one.switch for one in newest(some) if one.switch]
        if not found:
            continue
        updates = sorted({int(one["switch"]) for one in found})
        at = f"{updates[0]:,}" + (f" to {updates[-1]:,}" if len(updates) > 1 else "")
        values = {name: [one[name] for one in found] for name in MEASURES}
        rows.append([task, method, len(found), at, *map(_told, values.values())])
        means = {name: float(np.mean(each)) for name, each in values.items()}
        plain.append({"data": task, "method": method, "seeds": len(found), "switch": at.replace(",", ""), **means})
    if not rows:
        return Section("switch", "Offline to online", [])
    files["tables/switch.csv"] = csv_text(plain)
    link = tag("p", tag("a", "tables/switch.csv", href="tables/switch.csv"), class_="soft")
    head = ["task", "method", "seeds", "switch at update", *MEASURES.values()]
    return Section("switch", "Offline to online", [tag("p", WORDS), html_table(head, rows), link])


def _told(values: Sequence[float]) -> str:
    spread = f" ± {interval(np.array(values)):.1f}" if len(values) >= FEWEST else ""
    return f"{np.mean(values):.4g}{spread}"
