"""Discounted returns of the rest of an episode, as a column of the steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from offpolicy.data.columns import to_numpy
from offpolicy.data.replay import Replay

RETURN_TO_GO = "return_to_go"


def with_returns_to_go(
    replay: Replay, discount: float, *, center: float = 0.0, scale: float = 1.0, failure_reward: float | None = None
) -> Replay:
    """The same replay with a column ``return_to_go``: G_t = r_t + γ·G_{t+1} up to the last stored step.

    Nothing is bootstrapped where an episode was cut, so G is too low there if rewards are positive.

    Args:
        replay: whole episodes.
        discount: γ, in [0, 1).
        center, scale: rewards are (r - center)·scale.
        failure_reward: reward, after that, of a step without success. Episodes of such steps alone have
            failure_reward/(1 - γ) everywhere, as their goal was never reached. None for tasks without one.
    """
    reward = (to_numpy(replay.steps["reward"]).astype(np.float64) - center) * scale
    found = np.zeros(len(reward))
    last, rest = replay.start + replay.length - 1, np.zeros(replay.num_episodes)
    for back in range(int(replay.length.max())):  # all episodes at once, from their ends
        alive = replay.length > back
        rows = last[alive] - back
        rest[alive] = found[rows] = reward[rows] + discount * rest[alive]
    if failure_reward is not None:
        rows = replay.rows
        episode = np.repeat(np.arange(replay.num_episodes), replay.length)
        other = np.bincount(episode, weights=~np.isclose(reward[rows], failure_reward), minlength=replay.num_episodes)
        found[rows[(other == 0)[episode]]] = failure_reward / (1.0 - discount)
    steps: dict[str, Any] = {**replay.steps, RETURN_TO_GO: found.astype(np.float32)}
    same: dict[str, Any] = {
        "start": replay.start,
        "length": replay.length,
        "tail": replay.tail,
        "episodes": replay.episodes,
    }
    made = Replay(steps, **same, meta=replay.meta)
    made.version = replay.version
    return made
