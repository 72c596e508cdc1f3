"""Marks of the ends of episodes: under which names sources keep them, what each says, and where episodes are cut.

Four things are told apart. *terminated*: the environment ended the episode. *truncated*: something else cut it, mostly
a time limit. *last*: the row ends its episode, whatever the cause; the first rows of episodes and their numbers say the
same. *done*: the episode ended or was cut, which alone does not say whether to bootstrap.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offpolicy.data.doubts import breaks
from offpolicy.data.raw import Raw, as_flag
from offpolicy.errors import DataError, listed

NAMES: dict[str, tuple[str, ...]] = {  # what a column says → its names, folded as by `_fold`
    "terminated": ("terminated", "terminal", "termination", "terminate", "isterminal", "isterminated"),
    "continues": ("mask", "notterminal", "nonterminal", "notterminated"),
    "truncated": (
        *("timeout", "truncated", "truncation", "truncate", "istruncated", "istimeout"),
        *("timelimit", "timelimitreached", "timedout"),
    ),
    "last": (
        *("episodeend", "episodeterminal", "episodelast", "episodefinal", "episodeover", "episodefinished"),
        *("end", "last", "final", "islast", "isend", "isfinal", "isepisodeend", "endofepisode", "endepisode"),
        *("laststep", "islaststep", "trajend", "trajectoryend", "endoftrajectory", "trajectoryterminal"),
    ),
    "first": (
        *("isfirst", "first", "start", "isstart", "isinitial", "initial", "firststep", "isfirststep", "newepisode"),
        *("episodestart", "episodebegin", "episodebeginning", "episodefirst", "trajstart", "trajectorystart"),
        *("isepisodestart", "startofepisode"),
    ),
    "done": ("done", "isdone", "doneflag", "episodedone"),
    "number": (
        *("episode", "episodeid", "episodeidx", "episodeindex", "episodeindice", "episodenumber", "episodenum"),
        *("episodeno", "epid", "epsid", "epidx", "traj", "trajid", "trajidx", "trajindex", "trajnum", "trajno"),
        *("trajectory", "trajectoryid", "trajectoryidx", "trajectoryindex", "trajectorynumber", "rolloutid"),
    ),
}
PLAIN = {"terminated", "terminals", "terminations", "masks", "episode_end", "timeouts", "truncated", "truncations"}
COMMON_WORDS = {"end", "last", "final", "first", "start", "initial", "episode", "traj", "trajectory", "mask"}
LENGTHS = {"episodelength", "episodelen", "trajlength", "trajlen", "trajectorylength", "length"}
COUNTERS = {"t", "step", "timestep", "steptype", "stepid", "stepindex", "stepnum", "frameindex", "episodestep"}
MARK_WORDS = re.compile(
    r"(?<![a-z])(end|ends|ended|done|dones|last|first|final|finish|finished|over|reset|resets|start|starts|term"
    r"|terminal|terminals|terminate|terminated|termination|trunc|truncated|truncation|timeout|timeouts|episode|episodes"
    r"|traj|trajs|trajectory|trajectories)(?![a-z])"
)


@dataclass
class Marks:
    """What the columns of a source say about ends, bool (N,) each.

    Attributes:
        terminated: the environment ended the episode here.
        truncated: the source says that a time limit or the like cut the episode here; None when it never says it.
        last: the row is the last of its episode; None when no column says it.
        names: what was found → the name of the column.
        repeated: column of episode numbers → a number that more than one run of rows has.
    """

    terminated: np.ndarray
    truncated: np.ndarray | None = None
    last: np.ndarray | None = None
    names: dict[str, str] = field(default_factory=dict)
    repeated: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def has_name(name: str) -> bool:
    """Whether a column of this name marks ends for sure, whatever is in it."""
    return _fold(name) not in COMMON_WORDS and any(_fold(name) in names for names in NAMES.values())


def find(columns: Mapping[str, Any], rows: int | None) -> dict[str, list[str]]:
    """What columns say about ends, by their names: kind → names.

    Args:
        columns: name → anything with a shape and a dtype.
        rows: of the data; None when not known. Names that are ordinary words count only for columns of one number per
            row of a fitting type.
    """
    found: dict[str, list[str]] = {}
    for name, column in columns.items():
        kind = next((kind for kind, names in NAMES.items() if _fold(name) in names), None)
        if kind == "continues" and name.lower() == "mask":  # of padding, of legal actions, … as likely
            continue
        if kind is not None and (_fold(name) not in COMMON_WORDS or _is_one_per_row(column, rows)):
            found.setdefault(kind, []).append(name)
    return found


def take(where: str, columns: dict[str, np.ndarray], rows: int) -> Marks:
    """Read the marks and remove their columns; numbers of episodes stay columns.

    Raises:
        DataError: marks that contradict each other, ``dones`` alone, or values that are no flags.
    """
    found = find(columns, rows)
    marks = Marks(np.zeros(rows, dtype=bool))
    exact = _exact(where, columns, found, rows, marks)
    terminated = _one(where, columns, found, "terminated", rows, marks)
    going = _one(where, columns, found, "continues", rows, marks)
    if going is not None:
        if terminated is not None and not np.array_equal(terminated, ~going):
            row = int(np.flatnonzero(terminated == going)[0])
            raise DataError(
                f"{where}: `{marks.names['continues']}` should be 0 where `{marks.names['terminated']}` is 1 and only "
                f"there, but row {row} differs. Leave one out. Where `{marks.names['terminated']}` marks every end of "
                "an episode, as in OGBench's single-task sets, pass it as `episode_end`."
            )
        terminated = ~going
        marks.names.setdefault("terminated", marks.names["continues"])
    marks.truncated = _one(where, columns, found, "truncated", rows, marks)
    done = _one(where, columns, found, "done", rows, marks)
    if done is not None:
        terminated = _with_done(where, done, terminated, exact, marks)
    if terminated is None and (exact or marks.truncated is not None):
        name = next(iter(exact), marks.names.get("truncated"))
        marks.notes.append(f"there are only end marks (`{name}`) and no `terminals`: nothing is taken as terminal")
    marks.terminated = np.zeros(rows, dtype=bool) if terminated is None else terminated
    _agree(where, exact, marks)
    if exact:
        marks.last = next(iter(exact.values()))
    marks.notes += [
        f"`{name}` was taken to mark {WORDS[kind]}" for kind, name in marks.names.items() if name not in PLAIN
    ]
    return marks


WORDS = {
    "terminated": "the steps after which the environment ended the episode",
    "continues": "the steps after which the environment did not end the episode",
    "truncated": "the steps after which the episode was cut",
    "last": "the last step of each episode",
    "first": "the first step of each episode",
    "number": "the episode of each step",
    "done": "the last step of each episode",
    "ends": "where episodes end, as row numbers",
    "starts": "where episodes start, as row numbers",
    "lengths": "the lengths of the episodes",
}


def _fold(name: str) -> str:
    """Case, separators and a plural do not matter: ``Episode_Ends`` → ``episodeend``."""
    return re.sub(r"[\W_]", "", name).lower().rstrip("s")


def _is_one_per_row(column: Any, rows: int | None) -> bool:
    shape = tuple(column.shape)
    return (rows is None or shape[:1] == (rows,)) and len(shape) in (1, 2) and int(np.prod(shape[1:])) == 1


def _one(
    where: str, columns: dict[str, np.ndarray], found: Mapping[str, list[str]], kind: str, rows: int, marks: Marks
) -> np.ndarray | None:
    """The flag of a kind; two columns of one kind have to be equal."""
    flag = None
    for name in found.get(kind, []):
        if _fold(name) in COMMON_WORDS and not _is_flag(columns[name]):
            continue  # a column of another meaning
        if columns[name].size != rows:
            raise DataError(
                f"{where}: `{name}` has shape {tuple(columns[name].shape)}; expected ({rows},), one mark for each step."
            )
        other, flag = flag, as_flag(where, name, columns.pop(name))
        if other is not None and not np.array_equal(other, flag):
            raise DataError(
                f"{where}: `{marks.names[kind]}` and `{name}` both mark {WORDS[kind]}, but row "
                f"{int(np.flatnonzero(other != flag)[0])} differs. Leave one out."
            )
        marks.names[kind] = name
    return flag


def _exact(
    where: str, columns: dict[str, np.ndarray], found: Mapping[str, list[str]], rows: int, marks: Marks
) -> dict[str, np.ndarray]:
    """Name → last rows (N,), of every column that tells all ends; the very last row is always one."""
    exact: dict[str, np.ndarray] = {}
    places = [(n, False) for n in columns if n in found.get("last", []) or _fold(n) in LENGTHS]
    for name, starts in places + [(n, True) for n in found.get("first", [])]:
        ends, kind = _ends_of_numbers(columns[name], rows, starts)
        if ends is not None:
            exact[name], marks.names[kind] = ends, name
            columns.pop(name)
    flags = {kind: [n for n in found.get(kind, []) if n in columns] for kind in ("last", "first")}
    last = _one(where, columns, flags, "last", rows, marks)
    if last is not None:
        exact[marks.names["last"]] = last
    first = _one(where, columns, flags, "first", rows, marks)
    if first is not None:
        exact[marks.names["first"]] = np.append(first[1:], True)
    for name in found.get("number", []):
        if _fold(name) in COMMON_WORDS and columns[name].dtype.kind not in "iuUS":
            continue
        if _is_one_per_row(columns[name], rows):
            numbers = columns[name].reshape(-1)
            exact[name] = _changes(where, name, numbers)
            marks.names["number"] = name
            repeated = _repeated(numbers, exact[name])
            if repeated is not None:
                marks.repeated[name] = repeated
    return exact


def _ends_of_numbers(column: np.ndarray, rows: int, starts: bool) -> tuple[np.ndarray | None, str]:
    """Ends (N,) from lengths or ascending row numbers (E,): of first rows, of last rows, or of those after them."""
    values = column.reshape(-1) if column.dtype.kind in "iu" and column.ndim == 1 else np.zeros(0)
    if not len(values) or (len(values) == rows and _is_flag(column)):
        return None, ""
    values = values.astype(np.int64)
    if starts:
        if values[0] != 0 or (np.diff(values) <= 0).any() or values[-1] >= rows:
            return None, ""
        kind, at = "starts", np.append(values[1:], rows) - 1
    elif (values >= 1).all() and values.sum() == rows:
        kind, at = "lengths", np.cumsum(values) - 1
    elif (np.diff(values) > 0).all() and values[0] >= 0 and values[-1] in (rows - 1, rows):
        kind, at = "ends", values - (values[-1] - rows + 1)
    else:
        return None, ""
    if at[0] < 0:
        return None, ""
    ends = np.zeros(rows, dtype=bool)
    ends[at] = True
    return ends, kind


def _changes(where: str, name: str, numbers: np.ndarray) -> np.ndarray:
    """Last rows of the runs of equal episode numbers.

    Raises:
        DataError: a number is NaN.
    """
    if numbers.dtype.kind == "f" and np.isnan(numbers).any():
        row = int(np.flatnonzero(np.isnan(numbers))[0])
        raise DataError(f"{where}: `{name}` is NaN at row {row}; expected the episode of every row. Fill it in.")
    return np.append(numbers[1:] != numbers[:-1], True)


def _repeated(numbers: np.ndarray, last: np.ndarray) -> Any:
    """An episode number with more than one run of rows; None when there is none."""
    found, counts = np.unique(numbers[last], return_counts=True)
    return found[counts > 1][0] if (counts > 1).any() else None


def _is_flag(column: np.ndarray) -> bool:
    return column.dtype == bool or (column.dtype.kind in "fiu" and bool(np.isin(column, (0, 1)).all()))


def _with_done(
    where: str, done: np.ndarray, terminated: np.ndarray | None, exact: dict[str, np.ndarray], marks: Marks
) -> np.ndarray:
    """Terminated steps, from ``dones`` and what else is known; ``dones`` may tell all ends."""
    name, cut = marks.names.pop("done"), marks.truncated
    if terminated is None and cut is None:
        raise DataError(
            f"`{name}` does not say whether the environment ended an episode or a time limit cut it, and only the "
            "first stops bootstrapping; expected `terminated` and `episode_end` (or `terminals` and `timeouts`). "
            "Pass both."
        )
    if terminated is None:
        assert cut is not None
        if (cut & ~done).any() and (cut & done).any():
            row = int(np.flatnonzero(cut & ~done)[0])
            raise DataError(
                f"{where}: `{name}` is 1 at some cuts of `{marks.names['truncated']}` and 0 at others (first: row "
                f"{row}), so it says neither that an episode terminated nor that it ended. Pass `terminated`."
            )
        marks.notes.append(f"steps with `{name}` and without `{marks.names['truncated']}` are taken as terminated")
        marks.names["terminated"] = name
        return done & ~cut
    everything = terminated.copy()
    for flag in (cut, *exact.values()):
        everything |= False if flag is None else flag
    if cut is None and not exact and not (terminated & ~done).any():
        if (done & ~terminated).any():  # else another name of the same
            marks.names["done"], exact[name] = name, done
    elif not np.array_equal(done, terminated) and not np.array_equal(done[:-1], everything[:-1]):
        row = int(np.flatnonzero(done != everything)[0])
        raise DataError(
            f"{where}: `{name}` and the other marks of ends differ, first at row {row}; expected it to be 1 exactly "
            f"where an episode ends. Leave `{name}` out, or correct it."
        )
    return terminated


def _agree(where: str, exact: Mapping[str, np.ndarray], marks: Marks) -> None:
    """Check that all marks can be true together; the last row may or may not be marked.

    Raises:
        DataError: they cannot; names two columns and the first row.
    """
    if not exact:
        return
    (name, ends), *others = exact.items()
    for other, flag in others:
        differ = np.flatnonzero(ends[:-1] != flag[:-1])
        if len(differ):
            raise DataError(
                f"{where}: `{name}` and `{other}` tell different ends of episodes, first at row {differ[0]}. Leave out "
                "the wrong one."
            )
    for number, value in marks.repeated.items():
        told = marks.terminated | (False if marks.truncated is None else marks.truncated)
        for other, flag in exact.items():
            told = told | (flag if other not in marks.repeated else False)
        if not np.array_equal(told[:-1], exact[number][:-1]):  # numbers that start again, or rows of several mixed
            raise DataError(
                f"{where}: the rows of episode {value} by `{number}` do not lie together; expected one run of rows for "
                "each episode. Sort the rows by episode and time, or give every episode a number of its own, or leave "
                f"`{number}` out."
            )
    for kind, partial in (("truncated", marks.truncated), ("terminated", marks.terminated)):
        if partial is None or (kind == "terminated" and name == "episode_end" and not others):
            continue  # an episode ends where a row is terminated or marked in `episode_end`
        inside = np.flatnonzero(partial[:-1] & ~ends[:-1])
        if len(inside):
            raise DataError(
                f"{where}: `{marks.names[kind]}` is 1 at row {inside[0]}, where the episode goes on by `{name}`; "
                "expected it at ends of episodes only. Leave out the wrong one."
            )


# -- cutting -----------------------------------------------------------------------------------------------------------


def segment(raw: Raw, marks: Marks) -> None:
    """Fill the episode index of ``raw`` and what is known of each end."""
    raw.notes += marks.notes
    raw.warnings += marks.warnings
    terminated, rows = marks.terminated, len(marks.terminated)
    ends = terminated.copy()
    known = np.zeros(rows, dtype=bool)
    for flag in (marks.truncated, marks.last):
        if flag is not None:
            known |= flag
    if marks.truncated is None and marks.last is None:
        known |= _unmarked(raw, terminated)
    ends |= known
    ends[-1] = True
    last = np.flatnonzero(ends)
    raw.start = np.concatenate([[0], last[:-1] + 1])
    raw.length = last + 1 - raw.start
    raw.truncated = np.zeros(len(last), dtype=bool) if marks.truncated is None else marks.truncated[last]
    raw.marked = known[last]


def _unmarked(raw: Raw, terminated: np.ndarray) -> np.ndarray:
    """Where episodes are cut although no column says so: by next observations, and by the step limit."""
    rows = len(terminated)
    cut = np.zeros(rows, dtype=bool)
    limit = raw.meta.get("max_episode_steps")
    if "next_obs" in raw.steps:
        cut = breaks(raw.steps["obs"], raw.steps["next_obs"]) & ~terminated
        count = int(cut.sum())
        if count:
            raw.notes.append(
                f"there are no end marks: episodes are cut at the {count} steps whose `{raw.keys['next_obs']}` is not "
                "the next row's observation" + (", so most rows are episodes of one step" if count > rows // 2 else "")
            )
    if limit:
        ends = terminated | cut
        t = np.arange(rows)
        first = np.where(np.append(True, ends[:-1]), t, 0)
        raw.notes.append(f"there are no end marks but terminals: episodes are cut after {limit} steps")
        return cut | ((t - np.maximum.accumulate(first)) % limit == limit - 1)
    if not terminated.any() and not cut.any():
        raw.warnings.append(
            f"there are no end marks and no terminals: all {rows} steps are taken as one episode; pass `timeouts`, or "
            "`max_episode_steps` to cut it"
        )
    elif "next_obs" not in raw.steps:
        count = int(terminated[:-1].sum()) + 1
        raw.notes.append(
            f"there is no `episode_end`: the {count} episodes come from `{raw.keys['terminated']}` alone, and time "
            "limits are invisible; pass `episode_end` if some episodes were cut"
        )
    return cut


def lookalikes(raw: Raw, columns: Mapping[str, np.ndarray], used: Iterable[str], rows: int) -> list[str]:
    """Warnings about unused columns that look like marks of ends, and about step counters that restart unmarked."""
    used = set(used)
    suspects = []
    restarts = []
    for name, column in columns.items():
        if column.dtype.kind not in "fiub" or column.size == 0 or column.ndim > 2:
            continue
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        one = _is_one_per_row(column, rows)
        flat = column.reshape(-1)
        if one and _fold(name) in COUNTERS:
            fall = np.append(flat[1:] < flat[:-1], False)
            fall[raw.start + raw.length - 1] = False
            if fall.any():
                restarts.append(f"`{name}` at {int(fall.sum())} rows (first: {int(np.flatnonzero(fall)[0])})")
        elif MARK_WORDS.search(words) or any(_fold(name) in names for names in NAMES.values()):
            if not one and column.ndim == 1 and column.dtype.kind in "iub" and 1 < len(flat) < rows:
                suspects.append(f"`{name}` {tuple(column.shape)}")
            elif one and name not in used and _is_flag(column) and 0 < np.count_nonzero(flat) <= rows // 2:
                suspects.append(f"`{name}`")
    found = []
    if suspects:
        found.append(
            f"{listed(suspects)} look{'s' * (len(suspects) == 1)} like a mark of ends of episodes and "
            f"{'was' if len(suspects) == 1 else 'were'} not used: if episodes end there, pass the column as "
            "`episode_end`, or as `terminated` where the environment ended them"
        )
    if restarts:
        found.append(
            f"{listed(restarts)} starts again inside episodes: the ends of episodes may not all be marked; pass "
            "`episode_end`"
        )
    return found
