"""What a reader hands over, and whether its columns are there and fit together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offpolicy.errors import DataError, listed

NAMES: dict[str, tuple[int | None, str]] = {  # our name → rank (None: any), the name in messages
    "obs": (2, "observations"),
    "action": (None, "actions"),
    "reward": (1, "rewards"),
    "terminated": (1, "terminals"),
    "next_obs": (2, "next_observations"),
    "truncated": (1, "timeouts"),
    "last": (1, "episode_end"),
    "valid_td": (1, "valid_td"),
}
ALIASES = {  # our column → the names it goes by
    "obs": ("obs", "observations", "observation"),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards"),
    "next_obs": ("next_obs", "next_observations"),
    "valid_td": ("valid_td",),
}
# what to do with a CSV file of steps, as part of a message
IN_A_TABLE = (
    "Steps of control in such a table are read in Python: put columns side by side as obs (N, O) and action (N, A), "
    "and write numpy.savez('steps.npz', obs=…, action=…, reward=…, terminated=…, episode_end=…)."
)


@dataclass
class Raw:
    """What a reader hands over: columns and index as read, and what is known about them.

    Attributes:
        steps, start, length, tail, episodes, meta: as of :class:`Replay`; starts ascend.
        where: file or source, for messages.
        keys: our column name → the source's name, for messages.
        facts: ``obs_dim``, ``action_dim`` (the environment's), ``position`` (columns of obs that are a place),
            ``terminates`` (the environment has terminal states), ``action_n``/``action_start`` (discrete actions).
        owned: the columns may be changed in place.
        truncated: bool (E,), whether the source marks the end of each episode as a time limit or other cut.
        marked: bool (E,), whether the source marks the end of each episode in any way; None when `truncated` tells it.
    """

    steps: dict[str, np.ndarray]
    start: np.ndarray
    length: np.ndarray
    where: str
    tail: dict[str, np.ndarray] = field(default_factory=dict)
    episodes: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    owned: bool = True
    truncated: np.ndarray | None = None
    marked: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def match(names: Iterable[str]) -> dict[str, str]:
    """Our column names → the ones used here.

    Raises:
        DataError: two names for one column.
    """
    names = list(names)
    found: dict[str, str] = {}
    for ours, aliases in ALIASES.items():
        present = [a for a in aliases if a in names]
        if len(present) > 1:
            raise DataError(
                f"both `{present[0]}` and `{present[1]}` are given for `{ours}`; expected one. Leave one out."
            )
        if present:
            found[ours] = present[0]
    return found


def check_structure(
    where: str,
    shapes: Mapping[str, tuple[int, ...]],
    keys: Mapping[str, str],
    facts: Mapping[str, Any],
    need: Sequence[str],
) -> int:
    """Check that the columns are there and fit together; returns the number of rows.

    Args:
        where: file or source, for messages.
        shapes: the source's name → shape, of everything it holds.
        keys: our column name → the source's name.
        facts: may hold ``obs_dim`` and ``action_dim`` of the environment.
        need: our names that must be there.

    Raises:
        DataError: a missing column, unequal lengths, a wrong rank or width, or no rows.
    """
    listing = listed(f"{k} {v}" for k, v in shapes.items()) or "nothing"
    missing = [name for name in need if name not in keys]
    if missing:
        raise DataError(
            f"{where} has no {' or '.join(f'`{NAMES[m][1]}`' for m in missing)}; it has {listing}. Expected the "
            "keys of D4RL (observations, actions, rewards, terminals) or ours (obs, action, reward, terminated). "
            "Rename the keys"
            + (
                ", or add rewards: for cloning and goals zeros will do."
                if missing == ["reward"]
                else ", or pass offpolicy.load_data a dict with the arrays under these names."
            )
        )
    scalars = [keys[name] for name in keys if len(shapes[keys[name]]) == 0]
    lengths = {key: shapes[key][0] for key in keys.values() if shapes[key]}
    if scalars or len(set(lengths.values())) != 1:
        raise DataError(f"{where}: the columns have unequal lengths: {listing}. Expected one row per step in each.")
    rows = next(iter(lengths.values()))
    if rows == 0:
        raise DataError(f"{where} holds no steps; expected at least one ({listing}). Check how the file was made.")
    for name, key in keys.items():
        shape, rank = shapes[key], NAMES[name][0]
        flat = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
        if rank == 1 and not flat:
            raise DataError(
                f"{where}: `{key}` has shape {shape}; expected ({rows},), one number per step. Select one column."
            )
        if rank == 2 and len(shape) < 2:
            raise DataError(f"{where}: `{key}` has shape {shape}; expected ({rows}, width). Reshape it to ({rows}, 1).")
    if "next_obs" in keys and shapes[keys["next_obs"]] != shapes[keys["obs"]]:
        raise DataError(
            f"{where}: `{keys['next_obs']}` has shape {shapes[keys['next_obs']]} and `{keys['obs']}` "
            f"{shapes[keys['obs']]}; expected the same."
        )
    for name, fact in (("obs", "obs_dim"), ("action", "action_dim")):
        width = shapes[keys[name]][-1] if len(shapes[keys[name]]) == 2 else None
        if facts.get(fact) and width is not None and width != facts[fact]:
            raise DataError(
                f"{where}: `{keys[name]}` is {width} wide; the environment has {facts[fact]}. These are the columns: "
                f"{listing}. Pass the right environment or file."
            )
    return rows


def as_flag(where: str, key: str, column: np.ndarray) -> np.ndarray:
    """A column of 0/1 of any type and shape (N,) or (N, 1) as bool (N,).

    Raises:
        DataError: other values, with their count and the first row.
    """
    flat = column.reshape(-1)
    if flat.dtype == bool:
        return flat
    other = np.flatnonzero((flat != 0) & (flat != 1))
    if len(other):
        raise DataError(
            f"{where}: `{key}` has {len(other)} values other than 0 and 1 (first at row {other[0]}: {flat[other[0]]}); "
            f"expected a flag. Cast it, for example `{key} = {key} > 0`."
        )
    return flat.astype(bool)


def count_usable(raw: Raw) -> int:
    """Rows that a transition may be drawn from."""
    rows = len(raw.steps["obs"])
    usable = np.ones(rows, dtype=bool)
    if "valid_td" in raw.steps:
        usable &= raw.steps["valid_td"].astype(bool)
    if "next_obs" not in raw.steps:
        known = raw.tail["valid"].astype(bool) if "valid" in raw.tail else "obs" in raw.tail
        end = raw.start + raw.length - 1
        usable[end] &= known | raw.steps["terminated"][end]
    counts = np.concatenate([[0], np.cumsum(usable)])
    return int((counts[raw.start + raw.length] - counts[raw.start]).sum())
