"""OGBench's .npz layout (arXiv:2410.20092): trajectories of states, without rewards.

The file marks the last *state* of each trajectory in ``terminals``; that state's action leads nowhere. It becomes the
observation after the last step, so a trajectory of E rows gives E - 1 steps. ``terminals`` never stops bootstrapping:
trajectories end at a time limit. What ``ogbench.load_dataset`` makes of a file can be read as well when it was saved:
"compact" (the last two rows of a trajectory are marked, ``valids`` is 0 on the last) and "regular"
(``next_observations``, the last step is marked).
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.data import validate
from offpolicy.data.replay import Replay
from offpolicy.data.sources.arrays import as_numbers, load_npz
from offpolicy.data.sources.fetch import Lock, facts, locate
from offpolicy.data.validate import Raw, as_flag, check_structure

SIMULATOR_STATE = ("qpos", "qvel", "button_states")  # not read: as large as the observations, only rewards need them


def is_ogbench(names: Mapping[str, Any] | list[str]) -> bool:
    """Whether an archive with these arrays is in OGBench's layout: ends of trajectories but no rewards."""
    return "terminals" in names and "rewards" not in names and "reward" not in names


def set_facts(name: str, row: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``meta`` and checks of a known set; ``row`` is of ``ogbench.csv`` and may be empty."""
    table = facts("ogbench.yaml")
    meta: dict[str, Any] = {
        "name": name,
        "source": "ogbench",
        "family": "ogbench",
        "action_range": table["action_range"],
    }
    if row:
        meta |= {"env_id": row["env_id"], "env_kwargs": {}, "max_episode_steps": int(row["max_episode_steps"])}
        meta["tasks"] = table["tasks"]
    place = table["position"]
    position = any(fnmatch(name, pattern) for pattern in place["match"])
    return meta, {"position": place["columns"]} if position else {}


def open_set(name: str, row: Mapping[str, str], path: Path, *, download: bool = True, **options: Any) -> Replay:
    """A known set from a file that is fetched when it is not there; other keywords as of :func:`read`."""
    meta, checks = set_facts(name, row)
    locate(path, facts("ogbench.yaml")["url"].format(name=name), download)
    return read(path, meta=meta, facts=checks, **options)


def read(
    path: Path,
    *,
    meta: dict[str, Any],
    facts: dict[str, Any],
    on_bad: str = "error",
    clip_actions: bool = False,
    sha256: str | None = None,
) -> Replay:
    """Read a file in any of the three layouts; the layout is recognised by its arrays.

    Raises:
        DataError: not an archive, truncated, damaged, incomplete, or with faulty content.
    """
    lock = Lock([path])
    lock.check(sha256)
    arrays = load_npz(path, skip=SIMULATOR_STATE)
    keys = {"obs": "observations", "action": "actions", "end": "terminals"}
    keys |= {"next_obs": "next_observations"} if "next_observations" in arrays else {}
    keys |= {"valid": "valids"} if "valids" in arrays else {}
    found = {ours: key for ours, key in keys.items() if key in arrays}
    shapes = {key: tuple(a.shape) for key, a in arrays.items()}
    rows = check_structure(
        str(path), shapes, {k: v for k, v in found.items() if k != "valid"}, facts, ("obs", "action")
    )
    ends = as_flag(str(path), "terminals", arrays["terminals"])
    if "valid" in found:
        ends = ~as_flag(str(path), "valids", arrays["valids"])
    regular = "next_obs" in found
    notes = []
    if not ends[-1]:
        ends = ends.copy()
        ends[-1] = True
        notes.append("the last trajectory has no end mark: taken to end with the file")
    last = np.flatnonzero(ends)
    start = np.concatenate([[0], last[:-1] + 1])
    length = last - start + regular  # a last state is no step
    if (length == 0).any():
        notes.append(f"{int((length == 0).sum())} trajectories of a single state have no step and were skipped")
    real = length > 0
    start, length, last = start[real], length[real], last[real]

    obs = as_numbers(str(path), "observations", arrays["observations"], image=arrays["observations"].ndim > 2)
    steps = {"obs": obs, "terminated": np.zeros(rows, dtype=bool)}
    tail = (
        as_numbers(str(path), "next_observations", arrays["next_observations"][last], obs.ndim > 2)
        if regular
        else obs[last]
    )
    meta = {**meta, "file": str(path)}
    checks, span = dict(facts), meta.pop("action_range", None)
    action = arrays["actions"]
    if action.dtype.kind in "iu":
        steps["action"] = action.reshape(rows, -1).astype(np.int64)
        if steps["action"].shape[1] == 1:
            checks["action_n"] = int(steps["action"].max()) + 1
    else:
        steps["action"] = as_numbers(str(path), "actions", action)
        if span is not None:
            width = steps["action"].shape[-1]
            meta |= {"action_low": [span[0]] * width, "action_high": [span[1]] * width, "action_bounds": "environment"}
    raw = Raw(steps, start, length, str(path), {"obs": tail}, meta=meta, keys=found, facts=checks, notes=notes)
    replay = validate.finish(raw, on_bad=on_bad, clip_actions=clip_actions)
    replay.meta["sha256"] = lock.keep(replay.num_steps)
    return replay
