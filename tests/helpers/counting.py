"""An environment whose observation says where it stands, so that every stored step can be checked by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import offpolicy as op
from offpolicy.data.module import DataModule
from offpolicy.data.online import OnlineOptions

ENV = "CountingOnline-v0"


class Counting(gymnasium.Env):
    """Observation (episode, t), reward t; episodes end by themselves at t = 3, 5 or 7 in turn, and the limit is 6.

    An episode gets its number when its seed is met for the first time.
    """

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


gymnasium.register(ENV, Counting, max_episode_steps=6)
gymnasium.register("CountingOnlineEndless-v0", Counting)


class Drifting(Counting):
    """The number of an episode follows from its seed alone, and the reward from the action too."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=0)
        self.episode, self.at = int(seed or 0) % 100, np.float32(int(seed or 0) % 7)
        return np.array([self.at, 0], np.float32), {}

    def step(self, action: Any) -> Any:
        _, reward, *rest = super().step(action)
        self.at += action[0]
        return np.array([self.at, self.t], np.float32), reward - abs(float(self.at)), *rest


gymnasium.register("Drifting-v0", Drifting, max_episode_steps=6)


class Aim(gymnasium.Env):
    """One step: the action must be what is observed, and its square error is the loss."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.at = self.np_random.uniform(-1.0, 1.0, 1).astype(np.float32)
        return self.at, {}

    def step(self, action: Any) -> Any:
        return self.at, -float((action[0] - self.at[0]) ** 2), True, False, {}


gymnasium.register("Aim-v0", Aim, max_episode_steps=2)


class Unbounded(Counting):
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)


gymnasium.register("CountingUnbounded-v0", Unbounded, max_episode_steps=6)


def online(env: str | None = ENV, **options: Any) -> OnlineOptions:
    """Rounds of 10 steps, 60 in all."""
    return OnlineOptions(env=env, **({"env_steps": 60, "round_steps": 10} | options))


def scratch(env: str = ENV, **options: Any) -> DataModule:
    """No other data; 20 of the 60 steps are random, so there are 40 updates."""
    return DataModule(env, online=online(env, **({"random_steps": 20} | options)))


def collect(folder: Path | None, data: DataModule | None = None, method: Any = None, **options: Any) -> op.FitResult:
    """Train a small method, from scratch by default: rows every 10 updates and evaluations every 15."""
    given = {"eval_every": 15, "log_every": 10, "eval_episodes": 1, "verbose": False, "matmul": "mkl"} | options
    return op.fit(method or op.SAC(hidden_dims=(8, 8), batch_size=16), data or scratch(), folder=folder, **given)
