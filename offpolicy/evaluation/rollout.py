"""Episodes of a policy in gymnasium environments, repeatable and without a trace on training.

Episode k always starts from seed ``seed + k``, whatever the number of environments, and the global random generators
of Python, NumPy and torch are seeded for the evaluation and put back after it. So a result depends on the policy
alone, and training numbers never depend on evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from offpolicy.compute.generators import isolated_rng
from offpolicy.data.sizes import Sizes
from offpolicy.environments.checks import Episode, reach
from offpolicy.environments.make import EVAL_SEED, close_environment, make_environment, spaces_of
from offpolicy.environments.wrappers import NoEnvironment
from offpolicy.errors import UsageError
from offpolicy.given import seed_number, whole

MAX_STEPS = 100_000  # an episode that is longer than this has no end: the environment has no step limit


class Agent(Protocol):
    """A policy that may remember. Only `act` is required; a plain function of the observations will do too.

    ``reset(num_envs)`` starts `num_envs` new episodes; where the data come with tasks, ``set_goals(goals)`` follows it
    with the observations (n, O) float32 to be reached. ``observe(reward, finished)`` follows every step with the
    rewards (n,) and which episodes are over (n,). Row i is the same episode from `reset` to the next `reset`; rows of
    finished episodes keep their last observation, get reward 0, and their actions are ignored.
    """

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Observations (n, O) float32 -> actions (n, A) in environment units."""


class EvalResult(NamedTuple):
    """One row per episode: undiscounted return (n,) float64, length in steps (n,) int64, success (n,) bool or None.

    `success` is whether the environment reported it at any step (with tasks: at the last one); None when it never
    reports it. `task` is the number of the task (n,) int64, from 1; None without tasks. The return of an episode in
    which the policy gave a NaN or infinite action is NaN, and the episode stops there, with tasks as a failure.
    """

    returns: np.ndarray
    lengths: np.ndarray
    success: np.ndarray | None
    task: np.ndarray | None = None


class Evaluator:
    """Runs whole episodes, several environments side by side, with one batched call of the policy per step.

    Args:
        meta: of a replay. Used are `env_id`, `env_kwargs`, `max_episode_steps`, `obs_keys` (the parts of a dict
            observation, concatenated in this order; 'a/b' reaches into nested ones), `reset_options` (one dict for
            every episode, or a list from which episode k takes number k, round and round) and `tasks`: how many goals
            the environment sets, as OGBench's do. Then episode k is one of task 1 + k mod `tasks`, and its goal, the
            observation ``info["goal"]`` of the reset, is handed to the agent.
        sizes: `obs_dim` and `action_dim` of the data.
        episodes: per evaluation, at least 1; with tasks, of each task.
        seed: episode k is reset with `seed + k`.
        num_envs: environments kept open, at most one per episode; 10 if None. It changes the speed and the batch the
            policy sees, not the episodes.

    Raises:
        NoEnvironment: no `env_id`, no such environment here, or its package is missing.
        UsageError: its spaces do not match the data, or it refuses `env_kwargs`.
    """

    def __init__(
        self,
        meta: Mapping[str, Any],
        sizes: Sizes,
        *,
        episodes: int = 10,
        seed: int = EVAL_SEED,
        num_envs: int | None = None,
    ) -> None:
        episodes, seed = whole("episodes", episodes, 1), seed_number(seed)
        num_envs = None if num_envs is None else whole("num_envs", num_envs, 1)
        self.tasks = int(meta.get("tasks") or 0)
        self.episodes = episodes * (self.tasks or 1)
        self.seed = seed
        options = [{"task_id": k + 1} for k in range(self.tasks)] or meta.get("reset_options")
        self.reset_options: list[Mapping[str, Any] | None] = (
            list(options) if isinstance(options, (list, tuple)) else [options]
        )
        self._keys = [str(key).split("/") for key in meta.get("obs_keys") or []]
        with isolated_rng(seed):
            self.envs = [make_environment(meta)]
            self.env_id = str(meta["env_id"])
            action_space, observation_space = spaces_of(self.envs[0], self.env_id)
            self.obs_dim = self._check_obs(self.env_id, observation_space, sizes.obs_dim)
            self.action_dim = self._check_action(self.env_id, action_space, sizes.action_dim)
            self.envs += [make_environment(meta) for _ in range(min(self.episodes, num_envs or 10) - 1)]
        self._space = action_space

    def run(self, agent: Agent | Callable[[np.ndarray], np.ndarray]) -> EvalResult:
        """Play all episodes and return one row for each.

        Args:
            agent: an :class:`Agent`, or a function of observations (n, O) float32 that gives actions (n, A) in
                environment units. Actions are clipped to the action space. Called without gradients.

        Raises:
            UsageError: the actions have another shape, or an episode does not end.
        """
        returns = np.zeros(self.episodes)
        lengths = np.zeros(self.episodes, np.int64)
        success = np.full(self.episodes, -1, np.int8)  # -1: never reported
        with isolated_rng(self.seed), torch.no_grad():
            for first in range(0, self.episodes, len(self.envs)):
                wave = slice(first, min(first + len(self.envs), self.episodes))
                self._play(agent, first, returns[wave], lengths[wave], success[wave])
        task = 1 + np.arange(self.episodes) % self.tasks if self.tasks else None
        return EvalResult(returns, lengths, success > 0 if (success >= 0).any() else None, task)

    def flat(self, observation: Any) -> np.ndarray:
        """An observation of the environment, its parts side by side, (O,), in the precision that it has."""
        wanted = self._keys if self._keys and isinstance(observation, Mapping) else [[]]
        return np.concatenate([np.ravel(reach(observation, key)) for key in wanted])

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            close_environment(env)
        self.envs = []

    def _play(
        self,
        agent: Agent | Callable[[np.ndarray], np.ndarray],
        first: int,
        returns: np.ndarray,
        lengths: np.ndarray,
        success: np.ndarray,
    ) -> None:
        """One episode in each of the first environments; the three arrays (n,) are filled in place."""
        n = len(returns)
        act: Callable[[np.ndarray], Any] = getattr(agent, "act", agent)  # type: ignore[arg-type]
        observe = getattr(agent, "observe", None)
        obs = np.empty((n, self.obs_dim), np.float32)
        goals = np.empty((n, self.obs_dim), np.float32) if self.tasks else None
        episodes = [
            Episode(self.envs[i], self.env_id, first + i, self.seed + first + i, self._keys, self.obs_dim)
            for i in range(n)
        ]
        for i, episode in enumerate(episodes):
            info = episode.reset(self.reset_options[(first + i) % len(self.reset_options)], obs[i])
            if goals is not None:
                if "goal" not in info:
                    raise episode.refuse("gave no goal", f'info["goal"], as its data come with {self.tasks} tasks')
                episode.put(info["goal"], goals[i])
                episode.check_finite(goals[i])
        self._check_finite(episodes, obs)
        if hasattr(agent, "reset"):
            agent.reset(n)
        if goals is not None and hasattr(agent, "set_goals"):
            agent.set_goals(goals)

        alive = np.ones(n, bool)
        while alive.any():
            actions = act(obs.copy())  # a copy: a policy with memory may keep it
            actions = actions.float().cpu().numpy() if isinstance(actions, torch.Tensor) else np.asarray(actions)
            if actions.shape != (n, self.action_dim):
                raise UsageError(
                    f"The policy returned actions of shape {actions.shape} for {n} observations; "
                    f"expected ({n}, {self.action_dim}). Return one row of environment actions per observation."
                )
            finite = np.isfinite(actions).all(1)
            actions = actions.astype(np.float32).reshape(n, *self._space.shape)
            actions = np.clip(actions, self._space.low, self._space.high).astype(self._space.dtype)
            rewards = np.zeros(n)
            for i in np.flatnonzero(alive).tolist():
                if not finite[i]:
                    returns[i], alive[i] = np.nan, False
                    if self.tasks:
                        success[i] = 0
                    continue
                rewards[i], over, info = episodes[i].step(actions[i], obs[i])
                lengths[i] += 1
                alive[i] = not over
                reached = episodes[i].success(info)
                if reached is not None:
                    success[i] = reached if self.tasks else max(success[i], reached)
            self._check_finite(episodes, obs)
            returns += rewards
            if observe is not None:
                observe(rewards, ~alive)
            if lengths.max() >= MAX_STEPS and alive.any():
                raise UsageError(
                    f"An episode of {self.env_id} ran for {MAX_STEPS:,} steps without an end; expected a step limit. "
                    "Set `max_episode_steps` in the data's meta: --data.max_episode_steps N."
                )

    def _check_finite(self, episodes: list[Episode], obs: np.ndarray) -> None:
        if not np.isfinite(obs).all():
            for episode, row in zip(episodes, obs, strict=True):
                episode.check_finite(row)

    def _check_obs(self, env_id: str, space: Any, expected: int) -> int:
        from gymnasium import spaces

        try:
            parts = [reach(space, key) for key in self._keys] if isinstance(space, spaces.Dict) else [space]
        except KeyError as error:
            raise UsageError(
                f"{env_id} has no observation part {error}; it has {sorted(space)}. Correct `obs_keys` of the data."
            ) from None
        if not parts:
            raise UsageError(
                f"{env_id} gives a dict observation with {sorted(space)}; expected to be told which parts the data "
                "hold, in which order. Set `obs_keys` in the data's meta."
            )
        if not all(isinstance(part, spaces.Box) for part in parts):
            raise UsageError(
                f"{env_id} has the observation space {space}; expected numbers in a Box, as in the data. "
                "Correct `env_id` or `obs_keys` of the data, or train without evaluation: `--run.eval_episodes=0`."
            )
        return _same_width(env_id, "observations", sum(int(np.prod(p.shape)) for p in parts), expected)

    def _check_action(self, env_id: str, space: Any, expected: int) -> int:
        from gymnasium import spaces

        if not isinstance(space, spaces.Box):
            raise UsageError(
                f"{env_id} has the action space {space}; expected a Box of {expected} numbers, as in the data. "
                "Correct `env_id` of the data, or train without evaluation: `--run.eval_episodes=0`."
            )
        return _same_width(env_id, "actions", int(np.prod(space.shape)), expected)


def make_evaluator(
    meta: Mapping[str, Any],
    sizes: Sizes,
    *,
    episodes: int = 10,
    seed: int = EVAL_SEED,
    num_envs: int | None = None,
) -> tuple[Evaluator | None, str]:
    """An evaluator and an empty string; or None and a sentence saying why there is none.

    Raises:
        UsageError: there is an environment, but it does not match the data.
    """
    if episodes == 0:
        return None, "Evaluation is off (0 episodes): returns and scores are not measured."
    try:
        return Evaluator(meta, sizes, episodes=episodes, seed=seed, num_envs=num_envs), ""
    except NoEnvironment as error:
        return None, str(error)


def _same_width(env_id: str, what: str, found: int, expected: int) -> int:
    if found != expected:
        raise UsageError(
            f"{env_id} has {what} of width {found}, the data have {expected}; expected the same. Correct `env_id`, "
            "`env_kwargs` or `obs_keys` of the data, or train without evaluation: `--run.eval_episodes=0`."
        )
    return found
