"""Flat columns laid end to end, from memory or .npz, under D4RL's key names or ours (marks of ends: see `ends.py`)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.data import ends, validate
from offpolicy.data.doubts import precision_doubts
from offpolicy.data.guard import read_archive
from offpolicy.data.raw import NAMES, Raw, as_flag, check_structure, match
from offpolicy.data.replay import Replay
from offpolicy.data.sources.containers import plain_columns
from offpolicy.data.sources.fetch import Lock, npz_names
from offpolicy.data.spaces import bounds_meta, check_some_numbers, environment_facts
from offpolicy.errors import DataError, UsageError, nearest
from offpolicy.given import whole
from offpolicy.trust import take_environment

TIMEOUT_STEPS = ("drop", "keep", "self")


def from_arrays(
    data: Any = None,
    *,
    name: str = "arrays",
    env_id: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    obs_keys: Iterable[str] | None = None,
    max_episode_steps: int | None = None,
    action_low: Any = None,
    action_high: Any = None,
    ref_min_score: float | None = None,
    ref_max_score: float | None = None,
    timeout_step: str | None = None,
    on_bad: str = "error",
    clip_actions: bool = False,
    **columns: Any,
) -> Replay:
    """A replay from NumPy arrays (or anything that converts), one row per step, episodes laid end to end.

    Args:
        data: the columns by name; more can be given as keywords. ``obs (N, O)``, ``action (N, A)`` in environment
            units, ``reward (N,)``, ``terminated (N,)``; optionally ``next_obs (N, O)``, ``episode_end (N,)`` and any
            others of N rows, which are kept. D4RL's names work too (``observations actions rewards terminals timeouts
            next_observations``), also ``masks`` (= not terminated) and the usual other names of marks of ends
            (``is_last``, ``is_first``, ``episode_id`` …, which a note names). An episode ends where a row is
            terminated or marked as the end. Or a list of episodes, each a dict of such columns.
        name: of the data set, for reports and run folders.
        env_id: gymnasium environment to evaluate in; its spaces are checked and give the action bounds.
        env_kwargs: for making it.
        obs_keys: parts of a dict observation that ``obs`` consists of, in order; ``obs`` may be a dict of arrays then.
        max_episode_steps: the environment's limit; without ``episode_end`` longer episodes are cut there.
        action_low, action_high: bounds, (A,) or one number, when no environment tells them; infinite for none.
        ref_min_score, ref_max_score: returns that score 0 and 100.
        timeout_step: the last step of an episode that was cut: "drop" it from transitions, "keep" it with the stored
            next observation, or let its "self" be the next observation. None keeps it where the next is known.
        on_bad: "error" or "drop_episode", for faulty content.
        clip_actions: clip actions outside the bounds instead of calling them faulty.

    Returns:
        The replay. Columns of a suitable type are shared with the arrays, not copied.

    Raises:
        DataError: data that cannot be trained on.  UsageError: options that do not fit.
    """
    obs_keys = None if obs_keys is None else list(obs_keys)
    arrays = {} if data is None else plain_columns(data, obs_keys)
    for key, value in columns.items():
        if isinstance(value, (str, bool, int, float)):
            options = [p for p in inspect.signature(from_arrays).parameters if p not in ("data", "columns")]
            raise UsageError(
                f"`{key}` is {value!r}, which is neither a column nor an option; expected an array with a row for each "
                f"step.{nearest(key, options)}"
            )
    arrays |= plain_columns(columns, obs_keys)
    meta: dict[str, Any] = {"name": name, "source": "arrays"}
    facts = environment(meta, env_id, env_kwargs, obs_keys, max_episode_steps)
    if (action_low is None) != (action_high is None):
        raise UsageError("one of `action_low` and `action_high` is missing; expected both or none. Pass both.")
    if action_low is not None:
        action = match(arrays).get("action")
        width = arrays[action].shape[1] if action is not None and arrays[action].ndim == 2 else 1
        meta |= {"action_low": None, "action_high": None} | bounds_meta(action_low, action_high, "given", width)
        facts.setdefault("action_dim", width)
    if ref_min_score is not None or ref_max_score is not None:
        if ref_min_score is None or ref_max_score is None or not ref_min_score < ref_max_score:
            raise UsageError(
                f"`ref_min_score` is {ref_min_score} and `ref_max_score` {ref_max_score}; expected two returns, the "
                "smaller first. Correct them, or leave both out."
            )
        meta |= {"ref_min_score": ref_min_score, "ref_max_score": ref_max_score, "score_kind": "normalised"}
    return assemble(
        arrays,
        where=name,
        meta=meta,
        facts=facts,
        timeout_step=timeout_step,
        owned=False,
        on_bad=on_bad,
        clip_actions=clip_actions,
    )


def read_npz(
    path: Path, *, meta: dict[str, Any], facts: dict[str, Any], sha256: str | None = None, **options: Any
) -> Replay:
    """A .npz of flat columns; the keywords are those of :func:`assemble`."""
    lock = Lock([path])
    lock.check(sha256)
    arrays = load_npz(path)
    replay = assemble(arrays, where=str(path), meta={**meta, "file": str(path)}, facts=facts, **options)
    replay.meta["sha256"] = lock.keep(replay.num_steps)
    return replay


def load_npz(path: Path, skip: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """All arrays of an archive but those to skip.

    Raises:
        DataError: not an archive, truncated, or a damaged or pickled member.
    """
    npz_names(path)
    return read_archive(path, skip=tuple(skip))


def check_columns(where: str, columns: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[int, dict[str, str]]:
    """Number of rows, and our names → the ones used here, of columns that fit together.

    Args:
        columns: name → anything with a shape and a dtype.
        where, facts: as of :func:`offpolicy.data.raw.check_structure`.

    Raises:
        DataError: as :func:`offpolicy.data.raw.check_structure`.
    """
    keys, shapes = match(columns), {key: tuple(column.shape) for key, column in columns.items()}
    length = next((shapes[keys[name]][0] for name in ("obs", "action") if name in keys and shapes[keys[name]]), None)
    marks = ends.find(columns, length)
    need = ["obs", "action", "reward"] + ["terminated"] * (not marks)
    plain = {str(kind): names[0] for kind, names in marks.items() if kind in NAMES and names[0] in ends.PLAIN}
    return check_structure(where, shapes, {**keys, **plain}, facts, need), keys


def assemble(
    columns: Mapping[str, np.ndarray],
    *,
    where: str,
    meta: dict[str, Any],
    facts: dict[str, Any],
    timeout_step: str | None,
    owned: bool = True,
    on_bad: str = "error",
    clip_actions: bool = False,
    notes: Iterable[str] = (),
) -> Replay:
    """Turn flat columns into a checked replay.

    Args:
        columns: name → array with one row per step, under any known name; unknown ones are kept as they are.
        where: file or source, for messages.
        meta: known facts for the replay's ``meta``; ``max_episode_steps`` cuts episodes when there are no end marks.
        facts: as in :class:`offpolicy.data.raw.Raw`.
        timeout_step: as in :func:`from_arrays`.
        owned: the arrays may be changed in place.
        on_bad, clip_actions: as in :func:`offpolicy.data.validate.finish`.
        notes: counts so far.
    """
    if timeout_step is not None and timeout_step not in TIMEOUT_STEPS:
        raise UsageError(f"`timeout_step` is {timeout_step!r}; expected one of {', '.join(TIMEOUT_STEPS)}.")
    columns = dict(columns)
    shapes = {key: tuple(column.shape) for key, column in columns.items()}
    rows, keys = check_columns(where, columns, facts)
    check_some_numbers(where, columns[keys["obs"]], columns[keys["action"]])
    raw = Raw({}, np.zeros(0), np.zeros(0), where, meta=meta, keys=keys, facts=facts, owned=owned, notes=list(notes))
    marks = ends.take(where, columns, rows)
    if not marks.names:  # what had the name of a mark was something else
        check_structure(where, shapes, keys, facts, ("terminated",))
    keys["terminated"] = marks.names.get("terminated", "terminated")
    measured = {keys[n]: columns[keys[n]] for n in ("obs", "action", "reward") if n in keys}
    raw.warnings += precision_doubts(measured, rows)
    meta.setdefault("source_dtypes", {})
    for name in ("obs", "action", "reward", "next_obs", "valid_td"):
        if name not in keys:
            continue
        column = columns.pop(keys[name])
        if name == "valid_td":
            raw.steps[name] = as_flag(where, keys[name], column)
            continue
        raw.steps[name] = as_numbers(where, keys[name], column, image=column.ndim > 2)
        if raw.steps[name].dtype != column.dtype:
            meta["source_dtypes"][name] = str(column.dtype)
    raw.steps["reward"] = raw.steps["reward"].reshape(rows)
    raw.steps["terminated"] = marks.terminated
    _shape_actions(raw, columns, shapes[keys["action"]], np.dtype(meta["source_dtypes"].get("action", "float32")))
    for key, column in columns.items():
        if column.ndim and len(column) == rows and column.dtype.kind in "fiub":
            raw.steps[key] = np.ascontiguousarray(column)
        elif key not in marks.names.values():
            raw.notes.append(
                f"`{key}` {tuple(column.shape)} was left out: it is not one number or row of numbers per step"
            )
    ends.segment(raw, marks)
    raw.warnings += ends.lookalikes(raw, columns, marks.names.values(), rows)
    _settle_cuts(raw, rows, timeout_step)
    return validate.finish(raw, on_bad=on_bad, clip_actions=clip_actions)


def as_numbers(where: str, key: str, column: np.ndarray, image: bool = False) -> np.ndarray:
    """The column as float32, shared where it is; images stay uint8.

    Raises:
        DataError: it does not hold numbers.
    """
    if column.dtype.kind not in "fiub":
        raise DataError(f"{where}: `{key}` has type {column.dtype}; expected numbers. Cast it to float32.")
    if image and column.dtype == np.uint8:
        return np.ascontiguousarray(column)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which the check of the content names
        return np.ascontiguousarray(column, dtype=np.float32)


def environment(
    meta: dict[str, Any],
    env_id: str | None,
    env_kwargs: Mapping[str, Any] | None,
    obs_keys: Iterable[str] | None,
    max_episode_steps: int | None,
) -> dict[str, Any]:
    """Put an environment that the user names into ``meta`` and return what its spaces demand of the data.

    Raises:
        UsageError: it is unknown, or cannot be made.
    """
    if max_episode_steps is not None:
        meta["max_episode_steps"] = whole("max_episode_steps", max_episode_steps, 1)
    if obs_keys is not None:
        meta["obs_keys"] = list(obs_keys)
    if env_id is None:
        return {}
    if not isinstance(env_id, str):
        known = getattr(getattr(env_id, "spec", None), "id", None) or getattr(env_id, "id", None)
        hint = f" Pass {known!r}." if isinstance(known, str) else " Register it with gymnasium and pass its id."
        raise UsageError(f"`env_id` is of type {type(env_id).__name__}; expected the id of an environment, text.{hint}")
    from offpolicy.environments.make import close_environment, make_environment
    from offpolicy.environments.wrappers import NoEnvironment

    take_environment(meta)
    meta.pop("env_wrappers", None)  # of the environment that the file names
    meta |= {"env_id": env_id, "env_kwargs": dict(env_kwargs or {})}
    try:
        env = make_environment(meta)
    except NoEnvironment as error:
        import gymnasium

        if env_id in gymnasium.registry or "not installed" in str(error):
            meta["score_note"] = str(error)
            return {}
        raise UsageError(f"{error}{nearest(env_id, gymnasium.registry)} Correct `env_id`, or leave it out.") from None
    meta.setdefault("max_episode_steps", env.spec.max_episode_steps if env.spec else None)
    try:
        facts, known = environment_facts(env_id, env)
    finally:
        close_environment(env)
    meta |= known
    return facts


def _shape_actions(raw: Raw, columns: Mapping[str, np.ndarray], shape: tuple[int, ...], source: np.dtype) -> None:
    """Continuous actions are float32 (N, A); discrete ones int64 (N, 1)."""
    action = raw.steps["action"]
    if len(shape) > 2:
        raise DataError(
            f"{raw.where}: `{raw.keys['action']}` has shape {shape}; expected (rows, A). Flatten it per step."
        )
    numbers = "action_dim" in raw.facts or raw.meta.get("action_low") is not None  # of a Box
    if "action_n" not in raw.facts and source.kind in "iub" and not numbers:
        if action.size > len(action):
            raw.steps["action"] = action.astype(np.int64)
            raw.notes.append(
                f"integer actions of width {shape[1]} are taken as discrete ones; if they are numbers, store them as "
                "floats, or pass their environment or bounds"
            )
            return
        raw.facts["action_n"] = int(action.max()) + 1 if np.isfinite(action).all() else 1
        raw.notes.append(
            f"integer actions are taken as {raw.facts['action_n']} discrete ones (the largest is that minus 1); if "
            "they are numbers, store them as floats, or pass their environment or bounds"
        )
    if "action_n" in raw.facts:
        if action.size != len(action):
            raise DataError(
                f"{raw.where}: `{raw.keys['action']}` has shape {shape}; the environment has "
                f"{raw.facts['action_n']} discrete actions. Expected one number per step."
            )
        whole = action == np.floor(action)
        raw.steps["action"] = action.reshape(-1, 1)
        if whole.all():
            raw.steps["action"] = raw.steps["action"].astype(np.int64)
    elif len(shape) == 1:
        raise DataError(
            f"{raw.where}: `{raw.keys['action']}` has shape {shape}; expected (rows, A). Reshape it to (rows, 1)."
        )


def _settle_cuts(raw: Raw, rows: int, timeout_step: str | None) -> None:
    """What becomes of the last step of the episodes that were cut."""
    terminated, last = raw.steps["terminated"], raw.start + raw.length - 1
    cut_rows = last[~terminated[last]]
    has_next = "next_obs" in raw.steps
    if timeout_step == "keep" and not has_next and len(cut_rows):
        raise UsageError(
            f"{raw.where} stores no next observations, so the last step before a time limit has no successor to keep. "
            "Use timeout_step 'drop', or 'self' to let the state follow itself."
        )
    if timeout_step == "self":
        if has_next:
            if not raw.owned:
                raw.steps["next_obs"] = raw.steps["next_obs"].copy()
            raw.steps["next_obs"][cut_rows] = raw.steps["obs"][cut_rows]
        else:
            raw.tail = {"obs": raw.steps["obs"][last]}
    if timeout_step == "drop" and has_next:
        raw.steps.setdefault("valid_td", np.ones(rows, dtype=bool))
        if not raw.owned:
            raw.steps["valid_td"] = raw.steps["valid_td"].copy()
        raw.steps["valid_td"][cut_rows] = False
    if len(cut_rows) and timeout_step == "drop":
        raw.notes.append(f"{len(cut_rows)} last steps before a cut are left out of transitions (timeout_step 'drop')")
