"""Readers: one per kind of source, each giving a checked :class:`offpolicy.data.replay.Replay`.

Start here: :func:`open_source` for anything on disk or known by name, :func:`from_arrays` for arrays in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from offpolicy.data.guard import faults
from offpolicy.data.names import TABLES, Target, file_type, resolve
from offpolicy.data.raw import IN_A_TABLE
from offpolicy.data.recheck import recheck
from offpolicy.data.replay import Replay
from offpolicy.data.sources.arrays import environment, from_arrays
from offpolicy.errors import DataError, UsageError, listed

__all__ = ["from_arrays", "open_source"]

IN_MEMORY = 2 << 30  # bytes: folders of our format up to this size are read into memory, larger ones are mapped


def open_source(
    name_or_target: str | os.PathLike[str] | Target,
    *,
    download: bool = True,
    on_bad: str = "error",
    clip_actions: bool = False,
    timeout_step: str | None = None,
    sha256: str | None = None,
    env_id: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    obs_keys: Iterable[str] | None = None,
    max_episode_steps: int | None = None,
    extra_columns: Iterable[str] | None = None,
) -> Replay:
    """Open a data set by name or path and check it.

    Args:
        name_or_target: what :func:`offpolicy.data.names.resolve` understands, or its result: a file or folder, or a
            known name. A made set that is not there is made, unless a policy has to be trained for it; a D4RL task,
            Minari id or OGBench set is downloaded.
        download: false forbids that.
        on_bad: "error" stops at faulty content, "drop_episode" leaves out the episodes that have it and counts them.
        clip_actions: clip actions outside the bounds instead of calling them faulty.
        timeout_step: the last step of an episode that a time limit cut: "drop", "keep" or "self" (flat files only).
            None is "drop" for D4RL tasks, as in published numbers, and elsewhere keeps it where the next observation
            is known.
        sha256: expected hash of the file; for Minari over its storage files in order; for made sets and folders of
            our format the fingerprint.
        env_id, env_kwargs: environment to evaluate in, for files without a known one; its spaces are checked.
        obs_keys: parts of a dict observation that ``obs`` consists of, in order.
        max_episode_steps: the environment's step limit; without end marks longer episodes are cut there.
        extra_columns: columns that the steps must have; of HDF5 files and Minari data also those under ``infos/``,
            which are not read unless named.

    Returns:
        The replay; ``meta["notes"]`` and ``meta["warnings"]`` hold what a person should read once
        (``str(offpolicy.data.report.report(replay))`` shows them with the numbers).

    Raises:
        UsageError: an unknown name, or options that do not fit.
        DataError: data that are absent, damaged or faulty.
    """
    target = name_or_target if isinstance(name_or_target, Target) else resolve(name_or_target)
    with faults(target.path or target.location() or target.name):
        names = tuple(extra_columns or ())
        replay = _open(
            target,
            download=download,
            on_bad=on_bad,
            clip_actions=clip_actions,
            timeout_step=timeout_step,
            sha256=sha256,
            env_id=env_id,
            env_kwargs=env_kwargs,
            obs_keys=obs_keys,
            max_episode_steps=max_episode_steps,
            extra_columns=names,
        )
    missing = [name for name in names if name not in replay.steps]
    if missing:
        raise DataError(
            f"`extra_columns` names `{missing[0]}`, and the steps of {target.name} have "
            f"{listed(sorted(replay.steps))}; expected columns with one row per step that the source holds and this "
            "library reads (`infos/…` of HDF5 files in D4RL's layout and of Minari data). Correct the name, or add the "
            "column in Python."
        )
    return replay


def _open(
    target: Target,
    *,
    download: bool,
    on_bad: str,
    clip_actions: bool,
    timeout_step: str | None,
    sha256: str | None,
    env_id: str | None,
    env_kwargs: Mapping[str, Any] | None,
    obs_keys: Iterable[str] | None,
    max_episode_steps: int | None,
    extra_columns: tuple[str, ...],
) -> Replay:
    if target.kind == "language":
        table = target.path is not None and file_type(target.path).removesuffix(".gz") in TABLES
        what = "a table of text" if table else "language data (prompts or preference pairs)"
        save = f"{IN_A_TABLE} " if table else ""
        raise UsageError(
            f"{target.path} is {what}; expected control data: .hdf5, .npz, or a folder. {save}For texts choose a "
            "method of language models (DPO, SimPO, SFT), else give other data."
        )
    own_environment = env_id is not None or max_episode_steps is not None
    if own_environment and target.kind not in ("hdf5", "npz", "replay"):
        raise UsageError(
            f"`env_id` or `max_episode_steps` was given, but {target.name} has an environment of its own. Leave "
            "them out."
        )
    if timeout_step in ("drop", "self") and target.kind not in ("hdf5", "npz", "d4rl"):
        raise UsageError(
            f"`timeout_step` is '{timeout_step}', but {target.name} knows the observation after every step, so "
            "none need be dropped or replaced. Leave it out."
        )
    if target.kind == "made":
        from offpolicy.data.sources.make import open_made
        from offpolicy.data.sources.simulated import open_simulated

        made = open_simulated(target) if target.info else open_made(target.name)
        return _fingerprinted(made, sha256)
    path = target.location()
    assert path is not None  # only language data have no place
    common: dict[str, Any] = {"on_bad": on_bad, "clip_actions": clip_actions, "sha256": sha256}
    if target.kind == "replay":
        replay = _fingerprinted(_open_folder(path), sha256)
        replay = recheck(replay, str(path), on_bad=on_bad, clip_actions=clip_actions)
        environment(replay.meta, env_id, env_kwargs, obs_keys, max_episode_steps)
        return replay
    if target.kind == "minari":
        from offpolicy.data.sources import minari

        keys = list(obs_keys) if obs_keys is not None else target.info.get("obs_keys", "").split() or None
        if target.path is not None:
            return minari.read(path, obs_keys=keys, extra=extra_columns, **common)
        return minari.open_id(target.name, download=download, obs_keys=keys, extra=extra_columns, **common)
    if target.kind == "d4rl":
        from offpolicy.data.sources import d4rl

        replay = d4rl.open_task(
            target.info, path, download=download, timeout_step=timeout_step, extra=extra_columns, **common
        )
        replay.meta["notes"] = [*_taken_by_name(target, path), *replay.meta["notes"]]
        return replay
    from offpolicy.data.sources import ogbench

    if target.kind == "ogbench":
        replay = ogbench.open_set(target.name, target.info, path, download=download, **common)
        replay.meta["notes"] = [*_taken_by_name(target, path), *replay.meta["notes"]]
        return replay

    meta: dict[str, Any] = {"name": target.name, "source": "arrays"}
    facts = environment(meta, env_id, env_kwargs, obs_keys, max_episode_steps)
    if target.kind == "hdf5":
        from offpolicy.data.sources import d4rl

        return d4rl.read(path, meta=meta, facts=facts, timeout_step=timeout_step, extra=extra_columns, **common)
    from offpolicy.data.sources.arrays import read_npz
    from offpolicy.data.sources.fetch import npz_names

    names = npz_names(path)
    if ogbench.is_ogbench(names):
        known, checks = ogbench.set_facts(target.name, ogbench.environment_row(env_id))
        known = {**known, **meta, "source": "ogbench", "warnings": ogbench.detected(names, bool(known.get("env_id")))}
        return ogbench.read(path, meta=known, facts={**checks, **facts}, **common)
    return read_npz(path, meta=meta, facts=facts, timeout_step=timeout_step, **common)


def _taken_by_name(target: Target, path: Path) -> list[str]:
    """A note where a file of another name than the source's own was taken for a known set."""
    own = Target(target.kind, target.name, None, target.info).location()
    if target.path is None or own is None or own.name == path.name:
        return []
    kind = "D4RL task" if target.kind == "d4rl" else "OGBench set"
    return [f"{path.name} was taken for the {kind} {target.name} by its name; rename the file if it holds other data"]


def _open_folder(path: Path) -> Replay:
    """A folder of our format."""
    size = sum(file.stat().st_size for file in (path / "steps").glob("*.npy"))
    replay = Replay.load(path, mmap=size > IN_MEMORY)
    replay.meta = {**replay.meta, "file": str(path)}
    replay.meta.setdefault("name", path.name)
    return replay


def _fingerprinted(replay: Replay, expected: str | None) -> Replay:
    if expected is not None and replay.fingerprint() != expected.lower():
        raise DataError(
            f"{replay.meta.get('name')} has the fingerprint {replay.fingerprint()}; expected {expected}. Open the "
            "right data or correct `sha256`."
        )
    return replay
