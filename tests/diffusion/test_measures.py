"""Measures of synthetic data: against the true simulator, by hand, and through the command line."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import toy_replay

from offpolicy.data.__main__ import main
from offpolicy.data.normalize import Normalizer
from offpolicy.data.replay import Replay
from offpolicy.diffusion.measures import (
    LEVELS,
    Judge,
    Simulator,
    column_quantiles,
    compare,
    plot,
    regeneration_metrics,
    sampled,
)
from offpolicy.environments.wrappers import NoEnvironment
from offpolicy.errors import DataError, UsageError
from offpolicy.evaluation.rollout import Evaluator


def played(env_id: str, steps: int = 12, **meta: Any) -> Replay:
    """Three episodes of random actions in an environment, as Pendulum's data would be."""
    facts = {"name": "played", "env_id": env_id, **meta}
    sizes = SimpleNamespace(**{"obs_dim": 3, "action_dim": 1} | meta.pop("sizes", {}))
    facts.pop("sizes", None)
    evaluator = Evaluator(facts, sizes, episodes=1)
    env, columns, tail = evaluator.envs[0], {"obs": [], "action": [], "reward": []}, []
    env.action_space.seed(0)
    for episode in range(3):
        now = evaluator.flat(env.reset(seed=episode, options=meta.get("reset_options"))[0])
        for _ in range(steps):
            action = env.action_space.sample()
            following, reward, *_ = env.step(action)
            for column, value in zip(columns.values(), (now, action, reward)):
                column.append(value)
            now = evaluator.flat(following)
        tail.append(now)
    space = env.action_space
    evaluator.close()
    return Replay(
        {**{k: np.asarray(v, np.float32) for k, v in columns.items()}, "terminated": np.zeros(3 * steps, bool)},
        start=np.arange(3) * steps,
        length=np.full(3, steps),
        tail={"obs": np.asarray(tail, np.float32)},
        meta=facts | {"action_low": space.low.tolist(), "action_high": space.high.tolist()},
    )


@pytest.fixture(scope="module")
def real() -> Replay:
    return played("Pendulum-v1")


class Standard:
    """A policy whose law is N(0, 1) in the scaled action, whatever the state."""

    def __init__(self, replay: Replay) -> None:
        self.sizes = SimpleNamespace(obs_dim=replay.steps["obs"].shape[1], action_dim=replay.steps["action"].shape[1])
        self.normalizer = Normalizer((self.sizes.obs_dim,), self.sizes.action_dim)
        self.normalizer.fit(replay, None, normalize_obs=False, reward_transform="r", eps=0.0)
        self.device, self.dtype_of_weights = torch.device("cpu"), torch.float32

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        assert action.abs().max() <= 1.0 and obs.shape[:-1] == action.shape[:-1]
        return (-0.5 * action.square() - 0.5 * math.log(2 * math.pi)).sum(-1)


def changed(replay: Replay, **columns: np.ndarray) -> Replay:
    return Replay(
        {**replay.steps, **columns}, start=replay.start, length=replay.length, tail=replay.tail, meta=replay.meta
    )


# -- the simulator -----------------------------------------------------------------------------------------------------

ROBOTS = {
    "Hopper-v5": {"obs_dim": 11, "action_dim": 3},
    "HalfCheetah-v5": {"obs_dim": 17, "action_dim": 6},
    "Swimmer-v5": {"obs_dim": 8, "action_dim": 2},
}
mujoco = pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="needs mujoco")
robotics = pytest.mark.skipif(importlib.util.find_spec("gymnasium_robotics") is None, reason="needs gymnasium-robotics")
MAZE = {"obs_keys": ["observation"], "sizes": {"obs_dim": 4, "action_dim": 2}}


def assert_exact(replay: Replay, atol: float, rewards: bool = True) -> None:
    judge = Judge(replay)
    error, reward_error = judge.errors(replay, replay.rows)
    judge.close()
    np.testing.assert_allclose(error, 0.0, atol=atol)
    if rewards:
        np.testing.assert_allclose(reward_error, 0.0, atol=atol)
    else:
        assert np.isnan(reward_error).all()


def test_the_simulator_repeats_real_transitions(real: Replay) -> None:
    assert_exact(real, 1e-5)


@mujoco
@pytest.mark.parametrize("env_id", ROBOTS)
def test_the_simulator_repeats_robots(env_id: str) -> None:
    assert_exact(played(env_id, sizes=ROBOTS[env_id]), 1e-3)  # observations are stored as float32


@robotics
def test_the_simulator_repeats_mazes() -> None:
    """Rewards are those of the goal cell's centre, and unknown where every episode has a goal of its own."""
    options = {"goal_cell": np.array([1, 1])}
    replay = played("PointMaze_UMazeDense-v3", **MAZE, reset_options=options)
    centre = np.array([-1.0, 1.0])  # of cell (1, 1) of the maze of 5 × 5
    after = np.concatenate([replay.steps["obs"][1:], replay.tail["obs"][:1]])
    after[replay.end] = replay.tail["obs"]
    replay.steps["reward"] = np.exp(-np.linalg.norm(after[:, :2] - centre, axis=1)).astype(np.float32)
    assert_exact(replay, 1e-4)
    assert_exact(played("PointMaze_UMazeDense-v3", **MAZE), 1e-4, rewards=False)


def test_observations_that_do_not_tell_the_state() -> None:
    with pytest.raises(NoEnvironment, match="The observations of MountainCarContinuous-v0 do not tell its state"):
        Simulator({"env_id": "MountainCarContinuous-v0"}, SimpleNamespace(obs_dim=2, action_dim=1))
    nowhere = toy_replay([10] * 3, env_id=None)
    found = compare(nowhere, [nowhere])
    assert "dynamics_error" not in found.real.numbers and "note: The data name no environment" in str(found)


# -- measures ----------------------------------------------------------------------------------------------------------


def test_errors_in_standard_deviations(real: Replay) -> None:
    """Every stored next observation is 0.1 standard deviations of the first dimension off, every reward 0.5."""
    tail = {"obs": np.zeros((3, 3), np.float32)}
    alone = Replay(dict(real.steps), start=real.rows, length=np.ones(36, np.int64), meta=real.meta)
    std = real.steps["obs"].std(0)[0]
    tail = {"obs": real.next_obs(real.rows).numpy() + np.array([0.1 * std, 0.0, 0.0], np.float32)}
    reward = real.steps["reward"] + 0.5 * real.steps["reward"].std()
    fake = Replay({**alone.steps, "reward": reward}, start=alone.start, length=alone.length, tail=tail, meta=real.meta)
    found = compare(real, {"fake": fake}).synthetic[0]
    assert found.dynamics_error == pytest.approx([0.1, 0.0, 0.0], abs=1e-5)
    assert found.numbers["dynamics_error"] == pytest.approx(0.1 / math.sqrt(3), rel=1e-4)
    assert found.numbers["dynamics_error_median"] == pytest.approx(0.1 / math.sqrt(3), rel=1e-4)
    assert found.numbers["reward_error"] == pytest.approx(0.5, rel=1e-4)


def test_drift_adds_up_what_single_steps_do_not_show(real: Replay) -> None:
    """0 for what happened; with the actions turned round, the first step is the one-step error, and later ones grow."""
    judge = Judge(real)
    drift, t = judge.drift(real)
    assert t.max() == 11 and drift.shape == (36,)
    np.testing.assert_allclose(drift, 0.0, atol=1e-4)
    other = changed(real, action=-real.steps["action"])
    one_step = np.sqrt(np.square(judge.errors(other, real.rows)[0]).mean(1))
    drift, t = judge.drift(other)
    np.testing.assert_allclose(np.sort(drift[t == 0]), np.sort(one_step[::12]), rtol=1e-4)
    assert drift[t == 11].mean() > 3 * one_step.mean()
    judge.close()


def test_an_end_without_a_successor_shows_no_dynamics(real: Replay) -> None:
    """Episodes that terminate, with nothing stored after them: their last steps have no error."""
    ended = np.zeros(36, dtype=bool)
    ended[real.end] = True
    bare = Replay({**real.steps, "terminated": ended}, start=real.start, length=real.length, meta=real.meta)
    judge = Judge(real)
    assert judge.measure(bare).numbers["dynamics_error"] < 1e-5
    drift, t = judge.drift(bare)
    judge.close()
    assert t.max() == 10 and drift.shape == (33,) and drift.max() < 1e-4


def test_likelihood_by_hand_and_by_step(real: Replay) -> None:
    """Actions ±2 at even and 0 at odd steps: −½ log 2π − ½ and −½ log 2π."""
    fake = changed(real, action=np.where(real.t % 2 == 0, 2.0, 0.0).astype(np.float32)[:, None])
    found = compare(real, {"fake": fake}, Standard(real)).synthetic[0]
    odd = -0.5 * math.log(2 * math.pi)
    assert found.numbers["log_prob"] == pytest.approx(odd - 0.25, rel=1e-6)
    assert found.by_step["log_prob"] == pytest.approx([odd - 0.5, odd] * 6, rel=1e-6)
    assert len(found.by_step["dynamics_error"]) == len(found.by_step["drift"]) == 12


def test_novelty_known_answer(real: Replay) -> None:
    """Observations in standard deviations, actions in half their range; the real data leave themselves out."""
    obs = np.array([[0.0, 0, 0], [1, 0, 0], [1, 0, 0]], np.float32)
    data = Replay(
        {"obs": obs, "action": np.zeros((3, 1), np.float32), "reward": np.zeros(3, np.float32),
         "terminated": np.zeros(3, bool)},
        tail={"obs": obs[:1]},
        meta={"action_low": [-2.0], "action_high": [2.0]},
    )  # fmt: skip
    judge = Judge(data)
    std = np.std([0.0, 1.0, 1.0])
    np.testing.assert_allclose(judge.novelty(data, data.rows), [1 / std, 0.0, 0.0], atol=1e-6)
    far = changed(data, action=np.full((3, 1), 1.0, np.float32), obs=obs * 2)
    np.testing.assert_allclose(judge.novelty(far, far.rows), [0.5, math.hypot(1 / std, 0.5), math.hypot(1 / std, 0.5)],
                               rtol=1e-6)  # fmt: skip


def test_quantiles(real: Replay) -> None:
    steps = np.arange(101, dtype=np.float32)
    replay = Replay(
        {"obs": np.stack([steps, -steps], 1), "action": steps[:, None], "reward": steps, "terminated": steps < 0},
        tail={"obs": np.zeros((1, 2), np.float32)},
    )
    found = column_quantiles(replay)
    assert list(found) == ["obs[0]", "obs[1]", "action[0]", "reward"]
    assert found["reward"] == list(LEVELS) and found["obs[1]"] == [level - 100.0 for level in LEVELS]
    half = column_quantiles(Replay(replay.steps, start=np.array([50]), length=np.array([51]), tail=replay.tail))
    assert half["reward"][3] == 75.0


def test_rows_are_sampled_without_repetition(real: Replay) -> None:
    rows = sampled(real, 20)
    assert len(rows) == len(set(rows.tolist())) == 20 and (np.diff(rows) > 0).all()
    assert sampled(real, 36).tolist() == sampled(real, 99).tolist() == real.rows.tolist()
    cut = Replay(real.steps, start=real.start, length=real.length, meta=real.meta)  # no last observations
    assert set(range(36)) - set(sampled(cut, 99).tolist()) == {11, 23, 35}


def test_regeneration_metrics(real: Replay) -> None:
    """The old pool is asked about under the same policy; no old pool, no number."""
    policy = Standard(real)
    zero, edge = (changed(real, action=np.full((36, 1), a, np.float32)) for a in (0.0, 2.0))
    found = regeneration_metrics(edge, zero, policy, real)
    assert found["synthetic/log_prob"] - found["synthetic/log_prob_before"] == pytest.approx(0.5, rel=1e-5)
    assert set(found) == {f"synthetic/{n}" for n in ("log_prob", "log_prob_before", "dynamics_error", "reward_error",
                                                     "novelty")}  # fmt: skip
    assert "synthetic/log_prob_before" not in regeneration_metrics(None, zero, policy, real)


def test_other_sizes_are_refused(real: Replay) -> None:
    other = toy_replay(obs_dim=2)
    with pytest.raises(DataError, match="toy has observations of width 2 and actions of width 1, played has 3 and 1"):
        compare(real, [other])
    with pytest.raises(UsageError, match=r"the policy .* has observations of width 2"):
        compare(real, [real], Standard(other))


# -- what people see ---------------------------------------------------------------------------------------------------


def test_command(real: Replay, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(one.save(tmp_path / name)) for name, one in (("real", real), ("one", real), ("two", real))]
    picture, numbers = tmp_path / "plot.png", tmp_path / "numbers.json"
    assert main(["compare", *paths, "--rows", "30", "--plot", str(picture), "--json", str(numbers)]) == 0
    out = capsys.readouterr().out
    for words in ("played", "one", "two", "dynamics error (rms", "transitions measured", "quantiles 5 %", "obs[2]"):
        assert words in out
    found = json.loads(numbers.read_text())
    assert [one["name"] for one in found["synthetic"]] == ["one", "two"] and found["real"]["rows"] == 30
    assert found["synthetic"][0]["quantiles"] == found["real"]["quantiles"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["compare", *paths, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["levels"] == list(LEVELS)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["pendulum-stitch-v0"], 2, "required: synthetic"),
        (["pendulum-stitch-v0", "pendulum-stitch-v0", "--rows", "1"], 2, "Change `--rows` or leave it out"),
        (["pendulum-stitch-v0", "nowhere"], 2, "no data set is called 'nowhere'"),
        (["pendulum-stitch-v0", "gsm8k"], 2, "holds texts; expected steps of an environment"),
    ],
)
def test_command_mistakes(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == code
    assert words in capsys.readouterr().err


def test_picture_with_likelihood(real: Replay, tmp_path: Path) -> None:
    found = compare(real, {"a": real, "b": real}, Standard(real))
    assert plot(found, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert list(found.shifts().values()) == [0.0] * 5
