"""Evaluation by tasks, as OGBench's: which goal every episode has, success of each task, intervals, what is printed."""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import offpolicy
from offpolicy.environments.make import close_environment, make_environment
from offpolicy.evaluate import main
from offpolicy.evaluation.rollout import Evaluator
from offpolicy.evaluation.scores import score_kind, summarize, wilson
from offpolicy.training import screen
from offpolicy.training.headlines import headline

ogbench = pytest.mark.skipif(importlib.util.find_spec("ogbench") is None, reason="needs ogbench")
SIZES = SimpleNamespace(obs_dim=1, action_dim=1)


class Line(gymnasium.Env):
    """A point on a line; task k asks for the place k (plus a little noise), within 0.1; at most 8 steps."""

    num_tasks = 3

    def __init__(self, forget: bool = False) -> None:
        self.observation_space = spaces.Box(-10, 10, (1,), np.float64)
        self.forget = forget  # report success at the step of arrival only, and go on

    @property
    def action_space(self) -> spaces.Box:  # a new one at every look, as OGBench's arms have it
        return spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        assert options is not None and 1 <= options["task_id"] <= self.num_tasks
        self.x, self.t, self.reached = 0.0, 0, False
        self.goal = options["task_id"] + 0.01 * float(self.np_random.random()) + 0.01 * self.action_space.sample()[0]
        return np.array([self.x]), {"goal": np.array([self.goal])}

    def step(self, action: np.ndarray) -> Any:
        self.t += 1
        self.x += float(action[0])
        near = abs(self.x - self.goal) < 0.1
        over = near and not self.forget
        return np.array([self.x]), float(near), over, self.t >= 8, {"success": near}


gymnasium.register("Line-v0", entry_point=Line)
META = {"env_id": "Line-v0", "tasks": 3}


class Walker:
    """Walks to its goal by steps of at most `stride`, and keeps what it was told."""

    def __init__(self, stride: float = 1.0) -> None:
        self.stride, self.calls = stride, []  # type: ignore[var-annotated]

    def reset(self, num_envs: int) -> None:
        self.calls.append(num_envs)

    def set_goals(self, goals: np.ndarray) -> None:
        self.goals = goals
        self.calls.append(goals.copy())

    def act(self, obs: np.ndarray) -> np.ndarray:
        return np.clip(self.goals - obs, -self.stride, self.stride)


def test_every_task_gets_its_episodes_and_its_goal() -> None:
    agent = Walker()
    result = Evaluator(META, SIZES, episodes=4, num_envs=5).run(agent)
    assert result.task is not None and result.success is not None
    np.testing.assert_array_equal(result.task, [1, 2, 3] * 4)
    np.testing.assert_array_equal(result.lengths, [1, 2, 3] * 4)
    assert result.success.all()
    assert agent.calls[::2] == [5, 5, 2]  # a reset before the goals of every wave
    goals = np.concatenate(agent.calls[1::2])
    assert goals.shape == (12, 1) and goals.dtype == np.float32
    np.testing.assert_array_equal(np.round(goals[:, 0]), result.task)
    assert len(np.unique(goals)) == 12  # every episode has its own seed


def test_the_number_of_environments_and_the_generators_change_nothing() -> None:
    calls = []
    for seed, num_envs in ((0, 1), (1, 4)):
        np.random.seed(seed)
        agent = Walker(0.6)
        result = Evaluator(META, SIZES, episodes=3, num_envs=num_envs).run(agent)
        calls.append((result.lengths, np.concatenate(agent.calls[1::2])))
    np.testing.assert_array_equal(calls[0][0], calls[1][0])
    np.testing.assert_array_equal(calls[0][1], calls[1][1])  # random actions inside the resets are seeded too


def test_success_of_each_task_and_the_score() -> None:
    """Steps of 0.3 reach 2.4 in eight: tasks 1 and 2, not 3."""
    result = Evaluator(META, SIZES, episodes=5).run(Walker(0.3))
    numbers = summarize(result, META)
    assert [numbers[f"success_task{k}"] for k in (1, 2, 3)] == [1.0, 1.0, 0.0]
    assert numbers["success_mean"] == pytest.approx(2 / 3) and numbers["score"] == pytest.approx(200 / 3)
    assert (
        numbers["success_interval"] == wilson(10, 15) and "success_rate" not in numbers and "score_std" not in numbers
    )
    assert headline({f"eval/{k}": v for k, v in numbers.items()}) == "eval/score"
    assert score_kind(META).startswith("ogbench-success, Line-v0")
    text = screen.scores_line({**numbers, "score_best": 70.0})
    assert text.startswith("success: last 66.7 % ± ") and text.endswith("best 70.0 %")


def test_success_counts_at_the_last_step_only() -> None:
    """The walker passes its goal and comes back to it or not: what counts is where the episode ends."""
    meta = {**META, "env_kwargs": {"forget": True}}
    away = Evaluator(meta, SIZES, episodes=1).run(lambda obs: np.ones((len(obs), 1)))
    assert away.success is not None and not away.success.any() and away.returns.tolist() == [1.0, 1.0, 1.0]
    stays = Evaluator(meta, SIZES, episodes=1).run(Walker())
    assert stays.success is not None and stays.success.all()


def test_a_policy_without_goals_plays_too_and_one_that_diverged_fails() -> None:
    result = Evaluator(META, SIZES, episodes=1).run(lambda obs: np.full((len(obs), 1), np.nan))
    assert result.success is not None and not result.success.any() and np.isnan(result.returns).all()


def test_wilsons_interval_by_hand() -> None:
    """z = 1.959964, n = 10, p = 0.5: z/(1 + z²/n)·√(p(1-p)/n + z²/4n²) = 0.26338 (interval 0.2366 … 0.7634)."""
    assert wilson(5, 10) == pytest.approx(0.263400, abs=1e-5)
    z = 1.959963984540054
    assert wilson(0, 50) == pytest.approx(z * z / 50 / 2 / (1 + z * z / 50))
    assert wilson(0, 50) == wilson(50, 50) > 0
    assert wilson(250, 500) < wilson(25, 50)
    assert wilson(5, 10, level=0.5) < wilson(5, 10)
    assert not math.isnan(wilson(1, 1))


# -- OGBench -----------------------------------------------------------------------------------------------------------


@ogbench
def test_point_maze_tasks_are_the_published_ones_and_its_oracle_solves_them() -> None:
    meta = {"env_id": "pointmaze-medium-v0", "tasks": 5, "max_episode_steps": 1000}
    evaluator = Evaluator(meta, SimpleNamespace(obs_dim=2, action_dim=2), episodes=1)
    cells = [((1, 1), (6, 6)), ((6, 1), (1, 6)), ((5, 3), (4, 2)), ((6, 5), (6, 1)), ((2, 6), (1, 1))]

    class Oracle(Walker):
        def act(self, obs: np.ndarray) -> np.ndarray:
            inner = [env.unwrapped for env in evaluator.envs]
            if not hasattr(self, "start"):
                self.start = obs.copy()
            ways = np.array([m.get_oracle_subgoal(x, g)[0] - x for m, x, g in zip(inner, obs, self.goals)])
            return ways / (np.linalg.norm(ways, axis=1, keepdims=True) + 1e-6)

    agent = Oracle()
    result = evaluator.run(agent)
    assert result.success is not None and result.success.all() and result.lengths.max() < 200
    maze = evaluator.envs[0].unwrapped
    assert [maze.xy_to_ij(xy) for xy in agent.start] == [start for start, _ in cells]
    assert [maze.xy_to_ij(xy) for xy in agent.goals] == [goal for _, goal in cells]
    evaluator.close()


@ogbench
def test_mazes_leave_nothing_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = make_environment({"env_id": "pointmaze-medium-v0"})
    assert len(list(tmp_path.iterdir())) == 1
    close_environment(env)
    assert list(tmp_path.iterdir()) == []


@ogbench
def test_a_run_and_its_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made data, a few updates of OTA, rows with success and order of both values, `evaluate` with a temperature."""
    from offpolicy.data.sources.ogbench_make import make, recipe_of

    name = "pointmaze-medium-navigate-v0"
    recipe = {**recipe_of(name, "pointmaze-medium-v0"), "episodes": 2, "rows": 61}
    make(recipe, tmp_path / f"{name}.npz")
    data = offpolicy.load_data(tmp_path / f"{name}.npz")
    data.load().meta["max_episode_steps"] = 20  # so that episodes are short
    method = offpolicy.OTA(hidden_dims=(8, 8), batch_size=8, subgoal_steps=5)
    run = offpolicy.fit(method, data, max_steps=3, folder=tmp_path / "run", eval_every=0, eval_episodes=1)
    out = capsys.readouterr().out
    assert "1 episode of pointmaze-medium-v0 for each of 5 goals" in out and "success: last" in out
    for key in ("success_mean", "success_task5", "score", "order_consistency/low", "order_consistency/high"):
        assert 0.0 <= run.scores[key] <= 100.0
    assert method.eval_row["score_kind"].startswith("ogbench-success")

    assert main([str(tmp_path / "run"), "--episodes", "2", "--temperature", "0.5"]) == 0
    out = capsys.readouterr().out
    assert (
        "2 episodes of each task (ogbench-success" in out and "success_task3" in out and "order_consistency/high" in out
    )
    file = next((tmp_path / "run").glob("evaluation-*-episodes2-temperature0.5.json"))
    numbers = json.loads(file.read_text())
    assert len(numbers["returns"]) == 10 and numbers["score_interval"] == 100 * numbers["success_interval"]


def test_a_temperature_needs_a_goal_conditioned_method() -> None:
    with pytest.raises(offpolicy.errors.UsageError, match=r"`temperature` is 0\.3, but BC acts by one action"):
        offpolicy.evaluate(offpolicy.BC(), temperature=0.3)
