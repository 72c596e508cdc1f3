"""Flat columns laid end to end, from memory or .npz, under D4RL's key names or ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.data import validate
from offpolicy.data.replay import Replay
from offpolicy.data.sources.fetch import Lock, corrupt, open_npz
from offpolicy.data.validate import Raw, as_flag, check_structure
from offpolicy.errors import DataError, UsageError, nearest
from offpolicy.trust import take_environment

ALIASES = {  # our column → the names it goes by
    "obs": ("obs", "observations", "observation"),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards"),
    "terminated": ("terminated", "terminals", "terminations"),
    "next_obs": ("next_obs", "next_observations"),
    "end": ("episode_end", "timeouts", "truncated", "truncations"),
    "valid_td": ("valid_td",),
}
UNCLEAR = ("done", "dones")
TIMEOUT_STEPS = ("drop", "keep", "self")


def from_arrays(
    data: Mapping[str, Any] | None = None,
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
            next_observations``), also ``masks`` (= not terminated). An episode ends where a row is terminated or
            marked as the end.
        name: of the data set, for reports and run folders.
        env_id: gymnasium environment to evaluate in; its spaces are checked and give the action bounds.
        env_kwargs: for making it.
        obs_keys: parts of a dict observation that ``obs`` consists of, in order.
        max_episode_steps: the environment's limit; without ``episode_end`` longer episodes are cut there.
        action_low, action_high: bounds, (A,) or one number, when no environment tells them.
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
    given = {**(data or {}), **columns}
    arrays = {key: np.asarray(value) for key, value in given.items() if value is not None}
    meta: dict[str, Any] = {"name": name, "source": "arrays"}
    facts = environment(meta, env_id, env_kwargs, obs_keys, max_episode_steps)
    if (action_low is None) != (action_high is None):
        raise UsageError("one of `action_low` and `action_high` is missing; expected both or none. Pass both.")
    if action_low is not None:
        width = arrays[match(arrays).get("action", "")].shape[-1] if "action" in match(arrays) else 1
        low, high = (np.broadcast_to(np.asarray(b, dtype=np.float64), (width,)) for b in (action_low, action_high))
        meta |= {"action_low": low.tolist(), "action_high": high.tolist(), "action_bounds": "given"}
    if ref_min_score is not None and ref_max_score is not None:
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
    import zipfile
    import zlib

    arrays = {}
    with open_npz(path) as archive:
        for key in archive.files:
            if key in set(skip):
                continue
            try:
                arrays[key] = archive[key]
            except ValueError as error:
                raise DataError(
                    f"{path}: `{key}` is not a plain array ({error}). Pickled objects are never read, as opening them "
                    "runs code; save numbers only."
                ) from None
            except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise corrupt(path, key, error) from None
    return arrays


def match(names: Iterable[str]) -> dict[str, str]:
    """Our column names → the ones used here.

    Raises:
        DataError: two names for one column, or ``dones``, which does not say whether the episode ended or was cut.
    """
    names = list(names)
    unclear = next((n for n in names if n in UNCLEAR), None)
    found: dict[str, str] = {}
    for ours, aliases in ALIASES.items():
        present = [a for a in aliases if a in names]
        if len(present) > 1:
            raise DataError(
                f"both `{present[0]}` and `{present[1]}` are given for `{ours}`; expected one. Leave one out."
            )
        if present:
            found[ours] = present[0]
    if unclear and not {"terminated", "end"} <= found.keys():
        raise DataError(
            f"`{unclear}` does not say whether the environment ended an episode or a time limit cut it, and only the "
            "first stops bootstrapping; expected `terminated` and `episode_end` (or `terminals` and `timeouts`). "
            "Pass both."
        )
    return found


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
        facts: as in :class:`offpolicy.data.validate.Raw`.
        timeout_step: as in :func:`from_arrays`.
        owned: the arrays may be changed in place.
        on_bad, clip_actions: as in :func:`offpolicy.data.validate.finish`.
        notes: counts so far.
    """
    if timeout_step is not None and timeout_step not in TIMEOUT_STEPS:
        raise UsageError(f"`timeout_step` is {timeout_step!r}; expected one of {', '.join(TIMEOUT_STEPS)}.")
    columns = dict(columns)
    if "masks" in columns and "terminated" not in match(columns):
        columns["terminated"] = ~as_flag(where, "masks", columns.pop("masks"))
    keys = match(columns)
    if "terminated" not in keys and "end" in keys:
        columns["terminated"] = np.zeros(len(columns[keys["end"]]), dtype=bool)
        keys["terminated"] = "terminated"
        notes = [*notes, f"there are only end marks (`{keys['end']}`) and no `terminals`: nothing is taken as terminal"]
    shapes = {key: tuple(column.shape) for key, column in columns.items()}
    rows = check_structure(where, shapes, keys, facts, ("obs", "action", "reward", "terminated"))
    raw = Raw({}, np.zeros(0), np.zeros(0), where, meta=meta, keys=keys, facts=facts, owned=owned, notes=list(notes))
    meta.setdefault("source_dtypes", {})
    for name, key in keys.items():
        column = columns.pop(key)
        if name in ("terminated", "end", "valid_td"):
            raw.steps[name] = as_flag(where, key, column)
        else:
            raw.steps[name] = as_numbers(where, key, column, image=column.ndim > 2)
        if raw.steps[name].dtype != column.dtype and name not in ("terminated", "end", "valid_td"):
            meta["source_dtypes"][name] = str(column.dtype)
    raw.steps["reward"] = raw.steps["reward"].reshape(rows)
    _shape_actions(raw, columns, shapes[keys["action"]], np.dtype(meta["source_dtypes"].get("action", "float32")))
    for key, column in columns.items():
        if column.ndim and len(column) == rows and column.dtype.kind in "fiub":
            raw.steps[key] = column
        else:
            raw.notes.append(
                f"`{key}` {tuple(column.shape)} was left out: it is not one number or row of numbers per step"
            )
    _segment(raw, rows, timeout_step)
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
        meta["max_episode_steps"] = int(max_episode_steps)
    if env_id is None:
        return {}
    from offpolicy.evaluation.rollout import NoEnvironment, make_environment

    take_environment(meta)
    meta |= {"env_id": env_id, "env_kwargs": dict(env_kwargs or {})}
    if obs_keys is not None:
        meta["obs_keys"] = list(obs_keys)
    try:
        env = make_environment(meta)
    except NoEnvironment as error:
        import gymnasium

        if env_id in gymnasium.registry or "not installed" in str(error):
            meta["score_note"] = str(error)
            return {}
        raise UsageError(f"{error}{nearest(env_id, gymnasium.registry)} Correct `env_id`, or leave it out.") from None
    meta.setdefault("max_episode_steps", env.spec.max_episode_steps if env.spec else None)
    action, obs = env.action_space, env.observation_space
    env.close()
    facts: dict[str, Any] = {}
    if hasattr(action, "n"):
        facts |= {"action_n": int(action.n), "action_start": int(action.start)}
    elif getattr(action, "shape", None):
        facts["action_dim"] = int(np.prod(action.shape))
        meta |= {"action_low": action.low.ravel().tolist(), "action_high": action.high.ravel().tolist()}
        meta["action_bounds"] = "environment"
    if len(obs.shape or ()) == 1:
        facts["obs_dim"] = int(obs.shape[0])
    return facts


def _shape_actions(raw: Raw, columns: Mapping[str, np.ndarray], shape: tuple[int, ...], source: np.dtype) -> None:
    """Continuous actions are float32 (N, A); discrete ones int64 (N, 1)."""
    action = raw.steps["action"]
    if len(shape) > 2:
        raise DataError(
            f"{raw.where}: `{raw.keys['action']}` has shape {shape}; expected (rows, A). Flatten it per step."
        )
    if "action_n" not in raw.facts and source.kind in "iu" and action.size == len(action):
        raw.facts["action_n"] = int(action.max()) + 1 if np.isfinite(action).all() else 1
        raw.notes.append(
            f"integer actions are taken as {raw.facts['action_n']} discrete ones (the largest is that minus 1)"
        )
    if "action_n" in raw.facts:
        if action.size != len(action):
            raise DataError(
                f"{raw.where}: `{raw.keys['action']}` has shape {shape}; the environment has "
                f"{raw.facts['action_n']} discrete "
                "actions. Expected one number per step."
            )
        whole = action == np.floor(action)
        raw.steps["action"] = action.reshape(-1, 1)
        if whole.all():
            raw.steps["action"] = raw.steps["action"].astype(np.int64)
    elif len(shape) == 1:
        raise DataError(
            f"{raw.where}: `{raw.keys['action']}` has shape {shape}; expected (rows, A). Reshape it to (rows, 1)."
        )


def _segment(raw: Raw, rows: int, timeout_step: str | None) -> None:
    """Fill the episode index, and settle the last step of the episodes that were cut."""
    terminated, cut = raw.steps["terminated"], raw.steps.pop("end", None)
    ends = terminated.copy() if cut is None else terminated | cut
    limit = raw.meta.get("max_episode_steps")
    if cut is None and limit:
        t = np.arange(rows)
        first = np.where(np.concatenate([[True], terminated[:-1]]), t, 0)
        limited = (t - np.maximum.accumulate(first)) % limit == limit - 1
        raw.notes.append(f"there are no end marks but terminals: episodes are cut after {limit} steps")
        cut = limited
        ends |= limited
    elif cut is None and not terminated.any():
        raw.warnings.append(
            f"there are no end marks and no terminals: all {rows} steps are taken as one episode; pass `timeouts`, or "
            "`max_episode_steps` to cut it"
        )
    ends[-1] = True
    last = np.flatnonzero(ends)
    raw.start = np.concatenate([[0], last[:-1] + 1])
    raw.length = last + 1 - raw.start
    raw.truncated = np.zeros(len(last), dtype=bool) if cut is None else cut[last]
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
    if len(cut_rows) and (timeout_step == "drop" or (not has_next and timeout_step is None)):
        raw.notes.append(f"{len(cut_rows)} last steps before a cut are left out of transitions (timeout_step 'drop')")
