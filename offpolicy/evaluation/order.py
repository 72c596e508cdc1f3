"""Order consistency of a goal-conditioned value: does it grow along a trajectory that leads to the goal?

The diagnosis of OTA (arXiv:2505.12737): on long ways the differences of a value drown in noise and get the wrong sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.compute.generators import isolated_rng
from offpolicy.environments.make import EVAL_SEED, close_environment, make_environment
from offpolicy.errors import UsageError

ValueOf = Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]
WINDOW = 30  # steps, the authors' setting for antmaze
HELD_OUT, PIECES = 20, 8  # trajectories of a held-out file, and their length in units of the distance


def order_consistency(values: np.ndarray, distance: int, window: int = WINDOW) -> float:
    """Share of the pairs (t, t + distance) of a trajectory whose values are in the right order (the authors' code).

    Args:
        values: V(s_t, g) along a trajectory whose last state is g, (T,).
        distance: k in v̄(t + k) > v̄(t), ≥ 1 step. Ties are not in order.
        window: of the trailing moving average v̄ that is taken first, ≥ 1 step; shorter at the start.

    Returns:
        In [0, 1]; NaN when T ≤ distance.
    """
    if distance < 1 or window < 1:
        raise UsageError(f"`distance` is {distance} and `window` {window}; expected at least 1 step each.")
    smooth = trailing_mean(values, window)
    return float((smooth[distance:] > smooth[:-distance]).mean()) if len(smooth) > distance else float("nan")


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the ``window`` - 1 before it, of fewer at the start: (T,) → (T,) float64."""
    v = np.asarray(values, np.float64)
    # not by differences of running sums: their rounding would put ties into an order
    return np.array([v[max(0, t + 1 - window) : t + 1].mean() for t in range(len(v))])


class OrderConsistency:
    """Order consistency of a method's values on given trajectories.

    Args:
        trajectories: observations (T, O) in order; the last one is the goal of its trajectory.
        distance: k, in steps.
        window: as of :func:`order_consistency`.
    """

    def __init__(self, trajectories: Sequence[np.ndarray], distance: int, window: int = WINDOW) -> None:
        self.distance, self.window = distance, window
        self.lengths = [len(obs) for obs in trajectories]
        self.obs = np.concatenate(trajectories).astype(np.float32)
        self.goals = np.concatenate([np.broadcast_to(obs[-1], obs.shape) for obs in trajectories]).astype(np.float32)

    def curves(self, value_of: ValueOf, distances: Sequence[int]) -> dict[str, np.ndarray]:
        """Name of a value → its order consistency at each distance (len(distances),), the mean over trajectories.

        Args:
            value_of: (obs (n, O), goals (n, O)) → name → values (n,), as of a goal-conditioned method. Values (S, n) of
                a method with S seeds give (S, len(distances)).
            distances: in steps; NaN where no trajectory is longer.
        """
        found = {}
        for name, values in value_of(self.obs, self.goals).items():
            values = np.asarray(values)
            each = [self._curve(one, distances) for one in values.reshape(-1, values.shape[-1])]
            found[name] = np.stack(each).reshape(*values.shape[:-1], len(distances))
        return found

    def _curve(self, values: np.ndarray, distances: Sequence[int]) -> np.ndarray:
        parts = np.split(values, np.cumsum(self.lengths)[:-1])
        smooth = [trailing_mean(part, self.window) for part in parts]
        table = np.array([[order_consistency(part, k, 1) for part in smooth] for k in distances])
        known = ~np.isnan(table)
        total = np.where(known, table, 0.0).sum(1)
        return np.divide(total, known.sum(1), out=np.full(len(table), np.nan), where=known.any(1))

    def __call__(self, value_of: ValueOf) -> dict[str, float]:
        """``order_consistency`` of a single value, or ``order_consistency/<name>`` of each of several; of several seeds
        the mean."""
        curves = self.curves(value_of, [self.distance])
        return {
            "order_consistency" if name == "value" else f"order_consistency/{name}": float(curve[..., 0].mean())
            for name, curve in curves.items()
        }


def make_order(meta: Mapping[str, Any], distance: int) -> OrderConsistency | None:
    """The measurement for the data of a run; None where there are no trajectories to measure on.

    Point mazes: the noiseless oracle's way in each task. Other sets: the last ``8 · distance`` states of the first 20
    trajectories of the held-out file, towards their last state; these were not made by an expert for that goal, so
    compare such numbers between methods only.
    """
    trajectories = oracle_trajectories(meta) or held_out_trajectories(meta, PIECES * distance)
    trajectories = [obs for obs in trajectories if len(obs) > distance]
    return OrderConsistency(trajectories, distance, int(meta.get("order_window", WINDOW))) if trajectories else None


def oracle_trajectories(meta: Mapping[str, Any], seed: int = EVAL_SEED) -> list[np.ndarray]:
    """Observations (T, O) of the shortest way in each task of a point maze, by its own oracle without noise.

    Empty for other environments, which have no controller that follows the oracle.
    """
    if not meta.get("tasks") or not str(meta.get("env_id")).startswith("pointmaze"):
        return []
    found = []
    with isolated_rng(seed):
        env = make_environment(meta)
        inner = env.unwrapped
        for task in range(1, int(meta["tasks"]) + 1):
            obs, _ = env.reset(seed=seed + task, options={"task_id": task})
            way, over = [obs], False
            while not over:
                towards = inner.get_oracle_subgoal(inner.get_xy(), inner.cur_goal_xy)[0] - inner.get_xy()
                obs, _, terminated, truncated, _ = env.step(towards / (np.linalg.norm(towards) + 1e-6))
                way.append(obs)
                over = terminated or truncated
            found.append(np.array(way))
        close_environment(env)
    return found


def held_out_trajectories(meta: Mapping[str, Any], length: int) -> list[np.ndarray]:
    """The last ``length`` states of trajectories of the ``-val.npz`` beside an OGBench file; empty without one."""
    file = Path(str(meta.get("file") or "none"))  # data from arrays have no file
    path = file.with_name(f"{file.stem}-val.npz")
    if not path.is_file():
        return []
    from offpolicy.data.sources.ogbench import read

    replay = read(path, meta={"name": path.stem}, facts={})
    obs, tails = np.asarray(replay.steps["obs"]), np.asarray(replay.tail["obs"])
    spans = zip(replay.start[:HELD_OUT], replay.length, tails)
    return [np.concatenate([obs[start : start + n], last[None]])[-length:] for start, n, last in spans]
