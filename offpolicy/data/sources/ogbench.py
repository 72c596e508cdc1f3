"""OGBench's .npz layout (arXiv:2410.20092): trajectories of states, without rewards.

The file marks the last *state* of each trajectory in ``terminals``; that state's action leads nowhere. It becomes the
observation after the last step, so a trajectory of E rows gives E - 1 steps. ``terminals`` never stops bootstrapping:
trajectories end at a time limit. What ``ogbench.load_dataset`` makes of a file can be read as well when it was saved:
"compact" (the last two rows of a trajectory are marked, ``valids`` is 0 on the last) and "regular"
(``next_observations``, the last step is marked).
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.data import validate
from offpolicy.data.doubts import precision_doubts
from offpolicy.data.raw import Raw, as_flag, check_structure
from offpolicy.data.replay import Replay
from offpolicy.data.sources.arrays import as_numbers, load_npz
from offpolicy.data.sources.fetch import Lock, facts, locate
from offpolicy.errors import DataError, UsageError

SIMULATOR_STATE = ("qpos", "qvel", "button_states")  # not read: as large as the observations, only rewards need them


LAYOUT = {"observations", "actions", "terminals", "next_observations", "valids", "recipe", *SIMULATOR_STATE}


def is_ogbench(names: Mapping[str, Any] | list[str]) -> bool:
    """Whether an archive with these arrays is in OGBench's layout: ends of trajectories, no rewards, nothing else."""
    return {"observations", "terminals"} <= set(names) <= LAYOUT


def detected(names: list[str], known: bool) -> list[str]:
    """A warning where an archive was taken for OGBench's by little: nothing but observations, actions and ends."""
    if known or {"recipe", "next_observations", "valids", *SIMULATOR_STATE} & set(names):
        return []
    return [
        "detected format: OGBench's, as there are `terminals` and no `rewards`; so a marked row holds the last state "
        "only, its action is not used, and nothing is taken as terminal. If that is wrong, add `rewards` (zeros will "
        "do for cloning)"
    ]


def set_facts(name: str, row: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``meta`` and checks of a set; ``row`` is its environment's of ``ogbench.csv``, empty for an unknown one."""
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
        windows = (entry["steps"] for entry in table["order_window"] if fnmatch(row["env_id"], entry["match"]))
        meta["order_window"] = next(windows)
    place = table["position"]
    position = any(fnmatch(name, pattern) for pattern in place["match"])
    return meta, {"position": place["columns"]} if position else {}


def environment_row(env_id: str | None) -> dict[str, str]:
    """The row of ``ogbench.csv`` of an environment; empty for one that is not OGBench's."""
    text = files("datasets_cfg").joinpath("ogbench.csv").read_text()
    return next((row for row in csv.DictReader(text.splitlines()) if row["env_id"] == env_id), {})


def open_set(name: str, row: Mapping[str, str], path: Path, *, download: bool = True, **options: Any) -> Replay:
    """A known set from its file; other keywords as of :func:`read`.

    A file that is not there is fetched. Where that cannot be, a maze's set is made on the spot (two minutes at most);
    for the arm's sets, which take longer, the error names the command that makes them.
    """
    meta, checks = set_facts(name, row)
    try:
        locate(path, facts("ogbench.yaml")["url"].format(name=name), download)
    except DataError as error:
        _make_instead(name, row["env_id"], path, error)
    return read(path, meta=meta, facts=checks, **options)


def _make_instead(name: str, env_id: str, path: Path, error: DataError) -> None:
    from offpolicy.data.sources import ogbench_make

    if not ogbench_make.can_be_made(name):
        raise error
    command = f"{error} Or make a set like it: python -m offpolicy.data make {name}"
    try:
        recipe = ogbench_make.recipe_of(name, env_id)
    except UsageError:  # the package is not installed, as the command will say
        raise DataError(command) from None
    if recipe["generator"] != "maze":
        raise DataError(command) from None
    steps = recipe["episodes"] * (recipe["rows"] - 1)
    print(
        f"{name} could not be downloaded: making a set like it, {steps:,} steps by the package's own oracle, in some "
        f"minutes. Ctrl-C stops it; `python -m offpolicy.data make {name} --steps N` makes a smaller one.",
        file=sys.stderr,
        flush=True,
    )
    ogbench_make.make(recipe, path)


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
    recipe = json.loads(str(arrays.pop("recipe"))) if "recipe" in arrays else None
    keys = {"obs": "observations", "action": "actions", "last": "terminals"}
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
    if recipe is not None:
        meta = {**meta, "recipe": recipe}
        notes.append(f"made here with ogbench {recipe['versions']['ogbench']}, seed {recipe['seed']}, not downloaded")
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
    if action.dtype.kind in "iub" and "action_dim" not in facts:  # an environment with a Box says otherwise
        steps["action"] = action.reshape(rows, -1).astype(np.int64)
        if steps["action"].shape[1] == 1:
            checks["action_n"] = int(steps["action"].max()) + 1
    else:
        steps["action"] = as_numbers(str(path), "actions", action)
        if span is not None:
            width = steps["action"].shape[-1]
            meta |= {"action_low": [span[0]] * width, "action_high": [span[1]] * width, "action_bounds": "environment"}
    raw = Raw(steps, start, length, str(path), {"obs": tail}, meta=meta, keys=found, facts=checks, notes=notes)
    raw.warnings += precision_doubts({key: arrays[key] for key in ("observations", "actions")}, rows)
    replay = validate.finish(raw, on_bad=on_bad, clip_actions=clip_actions)
    replay.meta["sha256"] = lock.keep(replay.num_steps)
    return replay
