"""One pass over all rows: values that nothing can be learned from, and the episodes that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offpolicy.data.raw import Raw
from offpolicy.errors import DataError, amount

CHUNK = 1 << 15  # rows per step of the pass: temporaries stay in the processor's cache
TOLERANCE = 1e-4  # of an action's range: rounding, clipped and counted


@dataclass
class ContentFault:
    """One kind of faulty content in one column."""

    key: str
    what: str
    first: int
    rows: int = 0

    def text(self, raw: Raw) -> str:
        episode = int(np.searchsorted(raw.start, self.first, side="right") - 1)
        return (
            f"`{self.key}` has {self.what} in {amount(self.rows, 'row')} (first: row {self.first}, episode {episode})"
        )


class Scan:
    """The one pass over all rows.

    Args:
        raw: what is looked at; actions are clipped in it.
        clip_actions: clip actions outside the bounds instead of calling them faulty.
        measure: also take the numbers that :func:`offpolicy.data.validate.finish` reports, not faults alone.
    """

    def __init__(self, raw: Raw, clip_actions: bool, measure: bool = True) -> None:
        self.raw, self.clip_actions, self.measure = raw, clip_actions, measure
        self.rows = len(raw.steps["obs"])
        self.faults: dict[tuple[str, str], ContentFault] = {}
        self.bad = np.zeros(self.rows, dtype=bool)
        self.clipped = self.rounded = self.at_bound = 0
        self.reward_range = [np.inf, -np.inf]
        self.covered: np.ndarray | None = None
        if int(raw.length.sum()) != self.rows:  # rows between episodes (a last state without an action) do not count
            edges = np.zeros(self.rows + 1, dtype=np.int8)
            np.add.at(edges, raw.start, 1)
            np.add.at(edges, raw.start + raw.length, -1)
            self.covered = np.cumsum(edges[:-1]).astype(bool)
        obs = raw.steps["obs"]
        moves = measure and obs.ndim == 2 and obs.dtype.kind == "f"
        self.moves = np.full(self.rows, np.nan) if moves else None

    def run(self) -> None:
        with np.errstate(all="ignore"):
            for low in range(0, self.rows, CHUNK):
                self._chunk(low, min(low + CHUNK, self.rows))
            for name, column in self.raw.tail.items():
                if name != "valid" and column.dtype.kind == "f":
                    self._tail(name, column)

    def _chunk(self, low: int, high: int) -> None:
        for name in ("obs", "action", "reward", "next_obs"):
            column = self.raw.steps.get(name)
            if column is None or column.dtype.kind != "f":
                continue
            finite = np.isfinite(column[low:high])
            if not finite.all():
                rows = low + np.flatnonzero(~finite.reshape(high - low, -1).all(1))
                self._add(name, "NaN or infinite values", rows)
        self._actions(low, high)
        if self.measure and "reward" in self.raw.steps:
            reward = self.raw.steps["reward"][low:high]
            self.reward_range = [min(self.reward_range[0], reward.min()), max(self.reward_range[1], reward.max())]
        if self.moves is not None:
            stop = min(high, self.rows - 1)
            place = self.raw.facts.get("position", slice(None))
            step = np.diff(self.raw.steps["obs"][low : stop + 1, place], axis=0)
            squares = np.einsum("ij,ij->i", step, step, dtype=np.float64)  # those of float32 overflow from 1e19 on
            self.moves[low:stop] = squares

    def _actions(self, low: int, high: int) -> None:
        action, meta, facts = self.raw.steps["action"][low:high], self.raw.meta, self.raw.facts
        if "action_n" in facts:
            first = facts.get("action_start", 0)
            wrong = (action < first) | (action >= first + facts["action_n"])
            if action.dtype.kind == "f":
                wrong |= action != np.floor(action)
            if wrong.any():
                what = f"values outside the {facts['action_n']} discrete actions from {first}"
                self._add("action", what, low + np.flatnonzero(wrong.reshape(high - low, -1).any(1)))
        elif meta.get("action_low") is not None:
            bottom, top = (np.asarray(meta[key], dtype=np.float32) for key in ("action_low", "action_high"))
            if not (self.measure or (action > top).any() or (action < bottom).any()):
                return
            excess = np.maximum(action - top, bottom - action)
            self.at_bound += int((excess == 0).any(1).sum())
            if not (excess > 0).any():
                return
            slack = TOLERANCE * self._range_of_actions(bottom, top)
            if not self.clip_actions:
                self._add("action", f"values outside {range_text(meta)}", low + np.flatnonzero((excess > slack).any(1)))
            self.clipped += int((excess > slack).any(1).sum())
            self.rounded += int(((excess > 0) & (excess <= slack)).any(1).sum())
            if not self.raw.owned:
                self.raw.steps = {**self.raw.steps, "action": self.raw.steps["action"].copy()}
                self.raw.owned = True
                action = self.raw.steps["action"][low:high]
            outside = (excess > 0) if self.clip_actions else (excess > 0) & (excess <= slack)
            np.copyto(action, np.clip(action, bottom, top), where=outside)

    def _range_of_actions(self, bottom: np.ndarray, top: np.ndarray) -> np.ndarray:
        """What rounding is measured by (A,); where one side has no bound, the size of the other's."""
        bound = np.where(np.isfinite(bottom), bottom, np.where(np.isfinite(top), top, 1.0))
        return np.where(np.isfinite(top - bottom), top - bottom, np.maximum(np.abs(bound), 1.0))

    def _tail(self, name: str, column: np.ndarray) -> None:
        finite = np.isfinite(column).reshape(len(column), -1).all(1)
        if "valid" in self.raw.tail:
            finite |= ~self.raw.tail["valid"].astype(bool)
        if not finite.all():
            rows = (self.raw.start + self.raw.length - 1)[~finite]
            self._add(name, "NaN or infinite values after the last step", rows)

    def _add(self, name: str, what: str, rows: np.ndarray) -> None:
        if self.covered is not None:
            rows = rows[self.covered[rows]]
        if len(rows):
            key = self.raw.keys.get(name, name)
            fault = self.faults.setdefault((key, what), ContentFault(key, what, int(rows[0])))
            fault.rows += len(rows)
            self.bad[rows] = True


def drop_or_raise(raw: Raw, scan: Scan, on_bad: str) -> None:
    """Leave out the episodes with faults and say so, or stop, as ``on_bad`` has it."""
    faults = "; ".join(fault.text(raw) for fault in scan.faults.values())
    episode = np.searchsorted(raw.start, np.flatnonzero(scan.bad), side="right") - 1
    keep = np.ones(len(raw.start), dtype=bool)
    keep[episode] = False
    if on_bad == "error":
        clip = " or `--data.clip_actions=true`" if any("outside [" in what for _, what in scan.faults) else ""
        raise DataError(
            f"{raw.where}: {faults}. Expected finite numbers inside the bounds. Repair the data, or pass "
            f"`--data.on_bad=drop_episode` to leave out the {int((~keep).sum())} of {len(keep)} episodes "
            f"concerned{clip}."
        )
    if not keep.any():
        raise DataError(
            f"{raw.where}: every episode is faulty: {faults}. Nothing is left to train on; repair the data."
        )
    rows = int(raw.length[~keep].sum())
    raw.warnings.append(f"dropped {int((~keep).sum())} of {len(keep)} episodes ({rows} rows): {faults}")
    raw.start, raw.length = raw.start[keep], raw.length[keep]
    raw.tail = {k: v[keep] for k, v in raw.tail.items()}
    raw.episodes = {k: v[keep] for k, v in raw.episodes.items()}
    raw.truncated = None if raw.truncated is None else raw.truncated[keep]
    raw.marked = None if raw.marked is None else raw.marked[keep]


def range_text(meta: Mapping[str, Any]) -> str:
    """The bounds of actions in words."""
    low, high = meta["action_low"], meta["action_high"]
    if len(set(low)) == 1 and len(set(high)) == 1:
        return f"[{low[0]:g}, {high[0]:g}]"
    return f"[{numbers_text(low)}] to [{numbers_text(high)}]"


def numbers_text(values: Sequence[float]) -> str:
    """The first six numbers, shortened."""
    shown = ", ".join(f"{v:.3g}" for v in values[:6])
    return shown + ", …" * (len(values) > 6)
