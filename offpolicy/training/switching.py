"""How a run went on that was offline first and then collected: what its evaluations say about the switch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from offpolicy.files import Table, atomic_write
from offpolicy.training.headlines import headline

FILE = "online.json"
SCALES = {"eval/score": 100.0, "eval/success_rate": 1.0}  # what stands for 1 in a regret


def online_measures(rows: Iterable[Mapping[str, Any]], switch: int) -> dict[str, float]:
    """Measures of the evaluations after an offline run began to collect.

    Args:
        rows: evaluations by update (``step``), with the number that judges them.
        switch: the update at which collecting began, > 0.

    Returns:
        ``at_switch``, the score of the last evaluation until then, and ``at_switch_update``, its update; ``last``;
        ``mean`` and ``lowest`` of those after it; ``dip``, how far the lowest is below the switch, ≥ 0; ``regret``, the
        mean of 1 - score / 100 (of 1 - success rate), where scores have such a scale (Cal-QL, arXiv:2303.05479). Empty
        where there is no evaluation on both sides.
    """
    rows = list(rows)
    name = headline(key for row in rows for key, value in row.items() if value is not None)
    scores = [(row["step"], row[name]) for row in rows if name and row.get(name) is not None]
    before, after = [(t, s) for t, s in scores if t <= switch], [s for t, s in scores if t > switch]
    if name is None or not before or not after:
        return {}
    update, score = before[-1]
    found = {"at_switch": score, "at_switch_update": update, "last": after[-1]}
    found |= {"mean": sum(after) / len(after), "lowest": min(after)}
    found["dip"] = max(0.0, score - min(after))
    if name in SCALES:
        found["regret"] = 1.0 - found["mean"] / SCALES[name]
    return found


def write_switch(folder: Path, switch: int) -> None:
    """Write the measures into ``online.json`` of a run folder, where there are some."""
    found = _measured(folder, switch)
    if found:
        atomic_write(folder / FILE, json.dumps({"switch": switch, **found}, indent=1) + "\n")


def switch_words(folder: Path, switch: int) -> str:
    """The measures of a run folder in words, empty where there are none."""
    found = _measured(folder, switch)
    if not found:
        return ""
    update = found["at_switch_update"]
    at = "the switch" if update == switch else f"update {update:,}, the last evaluation before the switch"
    words = (
        f"{found['at_switch']:.4g} at {at}, lowest {found['lowest']:.4g} after it (dip {found['dip']:.4g}), "
        f"mean {found['mean']:.4g}"
    )
    return words + (f", regret {found['regret']:.3f}" if "regret" in found else "")


def _measured(folder: Path, switch: int) -> dict[str, float]:
    path = folder / "evals.csv"
    return online_measures(Table(path).rows(), switch) if path.is_file() else {}
