"""OGBench sets made here, by the protocol of its authors' scripts (arXiv:2410.20092) with the oracles of `ogbench`.

Point mazes (navigate, stitch) and the arm's cube, scene and puzzle (play, noisy) need nothing else; the ant's and the
humanoid's walks come from trained experts that the package does not contain. A set made here is like the published one
in law, not bit by bit. Every episode has seeds of its own, so a shorter set is the beginning of a longer one and the
number of processes never matters.

Differs from the authors' scripts: actions are rounded to float32 before they are played, so what is stored is what was
done; uniform actions of "noisy" come from the episode's generator; a closed-loop oracle sees a new target at once, and
not the old one for one more step; a new goal in the maze leaves the drawn marker alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.compute.generators import isolated_rng
from offpolicy.data.guard import faults, read_archive
from offpolicy.data.sources.fetch import facts, npz_names
from offpolicy.environments.make import close_environment, make_environment
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.files import atomic_file

Episode = dict[str, np.ndarray]
Player = Callable[[int], Episode]  # seed → one episode
Cell = tuple[int, int]
VERSION = 1  # of the recipes' meaning


def recipe_of(name: str, env_id: str, *, steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Everything that decides the content of a set.

    Args:
        name: of an OGBench set, "pointmaze-medium-navigate-v0".
        env_id: its environment.
        steps: least number of transitions; whole episodes are made. None takes the published number.
        seed: ≥ 0.

    Raises:
        UsageError: the package cannot play this set's behaviour, or it is not installed.
    """
    plan = _plan(name)
    if plan is None:
        raise UsageError(
            f"{name} cannot be made here: its behaviour is not in the `ogbench` package (walkers are trained experts, "
            "images need a renderer). Download it, or choose a pointmaze, cube, scene or puzzle set."
        )
    if importlib.util.find_spec("ogbench") is None:
        raise UsageError(f"{name} is made with ogbench, which is not installed. pip install 'offpolicy[ogbench]'.")
    check_range("seed", seed, 0, option="seed")
    if steps is not None:
        check_range("steps", steps, 1, option="steps")
        plan["episodes"] = -(-steps // (plan["rows"] - 1))
    del plan["match"]
    if plan["generator"] == "arm":
        plan["behaviour"] = "play" if "-play-" in name else "noisy"
    versions = {package: importlib.metadata.version(package) for package in ("ogbench", "mujoco", "gymnasium")}
    return {"name": name, "env_id": env_id, "version": VERSION, **plan, "seed": seed, "versions": versions}


def can_be_made(name: str) -> bool:
    """Whether the `ogbench` package can play the behaviour of this set."""
    return _plan(name) is not None


def _plan(name: str) -> dict[str, Any] | None:
    return next((plan for plan in facts("ogbench.yaml")["generate"] if fnmatch(name, plan["match"])), None)


def make(recipe: Mapping[str, Any], path: Path, *, jobs: int = 1) -> None:
    """Play a set and its validation set and write ``<path>`` and ``<stem>-val.npz`` beside it, with a progress bar.

    Args:
        recipe: as of :func:`recipe_of`.
        path: of the new .npz. It appears last, so where it lies the set is complete.
        jobs: processes that play, ≥ 1.

    Raises:
        DataError: `path` holds another set.
    """
    check_range("jobs", jobs, 1, option="jobs")
    held_out = path.with_name(f"{path.stem}-val.npz")
    if path.exists():
        if read_recipe(path) != recipe:
            raise DataError(
                f"{path} exists and was not made by this recipe; expected a new file. Remove it, or choose another "
                "folder with --out."
            )
        if held_out.exists():
            return
    train = recipe["episodes"]
    total, rows = train + max(1, train // 10), recipe["rows"]
    arrays: Episode = {}
    for k, episode in enumerate(_progress(_episodes(recipe, total, jobs), f"making {path.name}", total)):
        for name, column in episode.items():
            if k == 0:
                arrays[name] = np.empty((total * rows, *column.shape[1:]), column.dtype)
            arrays[name][k * rows : (k + 1) * rows] = column
    arrays["terminals"] = np.arange(total * rows) % rows == rows - 1
    for file, part in ((held_out, slice(train * rows, None)), (path, slice(train * rows))):
        with atomic_file(file) as stream:
            text = np.array(json.dumps({**recipe, "part": "validation" if file == held_out else "training"}))
            columns: dict[str, Any] = {name: column[part] for name, column in arrays.items()}
            np.savez_compressed(stream, **columns, recipe=text)


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The recipe that an .npz of :func:`make` was made by; None for other files."""
    names = npz_names(path)
    if "recipe" not in names:
        return None
    with faults(path):
        recipe = json.loads(str(read_archive(path, skip=[name for name in names if name != "recipe"])["recipe"]))
        recipe.pop("part")
        return recipe


# -- episodes ----------------------------------------------------------------------------------------------------------


def _episodes(recipe: Mapping[str, Any], count: int, jobs: int) -> Iterator[Episode]:
    """Episodes 0 … count - 1 in order."""
    numbers = range(count)
    if jobs == 1:
        with isolated_rng(0), _player(recipe) as play:
            for k in numbers:
                yield play(k)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _open_player, (recipe,)) as pool:
        yield from pool.map(_play, numbers, chunksize=max(1, min(8, count // jobs)))


@contextmanager
def _player(recipe: Mapping[str, Any]) -> Iterator[Player]:
    """What plays episode k; it seeds NumPy's global generator, from which the package draws."""
    generator, kwargs = GENERATORS[recipe["generator"]]
    meta = {"env_id": recipe["env_id"], "max_episode_steps": recipe["rows"], "env_kwargs": kwargs}
    env = make_environment(meta)
    play = generator(env.unwrapped, recipe)

    def seeded(k: int) -> Episode:
        seed = int(np.random.SeedSequence([recipe["seed"], k]).generate_state(1)[0])
        np.random.seed(seed)
        env.action_space.seed(seed)
        return play(seed)

    try:
        yield seeded
    finally:
        close_environment(env)


_here: list[Any] = []  # of a playing process: its player


def _open_player(recipe: Mapping[str, Any]) -> None:
    context = _player(recipe)
    _here.extend((context.__enter__(), context))


def _play(k: int) -> Episode:
    return _here[0](k)


class _Table:
    """Rows of one episode."""

    def __init__(self, rows: int) -> None:
        self.rows, self.columns = rows, {}  # type: ignore[var-annotated]

    def put(self, row: int, obs: np.ndarray, action: np.ndarray, info: Mapping[str, Any]) -> None:
        """State before the step, action and what the step told."""
        values = {
            "observations": obs,
            "actions": action,
            "qpos": info["prev_qpos"],
            "qvel": info["prev_qvel"],
            "button_states": info.get("prev_button_states"),
        }
        for name, value in values.items():
            if value is None:
                continue
            if row == 0:
                kind = np.int64 if name == "button_states" else np.float32
                self.columns[name] = np.empty((self.rows, len(value)), kind)
            self.columns[name][row] = value


# -- mazes -------------------------------------------------------------------------------------------------------------


def free_cells(grid: np.ndarray) -> list[Cell]:
    """Cells of a maze without a wall, row by row."""
    return [(int(i), int(j)) for i, j in np.argwhere(grid == 0)]


def vertex_cells(grid: np.ndarray) -> list[Cell]:
    """Free cells that are not the middle of a straight corridor."""

    def straight(i: int, j: int) -> bool:
        upright, level = (grid[i - 1, j], grid[i + 1, j]), (grid[i, j - 1], grid[i, j + 1])
        return (not any(upright) and all(level)) or (not any(level) and all(upright))

    return [cell for cell in free_cells(grid) if not straight(*cell)]


def cells_at(grid: np.ndarray, start: Cell, distance: int) -> list[Cell]:
    """Free cells whose shortest way from a cell has this many steps."""
    steps, queue = {start: 0}, deque([start])
    while queue:
        i, j = queue.popleft()
        for cell in ((i - 1, j), (i, j - 1), (i, j + 1), (i + 1, j)):
            if grid[cell] == 0 and cell not in steps:
                steps[cell] = steps[(i, j)] + 1
                queue.append(cell)
    return [cell for cell, n in steps.items() if n == distance]


def _maze(maze: Any, recipe: Mapping[str, Any]) -> Player:
    """The point follows the maze's own oracle with noise: to one goal after the other, or to one four cells away."""
    free, vertices, noise = free_cells(maze.maze_map), vertex_cells(maze.maze_map), recipe["noise"]
    navigate = recipe["goals"] == "navigate"

    @cache
    def next_centre(here: Cell, goal: Cell) -> np.ndarray:
        return maze.get_oracle_subgoal(maze.ij_to_xy(here), maze.ij_to_xy(goal))[0]

    def any_of(cells: list[Cell]) -> Cell:
        return cells[np.random.randint(len(cells))]

    def play(seed: int) -> Episode:
        start = any_of(free)
        goal = any_of(vertices if navigate else cells_at(maze.maze_map, start, 4) or [start])
        obs, _ = maze.reset(seed=seed, options={"task_info": {"init_ij": start, "goal_ij": goal}})
        table = _Table(recipe["rows"])
        for row in range(table.rows):
            xy = maze.get_xy()
            way = next_centre(maze.xy_to_ij(xy), maze.xy_to_ij(maze.cur_goal_xy)) - xy
            action = way / (np.sqrt(way @ way) + 1e-6) + np.random.normal(0.0, noise, 2)
            action = action.clip(-1.0, 1.0).astype(np.float32)
            following, _, _, _, info = maze.step(action)
            table.put(row, obs, action, info)
            obs = following
            if navigate and info["success"]:
                maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(any_of(vertices))))
        return table.columns

    return play


# -- the arm -----------------------------------------------------------------------------------------------------------


def _arm(env: Any, recipe: Mapping[str, Any]) -> Player:
    """Scripted oracles, one target after the other: planned moves ("play"), or closed loop with noise ("noisy")."""
    noisy, rows = recipe["behaviour"] == "noisy", recipe["rows"]
    style = "markov" if noisy else "plan"
    options: dict[str, Any] = {"min_norm": 0.4} if noisy else {"noise": 0.1, "noise_smoothing": 0.5}
    if recipe["oracles"] == ["button"]:
        options["gripper_always_closed"] = True
    kinds = {}
    for task in recipe["oracles"]:
        module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{task}_{style}")
        kinds[task] = getattr(module, f"{task.title()}{style.title()}Oracle")
    low, high = recipe["p_stack"]

    def attempt(seed: int | None) -> Episode | None:
        oracles = {task: kind(env=env, **options) for task, kind in kinds.items()}  # new ones: some keep a phase
        obs, info = env.reset(seed=seed)
        p_stack, xi = np.random.uniform(low, high), np.random.uniform(0.0, 0.1)
        scale = xi * np.array([1.0, 1.0, 1.0, 3.0, 10.0])
        oracle = oracles[info["privileged/target_task"]]
        oracle.reset(obs, info)
        table = _Table(rows)
        for row in range(rows):
            if noisy and np.random.uniform() < recipe["p_random"]:
                action = np.random.uniform(-1.0, 1.0, 5)
            else:
                action = np.asarray(oracle.select_action(obs, info)) + noisy * np.random.normal(0.0, 1.0, 5) * scale
            action = action.clip(-1.0, 1.0).astype(np.float32)
            following, _, _, _, info = env.step(action)
            table.put(row, obs, action, info)
            obs = following
            if len(oracles) > 1 and _fell(info["qpos"][14:17]):
                return None
            if oracle.done:
                target_obs, info = env.set_new_target(p_stack=p_stack)
                oracle = oracles[info["privileged/target_task"]]
                oracle.reset(target_obs, info)
        return table.columns

    def play(seed: int) -> Episode:
        episode = attempt(seed)
        while episode is None:
            episode = attempt(None)
        return episode

    return play


def _fell(cube: np.ndarray) -> bool:
    """Whether the cube of a scene has left the table (the authors' limits)."""
    return cube[1] >= 0.29 or (cube[1] <= -0.3 and not 0.06 <= cube[2] <= 0.08)


# generator → what makes a player, arguments of the environment
GENERATORS: dict[str, tuple[Callable[[Any, Mapping[str, Any]], Player], dict[str, Any]]] = {
    "maze": (_maze, {"terminate_at_goal": False}),
    "arm": (_arm, {"terminate_at_goal": False, "mode": "data_collection"}),
}


def _progress(episodes: Iterator[Episode], label: str, total: int) -> Iterator[Episode]:
    """The same episodes with a bar."""
    from rich.console import Console
    from rich.progress import track

    yield from track(episodes, label, total=total, console=Console(stderr=True), transient=False)
