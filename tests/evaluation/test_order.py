"""Order consistency: known answers, trajectories of mazes, and what is logged."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scripts import FIXTURES

from offpolicy.errors import UsageError
from offpolicy.evaluation.order import (
    OrderConsistency,
    held_out_trajectories,
    make_order,
    oracle_trajectories,
    order_consistency,
)

ogbench = pytest.mark.skipif(importlib.util.find_spec("ogbench") is None, reason="needs ogbench")
FIXTURE = FIXTURES / "ogbench_pointmaze_small-v0.npz"
STEPS = np.arange(100, -1, -1)  # to the goal, along a shortest way of 101 states


def low(steps: np.ndarray, discount: float = 0.99) -> np.ndarray:
    """The exact value of -1 per step."""
    return -(1 - discount**steps) / (1 - discount)


def high(steps: np.ndarray, option: int) -> np.ndarray:
    """The exact value of -1 per option: a staircase, 0 over the last one."""
    return low(np.maximum(np.ceil(steps / option) - 1, 0))


@pytest.mark.parametrize("distance", [1, 25, 100])
@pytest.mark.parametrize("window", [1, 30])
def test_the_exact_value_is_in_order(distance: int, window: int) -> None:
    assert order_consistency(low(STEPS), distance, window) == 1.0
    assert order_consistency(-low(STEPS), distance, window) == 0.0


def test_the_staircase_of_options_ties_only_where_both_ends_are_in_the_last_one() -> None:
    """K(d) = max(⌈d/20⌉ - 1, 0) options from d = 100 … 0 steps; a tie is not in order.

    k = 25: K(d) > K(d - 25) for all of d = 100 … 25. k = 10: of the 91 pairs d = 100 … 10 those with d in 21 … 30,
    41 … 50, 61 … 70, 81 … 90 rise, which are 40.
    """
    values = high(STEPS, 20)
    assert order_consistency(values, 25, 1) == 1.0
    assert order_consistency(values, 10, 1) == pytest.approx(40 / 91)
    assert order_consistency(np.zeros(50), 3, 1) == 0.0


def test_the_moving_average_against_a_loop() -> None:
    values = np.random.default_rng(0).normal(size=60)
    smooth = [np.mean(values[max(0, t - 6) : t + 1]) for t in range(60)]
    expected = np.mean([smooth[t + 4] > smooth[t] for t in range(56)])
    assert order_consistency(values, 4, 7) == pytest.approx(expected)


def test_too_short_trajectories_are_left_out() -> None:
    assert np.isnan(order_consistency(np.arange(5.0), 5))
    short, long = np.zeros((4, 2)), np.linspace(0, 1, 40)[:, None].repeat(2, 1)
    order = OrderConsistency([short, long], 10, 1)
    curve = order.curves(lambda obs, goals: {"value": obs[:, 0] - goals[:, 0]}, [2, 10, 39, 40])["value"]
    np.testing.assert_array_equal(curve, [0.5, 1.0, 1.0, np.nan])


@pytest.mark.parametrize("wrong", [(0, 1), (1, 0)])
def test_impossible_distances(wrong: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="expected at least 1 step each"):
        order_consistency(np.zeros(9), *wrong)


def test_goals_are_last_states_and_names_become_metrics() -> None:
    a, b = np.arange(12.0)[:, None], np.arange(20.0, 0.0, -1.0)[:, None]
    order = OrderConsistency([a, b], 3, 1)
    seen = {}

    def value_of(obs: np.ndarray, goals: np.ndarray) -> dict[str, np.ndarray]:
        seen["goals"] = goals[:, 0]
        return {"low": -np.abs(obs - goals)[:, 0], "high": obs[:, 0]}

    assert order(value_of) == {"order_consistency/low": 1.0, "order_consistency/high": 0.5}
    np.testing.assert_array_equal(seen["goals"], [11.0] * 12 + [1.0] * 20)
    assert order(lambda obs, goals: {}) == {}  # cloning learns no value


def test_held_out_trajectories_end_with_their_last_state(tmp_path: Path) -> None:
    arrays = dict(np.load(FIXTURE))
    np.savez(tmp_path / "walk-val.npz", **arrays)
    meta = {"file": str(tmp_path / "walk.npz")}
    found = held_out_trajectories(meta, 40)
    last = np.flatnonzero(arrays["terminals"])
    assert len(found) == 20 and {len(obs) for obs in found} == {40}
    np.testing.assert_array_equal(found[1], arrays["observations"][last[1] - 39 : last[1] + 1])
    order = make_order(meta, 5)
    assert order is not None and order.distance == 5 and order.lengths == [40] * 20
    assert make_order({"file": str(tmp_path / "other.npz")}, 5) is None


@ogbench
def test_the_oracle_of_a_point_maze_solves_its_tasks() -> None:
    meta = {"env_id": "pointmaze-medium-v0", "tasks": 5, "max_episode_steps": 1000, "order_window": 30}
    ways = oracle_trajectories(meta)
    assert len(ways) == 5 and all(15 < len(way) < 200 for way in ways)
    for way in ways:
        steps = np.linalg.norm(np.diff(way, axis=0), axis=1)
        assert steps.max() < 0.21 and np.median(steps) > 0.19  # 0.2 per step, less at walls
    np.testing.assert_array_equal(oracle_trajectories(meta)[0], ways[0])
    order = make_order(meta, 25)
    assert order is not None and order.window == 30
    left = np.concatenate([np.arange(len(way))[::-1] for way in ways if len(way) > 25])
    assert order(lambda obs, goals: {"value": low(left)}) == {"order_consistency": 1.0}
    assert oracle_trajectories({**meta, "env_id": "antmaze-medium-v0"}) == []
