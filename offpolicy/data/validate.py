"""Checks of control data at load, in one pass over the rows, and the data report.

Every fault is named with file, key, first row and remedy. Content faults (NaN, actions outside the bounds) stop the
load or drop their episodes; structural ones (a missing key, unequal lengths) always stop it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offpolicy.data.doubts import next_obs_doubts, time_limit_doubts, whole_number_doubts
from offpolicy.data.replay import Replay, _numpy
from offpolicy.data.spaces import check_widths
from offpolicy.errors import DataError, UsageError, listed

CHUNK = 1 << 15  # rows per step of the pass: temporaries stay in the processor's cache
TOLERANCE = 1e-4  # of an action's range: rounding, clipped and counted
JUMP = 50.0  # largest step / median step inside an episode that looks like a missing end
FIRST_ROWS = 8  # of an episode that tell duplicates
WHOSE = {"environment": "of the environment", "data": "of the data, as no environment is known", "given": "as given"}


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


# -- structure -------------------------------------------------------------------------------------------------------


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
            + (", or add rewards: for cloning and goals zeros will do." if missing == ["reward"] else ".")
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


# -- content ---------------------------------------------------------------------------------------------------------


def finish(raw: Raw, *, on_bad: str = "error", clip_actions: bool = False) -> Replay:
    """Check the content and build the replay.

    Args:
        raw: what a reader found, structurally sound.
        on_bad: "error", or "drop_episode" to leave out episodes with faulty content and count them.
        clip_actions: clip actions outside the bounds instead of calling them faulty.

    Returns:
        The replay; ``meta`` has ``notes``, ``warnings``, and action bounds (``action_bounds`` says whose).

    Raises:
        DataError: faulty content, or nothing left to train on.
        UsageError: an unknown ``on_bad``.
    """
    if on_bad not in ("error", "drop_episode"):
        raise UsageError(f"`on_bad` is {on_bad!r}; expected 'error' or 'drop_episode'. Pass one of them.")
    if not len(raw.start):
        raise DataError(f"{raw.where} holds no steps; expected at least one episode with a step.")
    check_widths(raw.where, raw.steps["obs"], raw.steps["action"])
    scan = _Scan(raw, clip_actions)
    scan.run()
    if scan.faults:
        _drop_or_raise(raw, scan, on_bad)
    _counts(raw, scan)
    _bounds(raw)
    warnings = [*raw.meta.get("warnings", []), *raw.warnings]
    meta = {**raw.meta, "notes": raw.notes, "warnings": list(dict.fromkeys(warnings))}
    replay = Replay(raw.steps, start=raw.start, length=raw.length, tail=raw.tail, episodes=raw.episodes, meta=meta)
    if not _usable(raw):
        raise DataError(
            f"{raw.where} has no transition to train on: {replay.num_steps} steps in {replay.num_episodes} "
            "episodes, none "
            "with a known next observation. Add `next_observations` or longer episodes."
        )
    return replay


@dataclass
class _Fault:
    """One kind of faulty content in one column."""

    key: str
    what: str
    first: int
    rows: int = 0

    def text(self, raw: Raw) -> str:
        episode = int(np.searchsorted(raw.start, self.first, side="right") - 1)
        return f"`{self.key}` has {self.what} in {self.rows} rows (first: row {self.first}, episode {episode})"


class _Scan:
    """The one pass over all rows."""

    def __init__(self, raw: Raw, clip_actions: bool) -> None:
        self.raw, self.clip_actions = raw, clip_actions
        self.rows = len(raw.steps["obs"])
        self.faults: dict[tuple[str, str], _Fault] = {}
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
        self.moves = np.full(self.rows, np.nan) if obs.ndim == 2 and obs.dtype.kind == "f" else None

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
        if "reward" in self.raw.steps:
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
            excess = np.maximum(action - top, bottom - action)
            self.at_bound += int((excess == 0).any(1).sum())
            if not (excess > 0).any():
                return
            slack = TOLERANCE * self._range_of_actions(bottom, top)
            if not self.clip_actions:
                self._add("action", f"values outside {_range(meta)}", low + np.flatnonzero((excess > slack).any(1)))
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
            fault = self.faults.setdefault((key, what), _Fault(key, what, int(rows[0])))
            fault.rows += len(rows)
            self.bad[rows] = True


def _drop_or_raise(raw: Raw, scan: _Scan, on_bad: str) -> None:
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


def _counts(raw: Raw, scan: _Scan) -> None:
    """Notes and warnings from what the pass counted."""
    terminated = raw.steps["terminated"]
    end = raw.start + raw.length - 1
    say, warn = raw.notes.append, raw.warnings.append
    if scan.clipped and scan.clip_actions:
        say(f"clipped the actions of {scan.clipped} rows to {_range(raw.meta)}")
    if scan.rounded:
        say(f"clipped the actions of {scan.rounded} rows that were outside {_range(raw.meta)} by rounding only")
    if scan.at_bound:
        say(f"{scan.at_bound} rows have an action exactly on a bound; likelihoods of squashed policies clip them")
    if raw.truncated is not None:
        marked = raw.truncated if raw.marked is None else raw.marked
        unfinished = int((~marked & ~terminated[end]).sum())
        both = int((raw.truncated & terminated[end]).sum())
        if unfinished:
            say(
                f"{unfinished} unfinished episode{'s' * (unfinished > 1)} without an end mark: kept as cut by a "
                "time limit"
            )
        if both:
            say(f"{both} episodes end as terminated and truncated at once: taken as terminated")
    single = int((raw.length == 1).sum())
    if single:
        say(f"{single} episodes have one step: used for transitions, not for windows")
    if "reward" in raw.steps and scan.reward_range[0] == scan.reward_range[1]:
        warn(f"all rewards are {scan.reward_range[0]:g}: there is nothing to learn from them")
    if raw.facts.get("terminates") and not terminated.any():
        warn("no step is terminal although this environment has terminal states: the flags may be lost")
    _jumps(raw, scan)
    for text in (*time_limit_doubts(raw), *next_obs_doubts(raw), *whole_number_doubts(raw)):
        warn(text)
    twins = _duplicates(raw)
    if twins:
        warn(f"{twins} episodes begin and last like another one: they may be duplicates, and a split would share them")


def _jumps(raw: Raw, scan: _Scan) -> None:
    if scan.moves is None:
        return
    moves = scan.moves
    moves[raw.start + raw.length - 1] = np.nan
    if scan.covered is not None:
        moves[~scan.covered] = np.nan
    known = moves[np.isfinite(moves)]
    if not len(known):
        return
    median = float(np.sqrt(np.median(known)))
    largest = float(np.sqrt(known.max()))
    if median > 0 and largest / median > JUMP:
        row = int(np.nanargmax(moves))
        count = int((known > (JUMP * median) ** 2).sum())
        raw.warnings.append(
            f"{count} steps inside episodes jump more than {JUMP:.0f} times the median step (largest "
            f"{largest / median:.0f} "
            f"times, row {row}): the ends of episodes may not all be marked"
        )


def _duplicates(raw: Raw) -> int:
    """How many episodes equal an earlier one in length and in their first rows."""
    if len(raw.start) < 2:
        return 0
    parts = [raw.steps[k] for k in ("obs", "action", "reward") if k in raw.steps]
    digest = raw.length.astype(np.uint64)
    weights = np.random.default_rng(0)
    for t in range(min(FIRST_ROWS, int(raw.length.max()))):
        rows = raw.start + np.minimum(t, raw.length - 1)
        for column in parts:
            width = int(np.prod(column.shape[1:], dtype=np.int64))
            odd = weights.integers(1, 2**63, width, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            for low in range(0, len(rows), CHUNK):
                chosen = rows[low : low + CHUNK]
                words = np.ascontiguousarray(column[chosen]).reshape(len(chosen), width)
                bits = words.view(np.uint32) if words.dtype == np.float32 else words
                digest[low : low + CHUNK] += bits.astype(np.uint64) @ odd
    return len(digest) - len(np.unique(digest))


def _bounds(raw: Raw) -> None:
    """Record whose action bounds are used; those of the data when the environment's are not known."""
    if "action_n" in raw.facts:
        raw.meta["action_n"] = int(raw.facts["action_n"])
        return
    known = raw.meta.get("action_low") is not None and raw.meta.get("action_bounds") != "data"
    if known:
        raw.meta.setdefault("action_bounds", "environment")
        if np.isfinite([raw.meta["action_low"], raw.meta["action_high"]]).all():
            return
    action = raw.steps["action"]
    covered = int(raw.length.sum()) == len(action)
    spans = [slice(0, len(action))] if covered else [slice(s, s + n) for s, n in zip(raw.start, raw.length)]
    low = np.min([action[span].min(0) for span in spans], axis=0)
    high = np.max([action[span].max(0) for span in spans], axis=0)
    if known:
        raw.notes.append(
            f"actions are bounded by {_range(raw.meta)}; where a side has no bound, the data's is taken: "
            f"[{_numbers(low.tolist())}] to [{_numbers(high.tolist())}]"
        )
        return
    raw.meta |= {"action_low": low.tolist(), "action_high": high.tolist(), "action_bounds": "data"}


def _usable(raw: Raw) -> int:
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


def _range(meta: Mapping[str, Any]) -> str:
    low, high = meta["action_low"], meta["action_high"]
    if len(set(low)) == 1 and len(set(high)) == 1:
        return f"[{low[0]:g}, {high[0]:g}]"
    return f"[{_numbers(low)}] to [{_numbers(high)}]"


def _numbers(values: Sequence[float]) -> str:
    shown = ", ".join(f"{v:.3g}" for v in values[:6])
    return shown + ", …" * (len(values) > 6)


# -- report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What a replay holds, as numbers; ``str()`` is the plain text shown at load.

    Attributes:
        name, source, file: where the data come from.
        rows, episodes, usable: steps, episodes, and steps a transition may be drawn from.
        length, returns: (smallest, mean, largest) per episode; returns are undiscounted and untransformed.
        reward: (smallest, mean, largest) per step; None, like returns, when there is none.
        terminated: steps at which the environment ended the episode; the other episodes were cut.
        action_range: bounds and whose they are.
        columns: name → dtype and shape.
        source_dtypes: name → dtype in the source, where it was another.
        environment: id and scores, or why there are none.
        notes, warnings: counts and doubts from the load.
        fingerprint: SHA-256 over all columns when asked for.
    """

    name: str
    source: str
    file: str | None
    rows: int
    episodes: int
    usable: int
    length: tuple[float, float, float]
    returns: tuple[float, float, float] | None
    reward: tuple[float, float, float] | None
    terminated: int
    action_range: str
    columns: dict[str, str]
    source_dtypes: dict[str, str]
    environment: str
    notes: list[str]
    warnings: list[str]
    fingerprint: str | None = None

    def __str__(self) -> str:
        def triple(values: tuple[float, float, float]) -> str:
            return " / ".join(f"{v:,.6g}" for v in values)

        cut = max(self.episodes - self.terminated, 0)
        dropped = self.rows - self.usable
        without = f" ({dropped:,} steps have no known successor)" if dropped else ""
        lines = [
            f"{self.name} ({self.source}{', ' + self.file if self.file else ''})",
            f"  steps        {self.rows:,} in {self.episodes:,} episodes; {self.usable:,} usable transitions{without}",
            f"  length       {triple(self.length)}   (smallest / mean / largest)",
        ]
        if self.returns is not None and self.reward is not None:
            lines += [f"  return       {triple(self.returns)}", f"  reward       {triple(self.reward)}"]
        else:
            lines += ["  reward       none: for goal-conditioned and cloning methods"]
        lines += [
            f"  ends         {self.terminated:,} terminated, {cut:,} truncated",
            f"  actions      {self.action_range}",
            "  columns      " + ", ".join(f"{k} {v}" for k, v in self.columns.items()),
        ]
        if self.source_dtypes:
            lines += ["  stored as    " + ", ".join(f"{k} {v}" for k, v in self.source_dtypes.items())]
        lines += [f"  environment  {self.environment}"]
        if self.fingerprint:
            lines += [f"  fingerprint  {self.fingerprint}"]
        lines += [f"  note: {note}" for note in self.notes] + [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def report(replay: Replay, *, fingerprint: bool = False) -> Report:
    """Measure a replay.

    Args:
        replay: control data.
        fingerprint: also compute the SHA-256 over all columns (reads everything).
    """
    meta = replay.meta
    stop = replay.start + replay.length
    flags = np.concatenate([[0], np.cumsum(_numpy(replay.steps["terminated"]), dtype=np.int64)])
    returns = reward = None
    if "reward" in replay.steps:
        per_episode = replay.returns()
        returns = _spread(per_episode)
        whole = int(replay.length.sum()) == len(replay.steps["reward"])
        column = _numpy(replay.steps["reward"])
        column = column if whole else column[replay.rows]
        reward = (float(column.min()), float(per_episode.sum() / replay.num_steps), float(column.max()))
    if "action_n" in meta:
        actions = f"{meta['action_n']} discrete actions"
    elif meta.get("action_low") is not None:
        actions = f"{_range(meta)} ({WHOSE[meta.get('action_bounds', 'environment')]})"
    else:
        actions = "bounds unknown"
    return Report(
        name=str(meta.get("name", "replay")),
        source=str(meta.get("source", "arrays")),
        file=meta.get("file"),
        rows=replay.num_steps,
        episodes=replay.num_episodes,
        usable=_usable_of(replay),
        length=_spread(replay.length),
        returns=returns,
        reward=reward,
        terminated=int((flags[stop] - flags[replay.start]).sum()),
        action_range=actions,
        columns={k: f"{_numpy(v).dtype} {tuple(v.shape)}" for k, v in replay.steps.items()},
        source_dtypes=dict(meta.get("source_dtypes", {})),
        environment=_environment(meta),
        notes=list(meta.get("notes", [])),
        warnings=list(meta.get("warnings", [])),
        fingerprint=replay.fingerprint() if fingerprint else None,
    )


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    return float(values.min()), float(values.mean()), float(values.max())


def _usable_of(replay: Replay) -> int:
    columns = {k: _numpy(v) for k, v in replay.steps.items() if k in ("obs", "next_obs", "valid_td", "terminated")}
    tail = {k: _numpy(v) for k, v in replay.tail.items()}
    return _usable(Raw(columns, replay.start, replay.length, "", tail))


def _environment(meta: Mapping[str, Any]) -> str:
    env = meta.get("env_id")
    text = str(env) if env else "none known: no returns are measured"
    if env and meta.get("max_episode_steps"):
        text += f", {meta['max_episode_steps']} steps"
    if meta.get("ref_min_score") is not None and meta.get("ref_max_score") is not None:
        text += f"; score 0 = {meta['ref_min_score']:g}, 100 = {meta['ref_max_score']:g}"
        text += f" ({meta.get('score_kind', 'normalised')})"
    elif env:
        text += "; no reference scores, so no normalised score"
    return text + (f". {meta['score_note'][0].upper()}{meta['score_note'][1:]}" if meta.get("score_note") else "")
