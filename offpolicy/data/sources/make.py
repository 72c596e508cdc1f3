"""Data sets made here from real environments: small, reproducible, without any download.

A set is described by ``datasets_cfg/made/<name>.yaml``: environment, reference scores and a recipe. The recipe with the
versions of the simulator decides the content; its hash is part of the folder's name under ``$OFFPOLICY_DATA_DIR``, so a
changed recipe is a new folder and never an old file under the same name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.data import validate
from offpolicy.data.names import root
from offpolicy.data.raw import Raw
from offpolicy.data.replay import Replay
from offpolicy.data.sources.fetch import facts
from offpolicy.environments.make import EVAL_SEED, close_environment, make_environment
from offpolicy.errors import UsageError

Law = Callable[[np.ndarray], np.ndarray]


def open_made(name: str, *, must_keep: bool = False) -> Replay:
    """The set from its folder, or made now and kept there when the folder can be written.

    Raises:
        UsageError: the simulator it needs is not installed.
        OSError: with ``must_keep``, the folder cannot be written.
    """
    meta = describe_made(name)
    folder = cache_folder(name, meta["recipe"])
    if not (folder / "meta.json").is_file():
        replay = generate(name, meta)
        try:
            replay.save(folder)
        except OSError as error:  # includes another process that has just finished the same set
            if not (folder / "meta.json").is_file():
                if must_keep:
                    raise
                replay.meta["notes"] = [
                    *replay.meta["notes"],
                    f"not kept on disk ({error}): it is made again next time",
                ]
                return replay
    replay = Replay.load(folder, mmap=False)
    replay.meta = {**replay.meta, "file": str(folder)}
    return replay


def describe_made(name: str) -> dict[str, Any]:
    """``meta`` of a made set, with the recipe completed by the versions that decide its content."""
    meta = facts(f"made/{name}.yaml")
    recipe = meta["recipe"]
    packages = GENERATORS[recipe["generator"]][1]
    missing = [p for p in packages if importlib.util.find_spec(p.replace("-", "_")) is None]
    if missing:
        raise UsageError(
            f"{name} is made with {missing[0]}, which is not installed. Install it with: pip install "
            "'offpolicy[robotics]'."
        )
    versions = {p: importlib.metadata.version(p) for p in packages}
    return {"name": name, "source": "made", "env_kwargs": {}, **meta, "recipe": {**recipe, "versions": versions}}


def cache_folder(name: str, recipe: Mapping[str, Any]) -> Path:
    """Where a made set is kept; the hash of the recipe is in the name."""
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return root("made") / f"{name}-{key}"


def generate(name: str, meta: Mapping[str, Any] | None = None) -> Replay:
    """Make a set; a pure function of its recipe (and of the simulator's version).

    Args:
        name: of the set.
        meta: as of :func:`describe_made`, possibly with another recipe (shorter, other seeds).
    """
    meta = dict(meta or describe_made(name))
    make = GENERATORS[meta["recipe"]["generator"]][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the simulators, about versions chosen on purpose
        env = make_environment(meta)
        try:
            raw = make(env, meta["recipe"])
        finally:
            close_environment(env)
    raw.meta = meta
    raw.facts |= {"obs_dim": raw.steps["obs"].shape[1], "action_dim": raw.steps["action"].shape[1]}
    return validate.finish(raw)


def reference_returns(name: str, episodes: int | None = None) -> dict[str, np.ndarray]:
    """Returns (episodes,) of uniform actions and of a competent law, which the reference scores are means of."""
    meta = describe_made(name)
    episodes = episodes or int(meta["reference_episodes"])
    _, _, competent = GENERATORS[meta["recipe"]["generator"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = make_environment(meta)
        law = competent(env, meta["recipe"])
        rng = np.random.default_rng(0)
        space = env.action_space
        policies: dict[str, Law] = {"random": lambda obs: rng.uniform(space.low, space.high), "competent": law}
        returns = {kind: np.zeros(episodes) for kind in policies}
        for kind, policy in policies.items():
            for k in range(episodes):
                obs, _ = env.reset(seed=EVAL_SEED + k, options=meta.get("reset_options"))
                over = False
                while not over:
                    flat = np.concatenate([obs[key] for key in meta["obs_keys"]]) if "obs_keys" in meta else obs
                    obs, reward, terminated, truncated, _ = env.step(policy(flat).astype(np.float32))
                    returns[kind][k] += reward
                    over = terminated or truncated
        close_environment(env)
    return returns


# -- Pendulum ----------------------------------------------------------------------------------------------------------


def _energy(obs: np.ndarray) -> float:
    """Energy of the pendulum (m = l = 1, g = 10, moment of inertia 1/3), zero at rest upright."""
    return obs[2] ** 2 / 6 + 5 * (obs[0] - 1)


def pump_law(obs: np.ndarray) -> float:
    """Full torque along the motion while the energy is too low, against it while too high; never tries to hold."""
    return 2.0 if abs(obs[2]) < 1e-3 else -2.0 * float(np.sign(_energy(obs)) * np.sign(obs[2]))


def hold_law(obs: np.ndarray, gains: tuple[float, float]) -> float:
    """Proportional-derivative torque about the upright position; too weak to swing up from below."""
    return -(gains[0] * float(np.arctan2(obs[1], obs[0])) + gains[1] * float(obs[2]))


def _pendulum_stitch(env: Any, recipe: Mapping[str, Any]) -> Raw:
    """Episodes that alternate between the two laws, with uniform actions mixed in and noise on the others."""
    env = env.unwrapped  # the step limit is the recipe's; the wrappers would only cost time
    episodes, steps, seed = recipe["episodes"], recipe["steps"], recipe["seed"]
    gains = tuple(recipe["hold_gains"])
    rng = np.random.default_rng(seed)
    rows = episodes * steps
    obs, tail = np.empty((rows, 3), dtype=np.float32), np.empty((episodes, 3), dtype=np.float32)
    action, reward = np.empty((rows, 1), dtype=np.float32), np.empty(rows, dtype=np.float32)
    row = 0
    for episode in range(episodes):
        now, _ = env.reset(seed=1000 * seed + episode)
        for _ in range(steps):
            obs[row] = now
            if rng.random() < recipe["uniform"]:
                torque = rng.uniform(-2.0, 2.0)
            else:
                law = hold_law(now, gains) if episode % 2 else pump_law(now)
                torque = law + recipe["sigma"] * rng.standard_normal()
            action[row] = min(max(torque, -2.0), 2.0)
            now, reward[row], *_ = env.step(action[row])
            row += 1
        tail[episode] = now
    columns = {"obs": obs, "action": action, "reward": reward, "terminated": np.zeros(rows, dtype=bool)}
    return Raw(columns, np.arange(episodes) * steps, np.full(episodes, steps), "pendulum-stitch", {"obs": tail})


def _competent_pendulum(env: Any, recipe: Mapping[str, Any]) -> Law:
    """Energy shaping until near the top and slow enough to be held there."""

    def law(obs: np.ndarray) -> np.ndarray:
        near = obs[0] > 0.9 and abs(obs[2]) < 3.0
        if near:
            return np.array([hold_law(obs, (10.0, 2.0))])
        energy = _energy(obs)
        return np.array([2.0 if abs(obs[2]) < 1e-3 else np.clip(-4.0 * energy * np.sign(obs[2]), -2.0, 2.0)])

    return law


# -- Point maze --------------------------------------------------------------------------------------------------------

Cell = tuple[int, int]


class _Maze:
    """Shortest paths between the free cells of a maze, and a law that follows them."""

    def __init__(self, env: Any, gains: tuple[float, float]) -> None:
        self.maze = env.unwrapped.maze
        self.gains = gains
        grid = self.maze.maze_map
        self.free = [(i, j) for i in range(len(grid)) for j in range(len(grid[0])) if grid[i][j] != 1]
        self.centre = {cell: self.maze.cell_rowcol_to_xy(np.array(cell)) for cell in self.free}
        self.towards = {goal: self._paths(goal) for goal in self.free}

    def _paths(self, goal: Cell) -> dict[Cell, Cell]:
        """Cell → the next one on a shortest path to the goal, breadth first."""
        following, queue = {goal: goal}, deque([goal])
        while queue:
            i, j = queue.popleft()
            for cell in ((i, j + 1), (i + 1, j), (i, j - 1), (i - 1, j)):
                if cell in self.centre and cell not in following:
                    following[cell] = (i, j)
                    queue.append(cell)
        return following

    def law(self, obs: np.ndarray, goal: Cell) -> np.ndarray:
        """Proportional-derivative force towards the centre of the next cell on the path."""
        i, j = self.maze.cell_xy_to_rowcol(obs[:2])
        here = (int(i), int(j))
        return self.gains[0] * (self.centre[self.towards[goal].get(here, goal)] - obs[:2]) - self.gains[1] * obs[2:]


def _pointmaze_walk(env: Any, recipe: Mapping[str, Any]) -> Raw:
    """One walk to random goals, rewarded for a fixed one, cut into episodes whose last observation is kept."""
    rows, steps = recipe["rows"], recipe["steps"]
    maze = _Maze(env, tuple(recipe["gains"]))
    rng = np.random.default_rng(recipe["seed"])
    places = np.empty((rows + 1, 4), dtype=np.float32)
    action = np.empty((rows, 2), dtype=np.float32)
    env = env.unwrapped
    now = env.reset(seed=recipe["seed"])[0]["observation"]
    goal = maze.free[rng.integers(len(maze.free))]
    for row in range(rows):
        places[row] = now
        if np.linalg.norm(now[:2] - maze.centre[goal]) < 0.45:  # the environment's own radius of success
            goal = maze.free[rng.integers(len(maze.free))]
        force = maze.law(now, goal) + recipe["sigma"] * rng.standard_normal(2)
        action[row] = np.clip(force, -1.0, 1.0)
        now = env.step(action[row])[0]["observation"]
    places[rows] = now
    target = maze.centre[tuple(recipe["goal_cell"])]
    reward = np.exp(-np.linalg.norm(places[1:, :2] - target, axis=1)).astype(np.float32)
    start = np.arange(0, rows, steps)
    length = np.minimum(start + steps, rows) - start
    columns = {"obs": places[:rows], "action": action, "reward": reward, "terminated": np.zeros(rows, dtype=bool)}
    return Raw(columns, start, length, "pointmaze-walk", {"obs": places[start + length]}, facts={"position": [0, 1]})


def _competent_pointmaze(env: Any, recipe: Mapping[str, Any]) -> Law:
    """The walk's law without noise, to the centre of the goal cell: all that can be done without seeing the goal."""
    maze = _Maze(env, tuple(recipe["gains"]))
    goal = tuple(recipe["goal_cell"])
    return lambda obs: np.clip(maze.law(obs, goal), -1.0, 1.0)


# generator → the function, the packages whose versions decide the content, the competent law
GENERATORS: dict[str, tuple[Callable[[Any, Mapping[str, Any]], Raw], tuple[str, ...], Callable[..., Law]]] = {
    "pendulum_stitch": (_pendulum_stitch, ("gymnasium",), _competent_pendulum),
    "pointmaze_walk": (_pointmaze_walk, ("gymnasium-robotics", "mujoco"), _competent_pointmaze),
}
