"""Scores that others have published: with their source, their kind of spread, and what is known of both."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

SECOND_HAND = "second hand"


@dataclass(frozen=True)
class PublishedScore:
    """One number of a table that others published.

    Attributes:
        method, task: as they stand there; versions of tasks are never mixed.
        mean: over seeds, on the 0-100 scale.
        spread: as its kind says; None where none is given.
        spread_kind: "std (ddof 0) over seeds", …
        seeds: how many; None where that is not said.
        statistic: "last", "best", … evaluation of a run.
        source, table: where it stands.
        checked: how far it was compared with another place.
    """

    method: str
    task: str
    mean: float
    spread: float | None
    spread_kind: str
    seeds: int | None
    statistic: str
    source: str
    table: str
    checked: str

    @property
    def second_hand(self) -> bool:
        """Whether it was read in a quotation alone."""
        return SECOND_HAND in self.checked

    def told(self) -> str:
        """The number with its spread; a dagger says that it was read in a quotation."""
        spread = "" if self.spread is None else f" ± {self.spread:g}"
        return f"{self.mean:g}{spread}{' †' if self.second_hand else ''}"


@cache
def published_scores() -> tuple[PublishedScore, ...]:
    """All rows of ``datasets_cfg/published_scores.csv``."""
    return tuple(
        PublishedScore(
            row["method"],
            row["task"],
            float(row["mean"]),
            float(row["spread"]) if row["spread"] else None,
            row["spread_kind"],
            int(row["seeds"]) if row["seeds"].isdigit() else None,
            row["statistic"],
            row["source"],
            row["table"],
            row["checked"],
        )
        for row in _rows("published_scores.csv")
    )


@cache
def published_seed_scores() -> dict[tuple[str, str], tuple[float, ...]]:
    """By (method, task) the final scores of the seeds of ``datasets_cfg/published_seed_scores.csv``."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in _rows("published_seed_scores.csv"):
        found.setdefault((row["method"], row["task"]), []).append(float(row["score"]))
    return {key: tuple(values) for key, values in found.items()}


def published_for(tasks: Iterable[str], which: str = "last") -> list[PublishedScore]:
    """What was published for these tasks, by exact name: rows of best evaluations only where ``which`` is "best"."""
    wanted = set(tasks)
    return [one for one in published_scores() if one.task in wanted and (one.statistic == "best") == (which == "best")]


def _rows(name: str) -> list[dict[str, str]]:
    with (resources.files("datasets_cfg") / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
