"""D4RL's flat HDF5 layout, read and written (arXiv:2004.07219): its 155 tasks, and any file with the same keys.

Episodes lie end to end. ``terminals`` stops bootstrapping, ``timeouts`` only ends an episode; the rows after the last
mark are an unfinished episode, which is kept. ``infos/…`` are read where they are named, and ``metadata/…`` never.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offpolicy.data import ends
from offpolicy.data.columns import to_numpy
from offpolicy.data.doubts import precision_doubts
from offpolicy.data.guard import check_dataset, check_heaps, unwritten
from offpolicy.data.raw import ALIASES, match
from offpolicy.data.replay import Replay
from offpolicy.data.sources.arrays import assemble, check_columns
from offpolicy.data.sources.containers import joined_parts
from offpolicy.data.sources.fetch import Lock, corrupt, facts, locate, open_hdf5
from offpolicy.data.sources.hdf5 import datasets, group_per_episode, per_episode_recipe
from offpolicy.errors import DataError, UsageError, listed
from offpolicy.trust import check_environment

if TYPE_CHECKING:
    import h5py

META = "offpolicy_meta"  # attribute of the files we write
KEYS = {"obs": "observations", "action": "actions", "reward": "rewards", "terminated": "terminals"}


def task_facts(row: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is known of a task: ``meta`` for the replay, and the facts its data are checked against.

    Args:
        row: of ``d4rl.csv``.
    """
    table, name = facts("d4rl.yaml"), row["task"]
    known: dict[str, Any] = {}
    for entry in table["facts"]:
        if _matches(name, entry):
            known |= {k: v for k, v in entry.items() if k != "match"}
    meta: dict[str, Any] = {"name": name, "source": "d4rl", "family": row["family"], "warnings": [], "notes": []}
    meta["max_episode_steps"] = int(row["max_episode_steps"])
    if row["gymnasium_env_id"] and known.get("evaluate", True):
        meta |= {"env_id": row["gymnasium_env_id"], "env_kwargs": known.get("env_kwargs", {})}
        if "obs_keys" in known:
            meta["obs_keys"] = known["obs_keys"]
    if row["ref_min_score"] and row["ref_max_score"]:
        meta |= {"ref_min_score": float(row["ref_min_score"]), "ref_max_score": float(row["ref_max_score"])}
        meta["score_kind"] = "d4rl-normalised"
    if "score_note" in known:
        meta["score_note"] = " ".join(known["score_note"].split())
    if "action_range" in known:
        meta["action_range"] = known["action_range"]
    for defect in table["defects"]:
        if _matches(name, defect):
            issues = ", ".join(str(i) for i in defect["issues"])
            text = f"{defect['text']}" + (f" (D4RL issues {issues})" if issues else "")
            meta["notes" if defect.get("level") == "note" else "warnings"].append(text)
    return meta, {k: known[k] for k in ("obs_dim", "action_dim", "position", "terminates") if k in known}


def read(
    path: Path,
    *,
    meta: dict[str, Any],
    facts: dict[str, Any],
    timeout_step: str | None = None,
    extra: tuple[str, ...] = (),
    on_bad: str = "error",
    clip_actions: bool = False,
    sha256: str | None = None,
) -> Replay:
    """Read a file in D4RL's layout.

    Args:
        path: the file.
        meta, facts: what is known (:func:`task_facts`, or little for a file without a task).
        timeout_step: the last step of an episode that was cut: "drop", "keep" (needs stored next observations) or
            "self". None drops it only where the next observation is not stored. D4RL's own loader drops it, and the
            very last row of the file as well.
        extra: columns under ``infos/`` to read too.
        on_bad, clip_actions: as in :func:`offpolicy.data.validate.finish`.
        sha256: expected hash of the file.

    Raises:
        DataError: a file that is not HDF5, truncated, damaged, incomplete, or with faulty content.
    """
    lock = Lock([path])
    lock.check(sha256)
    with open_hdf5(path) as file:
        columns, more, notes = _columns(path, file, facts, meta.get("obs_keys"), extra)
        written = _written(path, file)
        check_environment(written, str(path))
    if "family" in meta:
        written = {}  # a task of the table: the table is right
    meta = {**meta, **written, "file": str(path)}
    notes = [*([] if written else meta.pop("notes", [])), *notes]
    meta["warnings"] = [*meta.get("warnings", []), *more.pop("warnings", [])]
    meta |= more
    span = meta.pop("action_range", None)
    if span is not None and "action_low" not in meta:
        width = columns[match(columns)["action"]].shape[-1]
        meta |= {"action_low": [span[0]] * width, "action_high": [span[1]] * width, "action_bounds": "environment"}
    replay = assemble(
        columns,
        where=str(path),
        meta=meta,
        facts=facts,
        timeout_step=timeout_step,
        on_bad=on_bad,
        clip_actions=clip_actions,
        notes=notes,
    )
    replay.meta["sha256"] = lock.keep(replay.num_steps)
    return replay


def _written(path: Path, file: h5py.File) -> dict[str, Any]:
    """What :func:`write` has put into the file."""
    if META not in file.attrs:
        return {}
    check_heaps(path)
    try:
        found = json.loads(file.attrs[META])
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise corrupt(path, META, error) from None
    if not isinstance(found, dict):
        raise corrupt(path, META, TypeError(f"it is {type(found).__name__}"))
    return found


def open_task(
    row: Mapping[str, str], path: Path, *, download: bool = True, timeout_step: str | None = None, **options: Any
) -> Replay:
    """A task of the table, from a file that is fetched when it is not there; other keywords as of :func:`read`.

    The last step before a time limit is dropped unless told otherwise, as in the published numbers.
    """
    meta, checks = task_facts(row)
    return read(
        locate(path, row["dataset_url"], download),
        meta=meta,
        facts=checks,
        timeout_step=timeout_step or "drop",
        **options,
    )


def write(replay: Replay, path: str | os.PathLike[str]) -> Path:
    """Write a replay in D4RL's layout; the file appears under its name only when it is whole.

    ``next_observations`` is written where every step that needs one has one. What the layout has no place for
    (bounds, environment, scores) goes into an attribute that :func:`read` understands and others ignore.

    Raises:
        FileExistsError: the file exists.
        OSError: the disk is full or not writable; nothing is left behind.
        UsageError: the replay has no rewards, which this layout needs.
    """
    import h5py

    target = Path(path)
    if "reward" not in replay.steps:
        raise UsageError(
            "these data have no rewards, which D4RL's layout needs. Convert to a folder of our format instead."
        )
    if target.exists():
        raise FileExistsError(f"{target} exists; expected a new name. Remove it or choose another.")
    target.parent.mkdir(parents=True, exist_ok=True)
    rows, end = replay.rows, np.cumsum(replay.length) - 1
    terminated = to_numpy(replay.steps["terminated"])[rows].astype(bool)
    timeouts = np.zeros(len(rows), dtype=bool)
    timeouts[end] = ~terminated[end]
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}-", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        with h5py.File(temporary, "w") as file:
            for name, column in replay.steps.items():
                if name not in ("terminated", "next_obs"):
                    _write_column(file, KEYS.get(name, name), to_numpy(column), rows)
            file["terminals"], file["timeouts"] = terminated, timeouts
            if _successors_known(replay, terminated[end]):
                obs = replay.steps["obs"]
                out = file.create_dataset("next_observations", (len(rows), *obs.shape[1:]), to_numpy(obs).dtype)
                for low in range(0, len(rows), 1 << 16):
                    out[low : low + (1 << 16)] = replay.next_obs(rows[low : low + (1 << 16)]).cpu().numpy()
            kept = {k: v for k, v in replay.meta.items() if k not in ("file", "sha256", "metadata")}
            file.attrs[META] = json.dumps(kept)
        with open(temporary, "rb") as done:
            os.fsync(done.fileno())
        os.chmod(temporary, 0o644)
        os.rename(temporary, target)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # HDF5 gives both, with the cause in the text
            code = re.search(r"errno = (\d+)", str(error))
            number = int(code[1]) if code else getattr(error, "errno", None) or errno.EIO
            raise OSError(number, os.strerror(number), str(target)) from error
        raise
    return target


def _matches(name: str, entry: Mapping[str, Any]) -> bool:
    return any(fnmatch(name, pattern) for pattern in entry["match"])


def _columns(
    path: Path, file: h5py.File, facts: Mapping[str, Any], obs_keys: list[str] | None, named: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
    """The per-step columns; scalars under ``metadata`` and stored types, for ``meta``; notes on what was left."""
    import h5py

    found = datasets(path, file)
    for key, dataset in found.items():
        check_dataset(dataset.id, path, key)
    steps = {k: d for k, d in found.items() if k in named or not k.startswith(("infos/", "metadata/"))}
    per_episode = group_per_episode(steps) if "action" not in match(steps) else None
    if per_episode is not None:
        raise DataError(per_episode_recipe(path, per_episode))
    known = match(steps)
    for name in [n for ours in ("obs", "next_obs") if ours not in known for n in ALIASES[ours]]:
        parts = {k.removeprefix(f"{name}/"): steps.pop(k) for k in list(steps) if k.startswith(f"{name}/")}
        if parts:  # a group of parts is a dict of observations
            chosen = {k: _read(path, f"{name}/{k}", d) if k in (obs_keys or ()) else d for k, d in parts.items()}
            steps[name] = joined_parts(name, chosen, obs_keys)
    rows, keys = check_columns(str(path), steps, facts)
    wide = {k: steps[k] for n, k in keys.items() if n in ("obs", "action", "reward") and steps[k].dtype.kind == "f"}
    floats = {n: str(steps[k].dtype) for n, k in keys.items() if steps[k].dtype.kind == "f"}
    columns: dict[str, np.ndarray] = {}
    extra: dict[str, Any] = {"source_dtypes": {n: dtype for n, dtype in floats.items() if dtype != "float32"}}
    numbers = ends.find(steps, rows).get("number", [])  # of episodes may be text
    scalars, skipped = {}, [k for k in found if k.startswith("infos/") and k not in steps]
    for key, dataset in steps.items():
        per_row = dataset.shape[:1] == (rows,) and dataset.dtype.kind in "fiub"
        if per_row or (len(dataset.shape) == 1 and dataset.dtype.kind in "iu"):  # rows of ends, or lengths of episodes
            columns[key] = dataset if isinstance(dataset, np.ndarray) else _read(path, key, dataset)
        elif key in numbers and h5py.check_string_dtype(dataset.dtype) is not None:
            columns[key] = np.array(dataset.asstr(errors="replace")[()])
        else:
            skipped.append(f"{key} {tuple(dataset.shape)}")
    for key, dataset in found.items():
        if key.startswith("metadata/") and dataset.shape == ():
            if dataset.dtype.hasobject:
                check_heaps(path)
            value = dataset[()]
            scalars[key.removeprefix("metadata/")] = (
                value.decode(errors="replace") if isinstance(value, bytes) else value.item()
            )
    if scalars:
        extra["metadata"] = scalars
    doubts = precision_doubts(wide, rows, lambda dataset, chosen: _sample(dataset, chosen))
    doubts += [
        f"{share:.0%} of `{key}` was never written to the file and reads as zeros: what wrote it may have been stopped"
        for key, dataset in found.items()
        if key in columns and (share := unwritten(dataset.id))
    ]
    if doubts:
        extra["warnings"] = doubts
    return columns, extra, [f"not read: {listed(skipped)}"] if skipped else []


def _sample(dataset: h5py.Dataset, rows: np.ndarray) -> np.ndarray:
    """Rows of a column in its own type, read in runs of consecutive ones."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return np.concatenate([dataset[run[0] : run[-1] + 1] for run in runs])


def _read(path: Path, key: str, dataset: h5py.Dataset) -> np.ndarray:
    """One column straight into its final array: floats as float32, the rest as stored."""
    dtype = np.dtype(np.float32) if dataset.dtype.kind == "f" else dataset.dtype
    column = np.empty(dataset.shape, dtype=dtype)
    try:
        if column.size:
            dataset.read_direct(column)
    except OSError as error:
        raise corrupt(path, key, error) from None
    return column


def _write_column(file: h5py.File, key: str, column: np.ndarray, rows: np.ndarray) -> None:
    out = file.create_dataset(key, (len(rows), *column.shape[1:]), column.dtype)
    for low in range(0, len(rows), 1 << 16):
        out[low : low + (1 << 16)] = column[rows[low : low + (1 << 16)]]


def _successors_known(replay: Replay, terminated: np.ndarray) -> bool:
    if "next_obs" in replay.steps:
        return True
    if "obs" not in replay.tail:
        return False
    valid = (
        to_numpy(replay.tail["valid"]).astype(bool) if "valid" in replay.tail else np.ones(len(terminated), dtype=bool)
    )
    return bool((valid | terminated).all())
