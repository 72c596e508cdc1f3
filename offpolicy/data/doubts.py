"""Doubts about data that are sound in form: what a person should look at before training on them.

Most of these look at a sample of the rows only, so that loading stays as fast as reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from offpolicy.data.raw import Raw
from offpolicy.errors import listed

CHUNK = 1 << 15  # rows per step of a full pass
SAMPLE = 1 << 12  # rows looked at where a sample will do
BLOCKS = 16  # consecutive pieces that a sample consists of
LOST = 0.1  # share of the different values of a column that may be lost in float32 without a word
CLOSE = 1e-5  # of a column's largest value: differences of rounding between an observation and its copy


# -- next observations -------------------------------------------------------------------------------------------------


def breaks(obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
    """Rows (N,) whose next observation is not the observation of the next row, beyond rounding; the last one is not."""
    found = np.zeros(len(obs), dtype=bool)
    for low in range(0, len(obs) - 1, CHUNK):
        high = min(low + CHUNK, len(obs) - 1)
        found[low:high] = _differ(next_obs[low:high], obs[low + 1 : high + 1])
    return found


def _differ(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether rows (n, …) differ beyond rounding, (n,); NaN equals NaN."""
    one, other = one.reshape(len(one), -1), other.reshape(len(other), -1)
    differ = (one != other).any(1)
    rows = np.flatnonzero(differ)
    if len(rows):
        a, b = one[rows].astype(np.float64), other[rows].astype(np.float64)
        with np.errstate(all="ignore"):
            slack = CLOSE * np.nanmax(np.abs(other).astype(np.float64), axis=0, initial=0.0)
            differ[rows] = ~((np.abs(a - b) <= slack) | (np.isnan(a) & np.isnan(b)) | (a == b)).all(1)
    return differ


def next_obs_doubts(raw: Raw) -> list[str]:
    """Warnings about stored next observations that are the row's own, another row's, or of the next episode."""
    if "next_obs" not in raw.steps:
        return []
    obs, next_obs, key = raw.steps["obs"], raw.steps["next_obs"], raw.keys.get("next_obs", "next_obs")
    end = raw.start + raw.length - 1
    rows = sample_rows(len(obs))
    episode = np.searchsorted(raw.start, rows, side="right") - 1
    rows = rows[(episode >= 0) & (rows <= end[episode])]  # rows of dropped episodes do not count
    found = []
    same = (next_obs[rows] == obs[rows]).reshape(len(rows), -1).all(1)
    if len(rows) > 10 and same.mean() > 0.5:
        found.append(
            f"`{key}` equals the row's own observation in {same.mean():.0%} of the rows looked at: it may have been "
            "stored after the observation was overwritten; check how it was recorded"
        )
    inside = np.setdiff1d(rows, end)
    if len(inside) and not found:
        share = _differ(next_obs[inside], obs[inside + 1]).mean()
        if share > 0.01:
            found.append(
                f"`{key}` is not the next row's observation in {share:.0%} of the rows inside episodes that were "
                "looked at: rows may be missing or in another order, or ends of episodes may not all be marked"
            )
    ends = end[end + 1 < len(obs)]
    ends = ends[np.linspace(0, len(ends) - 1, min(len(ends), SAMPLE)).astype(np.int64)] if len(ends) else ends
    if len(ends):
        crossed = ~_differ(next_obs[ends], obs[ends + 1])
        moving = _differ(obs[ends], obs[ends + 1])
        if (crossed & moving).mean() > 0.5:
            found.append(
                f"`{key}` at the end of {int((crossed & moving).sum())} of {len(ends)} episodes is the first "
                "observation of the next episode: it should be the last one of its own (with automatic resets, "
                "`final_obs`); where episodes were cut, values are bootstrapped from it"
            )
    return found


# -- time limits -------------------------------------------------------------------------------------------------------


def time_limit_doubts(raw: Raw) -> list[str]:
    """A warning where every episode of the longest length ends as terminated: terminals that hold time limits."""
    terminated = raw.steps["terminated"][raw.start + raw.length - 1]
    limit = int(raw.meta.get("max_episode_steps") or 0)
    at = raw.length == (limit or raw.length.max())
    several = int(at.sum()) >= (2 if limit else max(3, len(raw.length) // 10))
    if not several or int(raw.length[at][0]) < 2 or not terminated[at].all():
        return []
    what = f"the step limit of {limit}" if limit else f"{int(raw.length.max())} steps, the longest length,"
    return [
        f"all {int(at.sum())} episodes that reach {what} end there as terminated: the terminals may hold time limits, "
        "which must not stop bootstrapping; if so, pass them as `episode_end` (or `timeouts`) instead"
    ]


# -- discrete actions as floats ----------------------------------------------------------------------------------------


def whole_number_doubts(raw: Raw) -> list[str]:
    """A warning where actions without a known space are whole numbers from 0 on: discrete ones stored as floats."""
    action = raw.steps["action"]
    if raw.meta.get("action_low") is not None or "action_n" in raw.facts or action.dtype.kind != "f":
        return []
    rows = sample_rows(len(action))
    some = action[rows]
    if not ((some == np.floor(some)) & (some >= 0)).all() or some.max() > 1000 or some.max() < 1:
        return []
    return [
        "all actions looked at are whole numbers from 0 on: if they are discrete actions, store them as integers; they "
        "are trained on as real numbers"
    ]


# -- precision ---------------------------------------------------------------------------------------------------------


def sample_rows(rows: int) -> np.ndarray:
    """All rows, or ``BLOCKS`` runs of consecutive ones spread over them, ``SAMPLE`` in all, ascending int64."""
    if rows <= SAMPLE:
        return np.arange(rows)
    length = SAMPLE // BLOCKS
    starts = np.linspace(0, rows - length, BLOCKS).astype(np.int64)
    return (starts[:, None] + np.arange(length)).reshape(-1)


def precision_doubt(name: str, sample: np.ndarray) -> str | None:
    """A warning about the columns of which float32 loses different values: times, large numbers, GPS positions.

    Args:
        name: of the column, for the message.
        sample: rows (n, …) in the source's type, as of :func:`sample_rows`.
    """
    wide = sample.dtype.kind == "f" and sample.dtype.itemsize > 4
    if not (wide or (sample.dtype.kind in "iu" and sample.dtype.itemsize >= 4)) or not sample.size:
        return None
    flat = sample.reshape(len(sample), -1)
    with np.errstate(all="ignore"):
        narrow = flat.astype(np.float32)
        exact = (narrow == flat).all(0)
        suspects = np.flatnonzero(~exact & np.isfinite(narrow).all(0))
    lost = []
    for column in suspects.tolist():
        full, short = flat[:, column], narrow[:, column]
        different, kept = len(np.unique(full)), len(np.unique(short))
        moved = full[1:] != full[:-1]
        still = int((moved & (short[1:] == short[:-1])).sum())
        if kept < (1 - LOST) * different or still > LOST * max(int(moved.sum()), 1):
            lost.append((column, different, kept))
    if not lost:
        return None
    column, different, kept = lost[0]
    where = (
        f"`{name}`" if sample.ndim == 1 else f"`{name}` column{'s' * (len(lost) > 1)} {listed(c for c, _, _ in lost)}"
    )
    index = f"{name}" if sample.ndim == 1 else f"{name}[:, {column}]"
    return (
        f"{where} lose{'s' * (len(lost) == 1)} values in float32, in which data are kept: of {different:,} different "
        f"values looked at{'' if len(lost) == 1 else f' in column {column}'}, {kept:,} stay different. Subtract an "
        f"offset in float64 before loading (`{index} -= {index}[0]`), or leave the column out"
    )


def precision_doubts(
    columns: Mapping[str, Any], rows: int, read: Callable[[Any, np.ndarray], np.ndarray] | None = None
) -> list[str]:
    """As :func:`precision_doubt`, of several columns by name; ``read(column, rows)`` gives rows of one."""
    chosen = sample_rows(rows)
    found = []
    for name, column in columns.items():
        if column.dtype.kind in "fiu" and column.dtype.itemsize >= 4 and column.dtype != np.float32:
            found.append(precision_doubt(name, read(column, chosen) if read else column[chosen]))
    return [text for text in found if text]
