"""The true simulator of an environment, from any state that its observations tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from offpolicy.compute.generators import isolated_rng
from offpolicy.environments.states import state_setter
from offpolicy.environments.wrappers import NoEnvironment
from offpolicy.evaluation.rollout import Evaluator


class Simulator:
    """One step of the true environment from the state that an observation encodes.

    The absolute place of a walking robot is not in its observation and is set to 0. Velocities that an environment
    clips in its observations (Hopper, Walker2d: ±10) are taken as observed, so that real transitions have an error
    there too.

    Args:
        meta: of the real replay.
        sizes: ``obs_dim`` and ``action_dim`` of the data.

    Raises:
        NoEnvironment: none here, or one whose observations do not tell the state.
    """

    def __init__(self, meta: Mapping[str, Any], sizes: Any) -> None:
        self._evaluator = Evaluator(meta, sizes, episodes=1)
        self.env = self._evaluator.envs[0].unwrapped
        options = dict(self._evaluator.reset_options[0] or {})
        with isolated_rng(0):
            start = self._evaluator.flat(self._evaluator.envs[0].reset(seed=0, options=options or None)[0])
        setter = state_setter(self.env, len(start))
        found = None if setter is None else setter.put(start)
        if setter is None or found is None or not np.allclose(found, start, atol=1e-6):
            self.close()
            raise NoEnvironment(f"The observations of {meta['env_id']} do not tell its state: no dynamics error.")
        self._setter = setter
        self._rewards = setter.settle(options)

    def step(self, obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Next observation (n, O) and reward (n,) (NaN where it is unknown) of obs (n, O) and action (n, A), float64.

        Actions in environment units.
        """
        next_obs, reward = np.empty(obs.shape, np.float64), np.full(len(obs), np.nan)
        for i, (state, force) in enumerate(zip(obs.astype(np.float64), action)):
            self._setter.put(state)
            next_obs[i], gained = self._move(force)
            if self._rewards:
                reward[i] = gained
        return next_obs, reward

    def play(self, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The observations (T, O) after each of the actions (T, A), from the state of one observation (O,)."""
        self._setter.put(obs.astype(np.float64))
        return np.stack([self._move(force)[0] for force in action])

    def _move(self, action: np.ndarray) -> tuple[np.ndarray, float]:
        observation, reward, *_ = self.env.step(action.astype(self.env.action_space.dtype))
        return self._evaluator.flat(observation), float(reward)

    def close(self) -> None:
        self._evaluator.close()
