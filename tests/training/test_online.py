"""Runs that collect their data: what is stored, that they go on bit for bit, and what is refused before anything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from toy import Crash, differences, run_files

import offpolicy as op
from offpolicy.data.module import DataModule
from offpolicy.data.online import OnlineOptions
from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError
from offpolicy.files import Table

SMALL: dict[str, Any] = {"hidden_dims": (8, 8), "batch_size": 16}


class Counting(gymnasium.Env):
    """Its observation is (episode, t). Episodes end by themselves at t = 3, 5 or 7 in turn, the limit is 6."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
    starts: dict[int, int] = {}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.t = self.starts.setdefault(int(seed or 0), len(self.starts)), 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        ended = self.t == 3 + 2 * (self.episode % 3)
        return np.array([self.episode, self.t], np.float32), float(self.t), ended, False, {}


for name, cls in (("CountingOnline-v0", Counting),):
    gymnasium.register(name, cls, max_episode_steps=6)


def data(env: str = "CountingOnline-v0", **options: Any) -> DataModule:
    given = {"env_steps": 60, "round_steps": 10, "random_steps": 20, **options}
    return DataModule(env, online=OnlineOptions(env=env, **given))


def train(folder: Path, callbacks: Any = (), ckpt_path: Any = None, **options: Any) -> Any:
    method = op.SAC(**SMALL)
    return op.fit(
        method,
        data(**options),
        folder=folder if ckpt_path is None else None,
        ckpt_path=ckpt_path,
        eval_every=15,
        log_every=10,
        eval_episodes=1,
        verbose=False,
        callbacks=list(callbacks),
        matmul="mkl",
    )


@pytest.mark.parametrize("episodes", ["cut", "keep", "whole"])
def test_every_transition_is_right(tmp_path: Path, episodes: str) -> None:
    """s' is (episode, t + 1) always; only an end by itself is terminated, a limit and a cut are not."""
    result = train(tmp_path / "run", episodes=episodes)
    assert result.updates == 40
    found = Replay.load(result.folder / "replay" / "collected")
    assert found.num_steps == 60 if episodes != "whole" else 60 <= found.num_steps <= 66
    obs, following = found.steps["obs"], found.next_obs(np.arange(found.num_steps)).numpy()
    assert (following[:, 0] == obs[:, 0]).all() and (following[:, 1] == obs[:, 1] + 1).all()
    assert (found.steps["reward"] == following[:, 1]).all()
    assert (found.steps["terminated"] == (following[:, 1] == 3 + 2 * (obs[:, 0] % 3))).all()
    assert (obs[found.start, 1] == 0).all()
    complete = [3, 5, 6]
    if episodes != "cut":
        lengths = found.length if episodes == "whole" else found.length[:-1]
        number = obs[found.start, 0].astype(int) % 3
        assert [complete[i] for i in number[: len(lengths)]] == lengths.tolist()
    assert len(np.unique(found.episodes["seed"])) == found.num_episodes
    rows = Table(result.folder / "metrics.csv").rows()
    assert [row["env/steps"] for row in rows] == [30, 40, 50, 60] or episodes == "whole"


@pytest.mark.parametrize("episodes", ["cut", "keep"])
@pytest.mark.parametrize("crash", [20, 30])
def test_a_run_that_was_ended_goes_on_bit_for_bit(tmp_path: Path, episodes: str, crash: int) -> None:
    """At the boundary of a round and inside of one, with an episode that runs on."""
    whole = train(tmp_path / "whole", episodes=episodes)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "parts", [Crash(crash)], episodes=episodes)
    train(tmp_path / "parts", ckpt_path=tmp_path / "parts", episodes=episodes)
    ours, theirs = run_files(tmp_path / "parts", whole.updates), run_files(whole.folder, whole.updates)
    for one in (ours, theirs):
        for row in one["metrics"]:
            row.pop("env/seconds", None)
    assert not differences(ours, theirs)
    one, other = (Replay.load(f / "replay" / "collected").fingerprint() for f in (whole.folder, tmp_path / "parts"))
    assert one == other


def test_evaluation_changes_no_training(tmp_path: Path) -> None:
    runs = []
    for name, every in (("often", 10), ("never", 0)):
        result = op.fit(
            op.SAC(**SMALL), data(), folder=tmp_path / name, eval_every=every, eval_episodes=1, verbose=False
        )
        runs.append(result.method.state_dict())
    assert not differences(*map(dict, runs))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"env": "CartPole-v1"}, "Discrete"),
        ({"round_steps": 5}, "round_steps"),
        ({"round_steps": 5, "episodes": "whole"}, "round_steps"),
        ({"random_steps": 60}, "random_steps"),
        ({"random_steps": 0}, "random_steps"),
        ({"capacity": 8}, "capacity"),
        ({"capacity": 30}, "capacity"),
        ({"mix": "half"}, "offline"),
        ({"mix": "third"}, "mix"),
        ({"episodes": "all"}, "episodes"),
    ],
)
def test_bad_options_are_refused_before_anything_is_collected(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        train(tmp_path / "run", **options)
    assert not (tmp_path / "run" / "replay").exists()


def test_methods_that_do_not_act_on_one_observation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected"):
        op.fit(op.DecisionTransformer(), data(), folder=tmp_path / "run", verbose=False)
