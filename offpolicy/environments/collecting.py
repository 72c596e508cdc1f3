"""One environment in which data are collected: checked once, then stepped without questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from offpolicy.environments.checks import Episode
from offpolicy.environments.make import close_environment, make_environment, spaces_of
from offpolicy.environments.wrappers import NoEnvironment
from offpolicy.errors import UsageError

UNBOUNDED = 1e18  # bounds from here on stand for none


class CollectedEpisode(Episode):
    remedy = "Correct the environment."


class Simulator:
    """An environment of gymnasium for collecting, without a display.

    Args:
        meta: ``env_id``, and where there are some ``env_kwargs``, ``max_episode_steps``, ``obs_keys``,
            ``reset_options``.

    Attributes:
        obs_dim, action_dim: O and A.
        low, high: bounds of the actions, float32 (A,).
        limit: steps of an episode at most, 0 where none is known.

    Raises:
        UsageError: it cannot be made, or its spaces are none that continuous control can learn in.
    """

    def __init__(self, meta: Mapping[str, Any]) -> None:
        self.env_id = str(meta.get("env_id"))
        try:
            self.env = make_environment(meta)
        except NoEnvironment as error:
            raise UsageError(f"no data can be collected: {str(error).partition(': returns and')[0]}.") from error
        self.keys = [str(key).split("/") for key in meta.get("obs_keys") or []]
        options = meta.get("reset_options")
        if isinstance(options, (list, tuple)) or meta.get("tasks"):
            raise UsageError(f"{self.env_id} has several tasks, and data are collected in one; expected one task.")
        self.reset_options: Mapping[str, Any] | None = options
        self.action_space, space = spaces_of(self.env, self.env_id)
        self.low, self.high = self._bounds()
        self.action_dim, self.obs_dim = len(self.low), self._width(space)
        spec = getattr(self.env, "spec", None)
        self.limit = int(meta.get("max_episode_steps") or getattr(spec, "max_episode_steps", None) or 0)

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        from gymnasium import spaces

        space = self.action_space
        if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
            raise UsageError(
                f"{self.env_id} has the action space {space}; expected a Box of real numbers, as the methods here "
                "learn continuous actions. Choose another environment, or wrap it."
            )
        low, high = (np.asarray(b, np.float64).reshape(-1) for b in (space.low, space.high))
        if not (np.isfinite([low, high]).all() and (np.abs([low, high]) < UNBOUNDED).all()):
            raise UsageError(
                f"{self.env_id} has actions without bounds ({space}); expected finite ones, which [-1, 1] is scaled "
                "to. Wrap it with gymnasium.wrappers.RescaleAction or ClipAction and bounds of its own."
            )
        return low.astype(np.float32), high.astype(np.float32)

    def _width(self, space: Any) -> int:
        from gymnasium import spaces

        parts = [space]
        if isinstance(space, spaces.Dict) and self.keys:
            parts = [self._part(space, key) for key in self.keys]
        if not all(isinstance(part, spaces.Box) and len(part.shape) == 1 for part in parts):
            raise UsageError(
                f"{self.env_id} has the observation space {space}; expected a vector of numbers, or a dict whose "
                "vectors `obs_keys` names. Pass --data.obs_keys, or wrap it."
            )
        return sum(int(part.shape[0]) for part in parts)

    def _part(self, space: Any, key: list[str]) -> Any:
        try:
            for name in key:
                space = space[name]
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"{self.env_id} has no part {'/'.join(key)} in its observations ({space}); expected `obs_keys` of "
                "its space. Correct them."
            ) from error
        return space

    def begin(self, number: int, seed: int, out: np.ndarray) -> CollectedEpisode:
        """Episode ``number`` from its own seed; its first observation goes into ``out`` (O,) float32."""
        episode = CollectedEpisode(self.env, self.env_id, number, seed, self.keys, self.obs_dim)
        episode.reset(self.reset_options, out)
        episode.check_finite(out)
        return episode

    def playable(self, action: np.ndarray) -> np.ndarray:
        """An action (A,) inside the bounds, as the environment takes it."""
        return np.clip(action, self.low, self.high).astype(self.action_space.dtype).reshape(self.action_space.shape)

    def close(self) -> None:
        close_environment(self.env)
