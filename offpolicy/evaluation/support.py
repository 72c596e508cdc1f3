"""Whether the data show what a policy does: its actions among those of the data, and how far they lie from all of them.

A pair of state and action counts as outside the data when its nearest pair in other episodes lies further than those of
95 % of the data's own pairs do. In a distance the state (standardised) and the action (in [-1, 1], standardised) count
alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PAIRS, STATES = 20_000, 1_000  # that are looked at, evenly spread over the data
NEAR = 0.1  # root mean square over the dimensions of actions in [-1, 1]
INSIDE = 0.95
CHUNK = 256


class Coverage(NamedTuple):
    """How well data cover a policy.

    Attributes:
        near: share of states in which the data's action lies within 0.1 of the policy's.
        outside: share of states in which the policy's action lies outside the support of the data; NaN where there is
            one episode alone.
    """

    near: float
    outside: float


class Support:
    """The pairs of state and action that data have.

    Args:
        obs, action: of the episodes that show what there is, (N, O) and (N, A), actions in [-1, 1].
        held_obs, held_action: of other episodes, in whose states policies are asked, (n, O) and (n, A).
        episode: of each pair, (n,), where both are the same episodes; pairs of one are not compared then.
    """

    def __init__(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        held_obs: np.ndarray,
        held_action: np.ndarray,
        episode: np.ndarray | None = None,
    ) -> None:
        known, asked = spread_out(len(obs), PAIRS), spread_out(len(held_obs), STATES)
        self.asked = asked
        self._obs_scale, self._action_scale = _scale(obs[known]), _scale(action[known])
        self._pairs = self._joined(obs[known], action[known])
        self._held_obs, self._held_action = held_obs[asked], held_action[asked]
        self._episodes = None
        if episode is not None:
            self._episodes = torch.from_numpy(episode[asked]), torch.from_numpy(episode[known])
        own = self._distance(self._held_action)
        own = own[np.isfinite(own)]
        self._limit = float(np.quantile(own, INSIDE)) if len(own) else np.nan  # there is one episode alone

    def coverage(self, action: np.ndarray) -> Coverage:
        """Of a policy that takes these actions, (n, A) in [-1, 1], in the states ``asked``."""
        gap = np.sqrt(((action - self._held_action) ** 2).mean(1))
        outside = np.nan if np.isnan(self._limit) else float((self._distance(action) > self._limit).mean())
        return Coverage(float((gap <= NEAR).mean()), outside)

    def _distance(self, action: np.ndarray) -> np.ndarray:
        """From the states with these actions to the nearest pair, (n,)."""
        asked = self._joined(self._held_obs, action)
        found = []
        for rows in torch.arange(len(asked), device="cpu").split(CHUNK):
            distance = torch.cdist(asked[rows], self._pairs)
            if self._episodes is not None:
                of_asked, of_known = self._episodes
                distance[of_asked[rows, None] == of_known] = torch.inf
            found.append(distance.amin(1).numpy())
        return np.concatenate(found)

    def _joined(self, obs: np.ndarray, action: np.ndarray) -> Tensor:
        parts = np.concatenate([obs * self._obs_scale, action * self._action_scale], 1)
        return torch.from_numpy(parts.astype(np.float32))


def spread_out(count: int, most: int) -> np.ndarray:
    """At most so many numbers below ``count``, evenly spread, int64."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _scale(values: np.ndarray) -> np.ndarray:
    """One over the standard deviation of each column and the root of their number, (1, columns)."""
    std = values.std(0, keepdims=True)
    return 1.0 / (np.where(std > 1e-6, std, 1.0) * np.sqrt(values.shape[1]))
