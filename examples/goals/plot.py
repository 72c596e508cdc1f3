"""Pictures of goal-conditioned runs on a point maze: order of the values by distance, and paths with sub-goals.

usage: python examples/goals/plot.py RUN [RUN …] [--out runs/plots] [--seed 10000]

``order.png`` has, for each value of each run, the share of pairs (t, t + k) of the oracle's ways through the five tasks
that are in the right order, against k. ``maze-<method>.png`` has a panel per task: one episode from a blue to
a red dot, with an arrow every 25 steps to the sub-goal that the high level chose there: the state of the data whose
representation is nearest.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import offpolicy
from offpolicy.compute.generators import isolated_rng
from offpolicy.environments.make import close_environment, make_environment
from offpolicy.evaluation.order import OrderConsistency, oracle_trajectories

DISTANCES = np.unique(np.geomspace(1, 120, 40).astype(int))
CANDIDATES = 2000  # states of the data among which a sub-goal is looked for
EVERY = 25


def sheet(columns: int, width: float) -> Figure:
    figure = Figure(figsize=(width * columns, width), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label(method: Any, name: str) -> str:
    return type(method).__name__ + ("" if name == "value" else f", {name} value")


def draw_order(methods: list[Any], seed: int) -> Figure:
    """Order consistency against distance, without a moving average."""
    order = OrderConsistency(oracle_trajectories(methods[0].data_meta, seed), 1, window=1)
    figure = sheet(1, 4.5)
    axes = figure.add_subplot(xlabel="distance k (steps)", ylabel="share of V(t + k) > V(t)", xscale="log")
    for i, method in enumerate(methods):
        for name, curve in order.curves(method.value_of, DISTANCES.tolist()).items():
            style = "--" if name == "low" else "-"
            axes.plot(DISTANCES, curve, style, color=f"C{i}", label=label(method, name), linewidth=1.2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def walk(method: Any, env: Any, task: int, seed: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Observations (T, O) of one episode, its goal (O,), and whether it was reached."""
    obs, info = env.reset(seed=seed + task, options={"task_id": task})
    agent, path, over = method.agent(), [obs], False
    agent.reset(1)
    agent.set_goals(info["goal"][None].astype(np.float32))
    while not over:
        obs, _, terminated, truncated, step = env.step(agent.act(obs[None].astype(np.float32))[0])
        path.append(obs)
        over = terminated or truncated
    return np.array(path, np.float32), info["goal"].astype(np.float32), bool(step["success"])


def subgoals(method: Any, path: np.ndarray, goal: np.ndarray, states: np.ndarray) -> Iterator[tuple[Any, Any]]:
    """(state, chosen sub-goal) along a path; nothing for methods without a high level."""
    for obs in path[::EVERY]:
        try:
            aim = method.subgoal(obs, goal)
        except offpolicy.errors.UsageError:
            return
        yield obs, states[np.argmax(method.represent(obs, states) @ aim)]


def draw_maze(method: Any, states: np.ndarray, seed: int) -> Figure:
    """A panel for each task."""
    meta = method.data_meta
    figure = sheet(meta["tasks"], 3.2)
    with isolated_rng(seed):
        env = make_environment(meta)
        maze = env.unwrapped
        for task in range(1, meta["tasks"] + 1):
            path, goal, reached = walk(method, env, task, seed)
            title = f"task {task}: {len(path) - 1} steps, {'reached' if reached else 'not reached'}"
            axes = figure.add_subplot(1, meta["tasks"], task, aspect="equal", xticks=[], yticks=[])
            axes.set_title(title, fontsize=9)
            for cell in np.argwhere(maze.maze_map == 1):
                x, y = maze.ij_to_xy(cell)
                axes.add_patch(Rectangle((x - 2, y - 2), 4, 4, color="0.8"))
            axes.plot(*path.T, color="0.3", linewidth=1)
            for obs, aim in subgoals(method, path, goal, states):
                axes.annotate("", aim, obs, arrowprops={"arrowstyle": "->", "color": "C1", "linewidth": 0.9})
            axes.plot(*path[0], "o", color="C0")
            axes.plot(*goal, "o", color="C3")
        close_environment(env)
    figure.suptitle(f"{type(method).__name__} on {meta['name']}", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/plots"))
    parser.add_argument("--seed", type=int, default=10_000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    methods = [offpolicy.load(run) for run in args.runs]
    if not str(methods[0].data_meta.get("env_id")).startswith("pointmaze"):
        raise SystemExit(f"{args.runs[0]} is not on a point maze, so there is nothing to draw; pass one that is.")
    figures = {"order.png": draw_order(methods, args.seed)}
    obs = offpolicy.load_data(methods[0].data_meta["file"]).load().steps["obs"]
    states = np.asarray(obs[np.random.default_rng(0).integers(len(obs), size=CANDIDATES)])
    for method in methods:
        figures[f"maze-{type(method).__name__}.png"] = draw_maze(method, states, args.seed)
    for name, figure in figures.items():
        figure.savefig(args.out / name, dpi=120)
        print(args.out / name)


if __name__ == "__main__":
    main()
