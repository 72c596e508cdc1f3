"""Runs on disk, as a comparison sees them: what was trained, with which settings, and what its evaluations gave."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from offpolicy.errors import UsageError
from offpolicy.files import PLACES, Table, known_folders, read_file
from offpolicy.training.headlines import judged_by

log = logging.getLogger(__name__)
CONFIG = "config.yaml"  # of every run
TAIL = 1 << 16  # bytes at the end of a table that hold its last row
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C reads hundreds of runs in a moment


@dataclass(frozen=True)
class Run:
    """One run of one seed.

    Attributes:
        folder: of the run.
        method: name of its class.
        data: what it was trained on.
        seed: of weights, batches and noise.
        settings: of the method and of the data, by dotted name.
        rows: of its evaluations that gave numbers, in the order of their updates.
        updates: the newest that its files know of.
        planned: how many it was to make; None where its files do not say.
        failed_last: whether its newest evaluation raised an error.
    """

    folder: Path
    method: str
    data: str
    seed: int
    settings: Mapping[str, Any]
    rows: tuple[dict[str, Any], ...]
    updates: int
    planned: int | None
    failed_last: bool = False

    @property
    def estimates(self) -> bool:
        """Whether it scores policies of others (fitted Q evaluation), and so is no method to compare."""
        return self.method == "FQE" or any("eval/value" in row for row in self.rows)

    @property
    def finished(self) -> bool:
        """Whether all updates were made, as far as its files say how many there were to be."""
        return self.planned is None or self.updates >= self.planned

    def judged_by(self) -> str | None:
        """The column by which its evaluations are judged, the held-out loss where there is no other; None for none."""
        return judged_by(name for row in self.rows for name in row)

    def values(self, column: str) -> list[float]:
        """The numbers of a column, in the order of the updates."""
        return [float(row[column]) for row in self.rows if isinstance(row.get(column), (int, float))]


def find_runs(places: Iterable[str | Path]) -> list[Run]:
    """The runs in these folders, in the order of their names.

    Args:
        places: run folders, folders of several seeds, or folders that hold runs at any depth.

    Raises:
        UsageError: a place that does not exist or holds no run, or a run folder that cannot be read.
    """
    found: dict[Path, Run] = {}
    for place in places:
        folders = _folders(Path(place).expanduser())
        for folder in folders:
            try:
                found.setdefault(folder.resolve(), read_run(folder))
            except UsageError as error:
                if len(folders) == 1:
                    raise
                log.warning("%s It is left out.", error)
    return sorted(found.values(), key=lambda run: (run.data, run.method, run.seed, str(run.folder)))


def _folders(place: Path) -> list[Path]:
    """The folders of runs of one seed at a place."""
    if not place.is_dir():
        raise UsageError(f"found no folder {place}; expected a run folder or a folder of runs. Check the path.")
    if (place / PLACES).is_file():
        found = list(known_folders(place).values())
        if not found:
            raise UsageError(f"{place / PLACES} names no folder of a seed; expected those that `fit` writes.")
        return found
    if (place / CONFIG).is_file():
        return [place]
    inside = [path.parent for path in sorted(place.rglob(CONFIG)) if not (path.parent / PLACES).is_file()]
    if not inside:
        raise UsageError(f"{place} holds no run; expected folders with a {CONFIG}. Pass the root of your runs.")
    return inside


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        UsageError: its settings cannot be read.
    """
    path = folder / CONFIG
    try:
        config = yaml.load(read_file(path).decode(), Loader=LOADER)
        model, data, seed = config["model"], config["data"], config.get("seed_everything", 0)
        options = model.get("init_args") or {}
        method, name = str(model["class_path"]).rpartition(".")[2], str(data["name"])
        planned = (config.get("trainer") or {}).get("max_steps")
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(f"{path} is not the settings of a run ({reason}); expected those that `fit` writes.") from None
    if not (isinstance(planned, int) and planned > 0):  # epochs say
        planned = versions_of(folder).get("planned_updates")
    settings = {f"model.{key}": value for key, value in flat(options).items()}
    settings |= {f"data.{key}": value for key, value in flat(data).items() if key != "name"}
    rows = evaluations_of(folder)
    steps = [*(int(row["step"]) for row in rows[-1:]), newest_step(folder / "metrics.csv"), *updates_kept(folder)]
    return Run(
        folder,
        printable(method),
        printable(Path(name).name if Path(name).is_absolute() else name),
        seed if isinstance(seed, int) else 0,
        settings,
        tuple(row for row in rows if "error" not in row),
        max(steps, default=0),
        planned if isinstance(planned, int) else None,
        bool(rows) and "error" in rows[-1],
    )


def evaluations_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``evals.csv``, but those whose update is no number, which is said."""
    table = Table(folder / "evals.csv")
    rows: list[dict[str, Any]] = table.rows()
    kept = [row for row in rows if isinstance(row.get("step"), int) and 0 <= row["step"] < 2**53]
    if len(kept) < len(rows):
        log.warning(
            "%s has %d of %d rows whose `step` is no number of updates; expected one in each. They are left out.",
            table.path,
            len(rows) - len(kept),
            len(rows),
        )
    return kept


def versions_of(folder: Path) -> dict[str, Any]:
    """What a run was made with, its ``versions.json``; empty where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(read_file(folder / "versions.json"))
        return found if isinstance(found, dict) else {}
    return {}


def newest_step(table: Path) -> int:
    """The update of the last whole row of a table, read from its end; 0 for none."""
    if not table.is_file():
        return 0
    with contextlib.suppress(OSError, ValueError, IndexError), open(table, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL))
        return int(file.read().split(b"\n")[-2].split(b",", 1)[0])
    return 0


def updates_kept(folder: Path) -> list[int]:
    """The updates of its checkpoints, by their names."""
    matches = (re.fullmatch(r"step=(\d+)\.ckpt", path.name) for path in folder.glob("checkpoints/*.ckpt"))
    return [int(match[1]) for match in matches if match]


def printable(name: str) -> str:
    """A name without characters that would steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in name)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; lists stay as they are."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found
